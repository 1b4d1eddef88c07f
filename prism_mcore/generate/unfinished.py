"""Samples as they finish, beside the file they are for: a generation that ends early goes on from them.

OUT.samples holds those of earlier tries and of rank 0, OUT.samples.3 those of rank 3, one JSON line each after a first
line that says what they are samples of.
"""

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from prism_mcore.checkpoint.lock import InUse, exclusive
from prism_mcore.convert.names import ExchangeError
from prism_mcore.generate.requests import Completion
from prism_mcore.generate.settings import GenerateSettings
from prism_mcore.json_lines import parse_object

Place = tuple[int, int]  # (line of the prompt file, sample)
Case = dict[str, Any]  # everything that samples depend on


def case_of(hf: Path, prompts: Path, settings: GenerateSettings) -> Case:
    """What the samples of one generation have in common: model, prompts, sampling, numerics; not layout or slots."""
    from prism_mcore.convert.identity import identity  # brings torch, whose seconds a mistake should not take

    used = settings.model_dump(mode="json", include={"sampling", "precision", "kernels"})
    return {
        "prompts": hashlib.sha256(prompts.read_bytes()).hexdigest(),
        "model": identity(hf),
        **{f"{section}.{name}": value for section, values in used.items() for name, value in values.items()},
    }


def check(out: Path, case: Case) -> None:
    """A ValueError where samples of another case lie beside `out`."""
    for file in files(out):
        with file.open(encoding="utf-8", errors="replace") as lines:
            _check_case(file, lines.readline(), out, case)


def read(out: Path, case: Case) -> dict[Place, Completion]:
    """All samples that earlier tries finished. Raises ValueError as `check`, and for a broken line."""
    return {place: sample for file in files(out) for place, sample in _samples(file, out, case)}


def take_over(out: Path, case: Case) -> dict[Place, Completion]:
    """`read`, then all of them in one file: for one process, while no other writes."""
    earlier, samples = files(out), read(out, case)
    with Writer(out, 0, case, Path(f"{out}.samples.new")) as writer:
        for (line, sample), completion in samples.items():
            writer.add(line, sample, completion)
    os.replace(f"{out}.samples.new", f"{out}.samples")
    for file in earlier:
        if file != Path(f"{out}.samples"):
            file.unlink()
    return samples


def hold(out: Path, opened: ExitStack) -> None:
    """Let this process alone write `out` and its samples until `opened` closes; an ExchangeError where another does."""
    lock = Path(f"{out}.lock")
    try:
        opened.enter_context(exclusive(lock, what=out))
    except InUse as error:
        raise ExchangeError(f"{error}; wait until it has ended, or choose another --out") from error
    opened.callback(lock.unlink, missing_ok=True)


class Writer:
    """Writes one rank's samples as they finish."""

    def __init__(self, out: Path, rank: int, case: Case, path: Path | None = None):
        """Rank 0 goes on where `take_over` ended."""
        self.path = path or Path(f"{out}.samples.{rank}" if rank else f"{out}.samples")
        goes_on = path is None and rank == 0 and self.path.exists()
        self.file = self.path.open("a" if goes_on else "w", encoding="utf-8")
        if not goes_on:
            self.write(case)

    def add(self, line: int, sample: int, completion: Completion) -> None:
        self.write(
            {
                "line": line,
                "sample": sample,
                "tokens": completion.tokens,
                "logprobs": completion.logprobs.tolist(),
                "finish": completion.finish,
                "stop_token": completion.stop_token,
            }
        )

    def remove(self) -> None:
        """Close, and delete what is not needed any more."""
        self.file.close()
        self.path.unlink()

    def write(self, record: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def files(out: Path) -> list[Path]:
    """Those in which earlier tries left samples for `out`."""
    name = glob.escape(f"{out}.samples")
    return [Path(found) for pattern in (name, f"{name}.[0-9]*") for found in sorted(glob.glob(pattern))]


def _check_case(file: Path, line: str, out: Path, case: Case) -> None:
    if not line.endswith("\n"):
        return  # its writer was stopped at once
    try:
        then = parse_object(line)
    except ValueError as error:
        raise ValueError(f"{file}, line 1: {error}; delete {out}.samples*") from error
    changed = sorted(name for name in case if then.get(name) != case[name])
    if changed:
        name = changed[0]
        what = f"{name}={json.dumps(then.get(name))}, not {json.dumps(case[name])}"
        if name in ("prompts", "model"):
            what = f"another {'prompt file' if name == 'prompts' else 'model'}"
        raise ValueError(
            f"{file} holds samples of an unfinished generation with {what}; go on with that, choose another --out, or"
            f" delete {out}.samples*"
        )


def lines(file: Path, out: Path, case: Case) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of all that one file holds after its first line. Raises ValueError as `read`."""
    with file.open(encoding="utf-8", errors="replace") as found:
        _check_case(file, found.readline(), out, case)
        for number, line in enumerate(found, start=2):
            if not line.endswith("\n"):
                return  # stopped while it was written
            try:
                yield number, parse_object(line)
            except ValueError as error:
                raise broken(file, number, out, error) from error


def broken(file: Path, number: int, out: Path, error: Exception) -> ValueError:
    """What is said of a line that holds no sample."""
    return ValueError(f"{file}, line {number}: no sample ({error}); delete {out}.samples*")


def _samples(file: Path, out: Path, case: Case) -> Iterator[tuple[Place, Completion]]:
    for number, found in lines(file, out, case):
        try:
            completion = _completion(found)
        except (ValueError, KeyError, TypeError) as error:
            raise broken(file, number, out, error) from error
        yield (completion.request, completion.sample), completion


def _completion(found: Mapping[str, Any]) -> Completion:
    """Raises ValueError, KeyError or TypeError where a line was not written by `Writer.add`."""
    place, tokens = (found["line"], found["sample"]), tuple(found["tokens"])
    logprobs = np.array(found["logprobs"], np.float32)
    if not all(type(number) is int and number >= 0 for number in (*place, *tokens)) or logprobs.shape != (len(tokens),):
        raise ValueError("needed: line and sample, and as many log-probabilities as tokens")
    return Completion(*place, tokens, logprobs, found["finish"], found["stop_token"])
