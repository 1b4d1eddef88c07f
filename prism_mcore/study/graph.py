"""From a study's settings to its nodes: what each runs, needs and leaves."""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from prism_mcore.config import ProgramSettings, SettingsError, load
from prism_mcore.evaluate.settings import EvaluateSettings
from prism_mcore.model.settings import resolve_spec
from prism_mcore.rl.checks import check as check_rl
from prism_mcore.rl.settings import RLSettings
from prism_mcore.study.checks import models_of, seeds_of, starts
from prism_mcore.study.settings import MODEL, Arm, Ingredient, StudyProgram
from prism_mcore.train.checks import check as check_midtrain
from prism_mcore.train.settings import MidtrainSettings

PROGRAMS = (MidtrainSettings, RLSettings, EvaluateSettings)
REPORT = "report"
Kind = Literal["prepare", "midtrain", "rl", "merge", "evaluate", "analyze", "report"]
TrainingSettings = MidtrainSettings | RLSettings


@dataclass(frozen=True)
class Command:
    """A process without a shell. `launch/x.py` may have several ranks; `replaces` is removed before it starts."""

    argv: tuple[str, ...]  # from the program on: ("launch/midtrain.py", "--recipe", ...)
    ranks: int = 1
    replaces: Path | None = None


@dataclass(frozen=True)
class Node:
    """`mcs.hybrid.s0` for an arm, `sums.mcs.hybrid.s0` for an evaluation of it.

    outputs: what must be there when it is done; the first is what others read, and its hash is their input's.
    """

    name: str
    kind: Kind
    folder: Path
    commands: tuple[Command, ...]
    needs: tuple[str, ...]
    outputs: tuple[Path, ...]
    label: str  # what it has in common with its siblings: the arm, evaluation or analysis
    model: str = ""
    seed: int | None = None
    recipe: str = ""  # resolved, what differs from the defaults: a changed base is a changed recipe
    settings: TrainingSettings | None = field(default=None, compare=False)

    @property
    def ranks(self) -> int:
        return max((command.ranks for command in self.commands), default=1)


def folder_of(study: StudyProgram) -> Path:
    return Path(study.study.dir) / study.study.name


def build(study: StudyProgram, recipe: Path) -> dict[str, Node]:
    """All nodes by name, each after those it needs. Raises SettingsError, naming the arm, where a run cannot work."""
    nodes: dict[str, Node] = {}
    place = folder_of(study) / "nodes"
    for name, preparation in study.prepare.items():
        python, *rest = preparation.command
        argv = tuple(rest) if python == "python" else (python, *rest)
        outputs = tuple(Path(output) for output in preparation.outputs)
        nodes[name] = Node(name, "prepare", place / name, (Command(argv),), tuple(nodes), outputs, name)
    builder = _Builder(study, recipe.resolve().parent, place, tuple(nodes))
    for arm in _in_order(study):
        for model in models_of(study.arms[arm], study):
            for seed in seeds_of(study.arms[arm], study):
                node = builder.train(arm, model, seed)
                nodes[node.name] = node
    for node in (*builder.evaluations(nodes), *builder.analyses(nodes)):
        nodes[node.name] = node
    nodes = _by_seed(study, nodes)
    if len(nodes) < builder.made + len(study.prepare):
        raise SettingsError("two nodes have the same name; call prepare, arms, evaluate and analyze differently")
    folder = place / REPORT
    argv = ("launch/study.py", "--recipe", str(recipe), "report")
    needs = tuple(nodes)
    nodes[REPORT] = Node(
        REPORT,
        "report",
        folder,
        (Command(argv),),
        needs,
        (folder / "out" / "report.json",),
        REPORT,
        recipe=differing(study),
    )
    return nodes


def _by_seed(study: StudyProgram, nodes: dict[str, Node]) -> dict[str, Node]:
    """Seed by seed and model by model, each with its evaluations: what is there when half of it is done can be read."""
    models = list(study.models)

    def place(node: Node) -> tuple[int, int]:
        return (-1, -1) if node.seed is None else (study.seeds.index(node.seed), models.index(node.model))

    return {node.name: node for node in sorted(nodes.values(), key=place)}


def _in_order(study: StudyProgram) -> list[str]:
    """Arms, each after those it starts from."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name != MODEL and name not in order:
            for start in starts(study.arms[name]):
                visit(start)
            order.append(name)

    for name in study.arms:
        visit(name)
    return order


class _Builder:
    """Makes nodes; `weights` is where each arm's Hugging Face directory will be."""

    def __init__(self, study: StudyProgram, base: Path, place: Path, prepared: tuple[str, ...]):
        self.study, self.base, self.place, self.prepared = study, base, place, prepared
        self.made = 0

    def train(self, name: str, model: str, seed: int) -> Node:
        arm = self.study.arms[name]
        node_name = f"{name}.{model}.s{seed}"
        self.made += 1
        if arm.program == "merge":
            return self._merge(arm, name, node_name, model, seed)
        folder = self.place / node_name
        program, recipes, settings = self._ingredients(arm, model)
        ranks = arm.ranks or getattr(self.study.models[model].ranks, arm.program)
        settings = [f"run.name={node_name}", f"run.dir={self.place}", f"run.seed={seed}", *settings]
        from_random = arm.start == MODEL and arm.program == "midtrain"
        if not from_random:
            settings.append(f"model.init={self._weights(arm.start, model, seed)}")
        resolved = resolve(program, recipes, settings, f"arms.{name} of {model}")
        _check(resolved, ranks, f"arms.{name} of {model}")
        from_random = from_random and resolved.model.init == "random"
        joined = self.place.parent / "recipes" / f"{node_name}.yaml"
        export = ["tools/convert_checkpoint.py", "to-hf", str(folder), str(folder / "hf")]
        if from_random:
            if not self.study.study.tokenizer:
                raise SettingsError(f"{model} starts from random weights: set study.tokenizer to a folder with one")
            export += ["--tokenizer", self.study.study.tokenizer]
        commands = (
            Command((f"launch/{arm.program}.py", "--recipe", str(joined), *settings), ranks),
            Command(tuple(export), replaces=folder / "hf"),
        )
        needs = (*self.prepared, *self._starts(arm, model, seed))
        outputs = (folder / "hf", folder / "metrics.jsonl")
        return Node(
            node_name, arm.program, folder, commands, needs, outputs, name, model, seed,
            differing(resolved), resolved,
        )  # fmt: skip

    def _merge(self, arm: Arm, name: str, node_name: str, model: str, seed: int) -> Node:
        folder = self.place / node_name
        parts = [f"{self._weights(start, model, seed)}:{weight}" for start, weight in arm.merge.items()]
        argv = ("tools/merge_checkpoints.py", *parts, "--out", str(folder / "hf"))
        needs = (*self.prepared, *self._starts(arm, model, seed))
        command = Command(argv, replaces=folder / "hf")
        return Node(node_name, "merge", folder, (command,), needs, (folder / "hf",), name, model, seed)

    def _ingredients(self, arm: Arm, model: str) -> tuple[type[Any], list[Path], list[str]]:
        """Program, recipes and settings: the model's, the mixture's, then the arm's own."""
        entry = self.study.models[model]
        parts: list[Ingredient | Arm] = [entry.midtrain if arm.program == "midtrain" else entry.rl]
        parts += [self.study.mixtures[arm.mixture]] if arm.mixture else []
        parts += [self.study.rl_mixes[arm.rl_mix]] if arm.rl_mix else []
        recipes: list[Path] = []
        settings: list[str] = []
        for part in (*parts, arm):
            files = [part.recipe] if isinstance(part.recipe, str) else part.recipe
            recipes += [self.base / file for file in files]
            settings += part.settings
        return (MidtrainSettings if arm.program == "midtrain" else RLSettings), recipes, settings

    def _weights(self, start: str, model: str, seed: int) -> Path:
        """The Hugging Face directory of an arm, or of the model as it is given."""
        if start != MODEL:
            return self.place / f"{start}.{model}.s{seed}" / "hf"
        entry = self.study.models[model].midtrain
        files = [entry.recipe] if isinstance(entry.recipe, str) else entry.recipe
        recipes = [self.base / file for file in files]
        resolved = resolve(MidtrainSettings, recipes, ["run.name=x", *entry.settings], f"models.{model}")
        if resolved.model.init == "random":
            raise SettingsError(f"models.{model} starts from random weights: there is nothing to merge or evaluate")
        return Path(resolved.model.init)

    def _starts(self, arm: Arm, model: str, seed: int) -> list[str]:
        return [f"{start}.{model}.s{seed}" for start in starts(arm) if start != MODEL]

    def evaluations(self, nodes: dict[str, Node]) -> Iterator[Node]:
        for name, entry in self.study.evaluate.items():
            for arm, model, seed in self._runs(entry.of or list(self.study.arms)):
                node_name = f"{name}.{arm}.{model}.s{seed}"
                folder = self.place / node_name
                argv = ["launch/evaluate.py", "--hf", str(self._weights(arm, model, seed))]
                argv += ["--tasks", ",".join(entry.tasks), "--out", str(folder / "out"), *entry.settings]
                load(
                    EvaluateSettings, None, entry.settings, others=PROGRAMS
                )  # a wrong one is found before anything runs
                command = Command(tuple(argv), self.study.models[model].ranks.evaluate)
                needs = self.prepared if arm == MODEL else (*self.prepared, f"{arm}.{model}.s{seed}")
                self.made += 1
                outputs = (folder / "out" / "results.json",)
                yield Node(node_name, "evaluate", folder, (command,), needs, outputs, f"{name} of {arm}", model, seed)

    def analyses(self, nodes: dict[str, Node]) -> Iterator[Node]:
        for name, entry in self.study.analyze.items():
            for _, model, seed in self._runs(entry.of[-1:]):
                if not all(arm == MODEL or f"{arm}.{model}.s{seed}" in nodes for arm in entry.of):
                    continue
                node_name = f"{name}.{model}.s{seed}"
                folder = self.place / node_name
                models = [str(self._weights(arm, model, seed)) for arm in entry.of]
                argv = ("launch/analyze.py", entry.what, *models, "--out", str(folder / "out"), *entry.arguments)
                needs = (*self.prepared, *(f"{arm}.{model}.s{seed}" for arm in entry.of if arm != MODEL))
                self.made += 1
                yield Node(node_name, "analyze", folder, (Command(argv),), needs, (folder / "out",), name, model, seed)

    def _runs(self, arms: Sequence[str]) -> Iterator[tuple[str, str, int]]:
        for arm in arms:
            entry = self.study.arms.get(arm)
            for model in models_of(entry, self.study) if entry else self.study.models:
                for seed in seeds_of(entry, self.study) if entry else self.study.seeds[:1]:
                    yield arm, model, seed


def resolve(program: type[Any], recipes: Sequence[Path], settings: Sequence[str], what: str) -> Any:
    """A program's settings from recipes that are joined. Raises SettingsError that begins with `what`."""
    folder = Path(tempfile.mkdtemp(prefix="study-"))
    try:
        joined = write_joined(folder / "joined.yaml", recipes)
        return load(program, joined, settings, others=PROGRAMS)
    except SettingsError as error:
        raise SettingsError(f"{what}: {error}") from error
    finally:
        shutil.rmtree(folder)


def differing(settings: ProgramSettings) -> str:
    """What differs from the defaults: a later version's new setting makes no finished run another one."""
    return yaml.safe_dump(settings.model_dump(mode="json", exclude_defaults=True), width=1000)


def write_joined(path: Path, recipes: Sequence[Path]) -> Path:
    """A recipe with nothing of its own."""
    path.write_text(yaml.safe_dump({"base": [str(recipe.resolve()) for recipe in recipes]}))
    return path


def write_recipes(study: StudyProgram, recipe: Path, nodes: dict[str, Node]) -> None:
    """The joined recipes that the nodes' commands name."""
    folder = folder_of(study) / "recipes"
    folder.mkdir(exist_ok=True)
    builder = _Builder(study, recipe.resolve().parent, folder, ())
    for node in nodes.values():
        if node.settings is not None:
            write_joined(folder / f"{node.name}.yaml", builder._ingredients(study.arms[node.label], node.model)[1])


def _check(settings: TrainingSettings, ranks: int, what: str) -> None:
    """What the launcher would refuse, where the model's shape is known by now."""
    if settings.model.spec is None and not Path(settings.model.init).exists():
        return  # a directory that an earlier node writes, or that is yet to be brought here
    try:
        spec = resolve_spec(settings.model)
        if isinstance(settings, MidtrainSettings):
            check_midtrain(settings, spec, ranks)
        else:
            check_rl(settings, spec, ranks)
    except SettingsError as error:
        raise SettingsError(f"{what}: {error}") from error


def full_argv(command: Command) -> list[str]:
    """As it is started on this machine."""
    if command.argv[0].endswith(".py"):
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(command.ranks)]
        return [sys.executable, *(ranks if command.ranks > 1 else []), *command.argv]
    return list(command.argv)
