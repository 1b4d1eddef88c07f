"""`launch/analyze.py similarity`: CKA of models, layer by layer, on files of prompts, in tables and a picture."""

# n prompts, l layers

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from prism_mcore import platform
from prism_mcore.analyze.change import labels
from prism_mcore.analyze.cka import gram, similarities
from prism_mcore.analyze.hidden_states import Tokens, pooled_states
from prism_mcore.analyze.settings import AnalyzeSettings
from prism_mcore.analyze.tables import Row, write_csv, write_parquet
from prism_mcore.checkpoint.durable import write_atomically
from prism_mcore.config import Findings, dump
from prism_mcore.console import progress_bar, say, show
from prism_mcore.convert.online import model_from_hf
from prism_mcore.generate.prompts import read_prompts, tokenizer_of
from prism_mcore.meeting import Meeting
from prism_mcore.model.checks import check_build, check_one_stage
from prism_mcore.model.spec import read_spec
from prism_mcore.parallel import Groups, init_groups

FEWEST = 4  # prompts: two in a half

Grams = dict[str, Tensor]  # of one model: name of a prompt file -> [l + 1, n, n] fp64


@dataclass(frozen=True)
class Asked:
    """What is to be compared on what: names of models and prompt files, and each model's tokens of each file."""

    models: dict[str, Path]  # by name, all that are run
    compared: tuple[str, ...]
    floor: tuple[str, ...]  # the two models that differ in their seed alone
    files: dict[str, Path]
    tokens: dict[str, dict[str, list[Tokens]]]  # by model and file

    @property
    def pairs(self) -> list[tuple[str, str, bool]]:
        """(first, second, whether it is the noise floor)."""
        sides = ((self.compared, False), (self.floor, True))
        return [(*pair, floor) for names, floor in sides for pair in combinations(names, 2)]


def ask(
    models: Sequence[Path], floor: Sequence[Path], files: Sequence[Path], settings: AnalyzeSettings, world_size: int
) -> tuple[Asked, list[str]]:
    """Look at everything before a model is loaded: what is asked, and notes.

    Raises ValueError (SettingsError is one) that names the model or the file and line.
    """
    for given in (models, floor or models):
        if len(set(given)) < max(2, len(given)):
            raise ValueError(f"given: {', '.join(map(str, given))}; needed: at least two models, each once")
    paths, notes = list(dict.fromkeys([*models, *floor])), list[str]()
    names, file_names = labels(paths), labels(list(files))
    named = dict(zip(paths, names, strict=True))
    tokens: dict[str, dict[str, list[Tokens]]] = {}
    for name, path in zip(names, paths, strict=True):
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} has no config.json; give Hugging Face directories (convert_checkpoint.py to-hf)")
        spec, found = read_spec(path), Findings()
        check_build(settings, spec, world_size, found)
        check_one_stage(settings.parallel, spec, found)
        notes += [note for note in found.conclude() if note not in notes]
        tokenizer = tokenizer_of(path, spec)
        read = {name: read_prompts(file, tokenizer, spec)[0] for name, file in zip(file_names, files, strict=True)}
        tokens[name] = {file: [line.tokens for line in lines] for file, lines in read.items()}
    for file, lines in tokens[names[0]].items():
        if len(lines) < FEWEST:
            raise ValueError(f"{file} has {len(lines)} prompts; needed: at least {FEWEST}, better 200")
    compared, seeds = (tuple(named[path] for path in given) for given in (models, floor))
    by_name = dict(zip(names, paths, strict=True)), dict(zip(file_names, files, strict=True))
    return Asked(by_name[0], compared, seeds, by_name[1], tokens), notes


def analyze_similarity(asked: Asked, out: Path, settings: AnalyzeSettings) -> None:
    """Run every model over every prompt and write the tables; every rank calls it.

    Raises ExchangeError for a model that cannot be read, LostRank where another rank is gone.
    """
    device = platform.start(timeout=settings.parallel.timeout)
    groups = init_groups(settings.parallel)
    meeting = Meeting.of_all_ranks(settings.parallel.timeout)
    grams: dict[str, Grams] = {}
    for name, path in asked.models.items():
        (model,) = model_from_hf(path, settings, groups, device)
        total = sum(len(prompts[groups.dp_rank :: groups.dp_size]) for prompts in asked.tokens[name].values())
        with progress_bar(name, total, shown=groups.rank == 0) as advance:

            def before_pass(prompts: int, advance=advance) -> None:
                meeting.working()
                advance(prompts)

            grams[name] = {
                file: gram(states_of_all(model, prompts, groups, meeting, before_pass))
                for file, prompts in asked.tokens[name].items()
            }
        del model
    if groups.rank == 0:
        rows = rows_of(asked, grams, settings)
        _write(asked, rows, out, settings)
    dist.barrier()
    platform.shutdown()


def states_of_all(model, prompts: list[Tokens], groups: Groups, meeting: Meeting, before_pass) -> Tensor:
    """`pooled_states` of all prompts, on every rank, when data-parallel ranks share them out."""
    mine = list(range(groups.dp_rank, len(prompts), groups.dp_size))
    states = pooled_states(model, [prompts[place] for place in mine], before_pass=before_pass)
    meeting.join()  # prompts are unequally long
    if groups.dp_size == 1:
        return states
    everyone = states.new_zeros((len(prompts), *states.shape[1:]))
    everyone[mine] = states
    everyone = everyone.to(next(model.parameters()).device)
    dist.all_reduce(everyone, group=groups.dp)
    return everyone.cpu()


def rows_of(asked: Asked, grams: Mapping[str, Grams], settings: AnalyzeSettings) -> list[Row]:
    """A row for each pair of models, prompt file and layer: 0 is the embedding, the last is after the final norm.

    Where models are of other depths each layer of the first meets the one of the second at the same share of its depth.
    """
    rows: list[Row] = []
    for first, second, floor in asked.pairs:
        for file in asked.files:
            one, other = grams[first][file], grams[second][file]
            depth, other_depth = len(one) - 1, len(other) - 1
            partners = [(2 * layer * other_depth + depth) // (2 * depth) for layer in range(depth + 1)]
            how = {"draws": settings.similarity.draws, "seed": settings.similarity.seed}
            for layer, found in enumerate(similarities(one, other[torch.tensor(partners)], **how)):
                of = {"prompts": file, "first": first, "second": second, "noise_floor": floor}
                at = {"layer": layer, "second_layer": partners[layer], "num_prompts": one.shape[-1]}
                rows.append(of | at | asdict(found))
    return rows


def _write(asked: Asked, rows: list[Row], out: Path, settings: AnalyzeSettings) -> None:
    from prism_mcore.analyze.pictures import draw_similarity  # matplotlib takes a second

    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "similarity.csv", rows)
    write_parquet(out / "similarity.parquet", rows)
    compared = {"models": asked.models, "compared": asked.compared, "floor": asked.floor, "prompts": asked.files}
    write_atomically(out / "similarity.json", json.dumps(compared, indent=1, default=str) + "\n")
    write_atomically(out / "similarity.yaml", dump(settings))
    draw_similarity(out / "similarity.png", rows)
    show(_table(rows))
    say(f"{out}: similarity.csv, .parquet, .json, .yaml, .png")


def _table(rows: list[Row]) -> Table:
    """The least similar layer of every pair and file."""
    table = Table("models", "prompts", "least CKA", "95% interval", "layer", "mean over layers")
    for pair in dict.fromkeys((row["first"], row["second"], row["noise_floor"], row["prompts"]) for row in rows):
        first, second, floor, file = pair
        own = [r for r in rows if (r["first"], r["second"], r["noise_floor"], r["prompts"]) == pair]
        least = min(own, key=lambda row: row["cka"])
        models = f"{first} / {second}" + (" (two seeds)" if floor else "")
        interval = f"{least['low']:.4f} to {least['high']:.4f}"
        mean = sum(row["cka"] for row in own) / len(own)
        table.add_row(models, file, f"{least['cka']:.4f}", interval, str(least["layer"]), f"{mean:.4f}")
    if not any(row["noise_floor"] for row in rows):
        table.caption = "without a noise floor (--floor SEED SEED) a CKA near 1 says little"
    return table
