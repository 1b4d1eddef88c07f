"""What the launchers share: arguments, the number of ranks, one message for all ranks, the exit code and its file."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

from prism_mcore.config import Kind, SettingsError, help_text, load
from prism_mcore.console import say
from prism_mcore.evaluate.settings import EvaluateSettings, ScoreSettings
from prism_mcore.exit_codes import BAD_SETTINGS, DONE, STOPPED_BY_SIGNAL
from prism_mcore.generate.settings import GenerateSettings
from prism_mcore.model.settings import resolve_spec
from prism_mcore.model.spec import ModelSpec, read_spec
from prism_mcore.parallel import ParallelSettings
from prism_mcore.program import record_exit_code
from prism_mcore.rl.settings import RLSettings
from prism_mcore.train.settings import LoopSettings, MidtrainSettings

# Each one's settings; a key of another than the one that runs is an error that says whose it is.
PROGRAMS = (MidtrainSettings, RLSettings, GenerateSettings, ScoreSettings, EvaluateSettings)


Loop = TypeVar("Loop", bound=LoopSettings)
OfModel = TypeVar(
    "OfModel", GenerateSettings, ScoreSettings, EvaluateSettings
)  # programs that run a Hugging Face directory's model


class _Parser(argparse.ArgumentParser):
    """Says what is wrong once for all ranks, and leaves the exit code for the script that decides about a restart."""

    def error(self, message: str) -> NoReturn:
        record_exit_code(BAD_SETTINGS)
        if rank() > 0:
            sys.exit(BAD_SETTINGS)
        super().error(message)


def recipe_parser(kind: type[LoopSettings], description: str) -> argparse.ArgumentParser:
    """--recipe, --dry-run, --gpus and settings; --help explains every setting."""
    usage = "[--recipe FILE] [--dry-run [--gpus N]] [section.name=value ...]"
    parser = _parser(kind, usage, description)
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="YAML file with settings; without, run.name is needed"
    )
    parser.add_argument(
        "--gpus", type=positive, metavar="N", help="ranks to plan for; default WORLD_SIZE, else the fewest that work"
    )
    return parser


def hf_parser(
    kind: type[Kind], usage: str, description: str | None, out: str = "FILE", needs_hf: bool = True
) -> argparse.ArgumentParser:
    """--hf, --out, --dry-run and settings, for programs that run a Hugging Face directory's model.

    needs_hf: they always do.
    """
    parser = _parser(kind, f"--hf DIR {usage} --out {out} [--dry-run] [section.name=value ...]", description)
    parser.add_argument(
        "--hf", type=Path, required=needs_hf, metavar="DIR", help="Hugging Face directory with the model"
    )
    what = "file to write" if out == "FILE" else "folder to write to; made where it is missing"
    parser.add_argument("--out", type=Path, required=True, metavar=out, help=what)
    return parser


def _parser(kind: type[Kind], usage: str, description: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        usage=f"torchrun [...] {kind.program} {usage}",
        description=description,
        epilog=f"settings, as section.name=value with YAML values:\n\n{help_text(kind)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what it will take, no more")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="settings; see below")
    return parser


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}; needs at least 1")
    return value


@dataclass(frozen=True)
class Launch(Generic[Kind]):
    """What is to be started: a program's settings, its model, its ranks, and notes on what is worth knowing."""

    settings: Kind
    spec: ModelSpec
    world_size: int
    notes: list[str]


def read_recipe(
    kind: type[Loop], arguments: argparse.Namespace, check: Callable[[Loop, ModelSpec, int], list[str]]
) -> Launch[Loop]:
    """What `recipe_parser`'s arguments ask for, checked. Raises SettingsError."""
    notes: list[str] = []
    settings = load(kind, arguments.recipe, arguments.overrides, others=PROGRAMS, notes=notes)
    choose_cuda_queues(settings.parallel)
    spec = resolve_spec(settings.model)
    world_size = planned_ranks(settings.parallel, arguments.dry_run, arguments.gpus)
    return Launch(settings, spec, world_size, notes + check(settings, spec, world_size))


def read_hf(kind: type[OfModel], arguments: argparse.Namespace) -> Launch[OfModel]:
    """What `hf_parser`'s arguments ask for; the program checks it when it has read its input.

    Raises SettingsError, and ValueError for a model that is not there or cannot be run, and an output that cannot be.
    """
    notes: list[str] = []
    settings = load(kind, None, arguments.overrides, others=PROGRAMS, notes=notes)
    choose_cuda_queues(settings.parallel)
    if not arguments.out.parent.is_dir():
        raise ValueError(f"--out {arguments.out}: there is no folder {arguments.out.parent}; make it first")
    if not (arguments.hf / "config.json").is_file():
        raise ValueError(f"--hf {arguments.hf}: there is no config.json; give the model's Hugging Face directory")
    return Launch(settings, read_spec(arguments.hf), planned_ranks(settings.parallel, arguments.dry_run), notes)


def choose_cuda_queues(parallel: ParallelSettings) -> None:
    """One hardware queue under tensor parallelism, else 32, before CUDA starts; what a person sets wins.

    With one, communication that overlaps a tensor-parallel product starts before it, as it was issued. With many,
    data-parallel communication runs beside kernels; NVIDIA's recipes of 8B models without TP take 32.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1" if parallel.tp > 1 else "32")


def refuse(recipe: Path | None, error: SettingsError) -> int:
    """Say once that settings do not work, and record it; returns the exit code."""
    if rank() == 0:
        where = f"{recipe}: " if recipe else ""
        say(f"{where}the settings do not work:\n{error}", stderr=True)
    return BAD_SETTINGS


def print_notes(notes: Sequence[str]) -> None:
    """What a check notes, once."""
    if rank() == 0:
        for note in notes:
            say(f"note: {note}")


def planned_ranks(parallel: ParallelSettings, dry_run: bool, gpus: int | None = None) -> int:
    """Ranks torchrun started; for a dry run --gpus first, and outside torchrun the fewest that the layout can have."""
    fewest = parallel.tp * parallel.pp * lcm(parallel.cp, parallel.optimizer_instances)
    started = int(os.environ.get("WORLD_SIZE", fewest if dry_run else 1))
    return gpus if dry_run and gpus else started


def rank() -> int:
    """This process among those torchrun started."""
    return int(os.environ.get("RANK", "0"))


def complain(error: Exception, code: int) -> int:
    """Say once what every rank found, without the tracebacks of all of them; returns the code."""
    if rank() == 0:
        say(f"error: {error}", stderr=True)
    return code


def leave(code: int) -> NoReturn:
    """End this process with the code, and record it.

    After an error at once: threads of process groups that nobody could close turn an orderly end into an abort (-6).
    """
    record_exit_code(code)
    if code not in (DONE, STOPPED_BY_SIGNAL):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
