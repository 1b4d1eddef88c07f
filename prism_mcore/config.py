"""Every setting, typed: a YAML recipe plus dotted overrides becomes `Settings`; `validate` checks the whole of it.

Sections are defined beside the code that reads them and composed here. Nothing here imports torch, so `--help` and a
wrong key answer at once.
"""

import copy
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from prism_mcore.data.settings import DataSettings, normalised_shares
from prism_mcore.generate.settings import GenerateSettings, Sampling
from prism_mcore.model.settings import ModelSettings
from prism_mcore.model.spec import LAYER_NAMES, ModelSpec, read_spec
from prism_mcore.parallel import ParallelSettings, data_parallel_size
from prism_mcore.rewards.settings import RewardSettings
from prism_mcore.rl.settings import RLSettings
from prism_mcore.train.settings import (
    CheckpointSettings,
    GuardSettings,
    LogSettings,
    OptimizerSettings,
    PrecisionSettings,
    RunSettings,
    Section,
    TrainSettings,
)


class SettingsError(ValueError):
    """The settings cannot work; the message lists what was got, what was needed and what to change."""


class Settings(Section):
    """All settings of a run: mid-training reads `data`, RL reads `rl`, `rewards` and `sampling` in its place."""

    run: RunSettings = RunSettings()
    model: ModelSettings = ModelSettings()
    parallel: ParallelSettings = ParallelSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    precision: PrecisionSettings = PrecisionSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    guards: GuardSettings = GuardSettings()
    kernels: dict[str, str] = Field(
        {}, description="Backend per operation where the automatic choice is not wanted, as kernels.<op>=<backend>"
    )
    log: LogSettings = LogSettings()
    rl: RLSettings = RLSettings()
    rewards: RewardSettings = RewardSettings()
    sampling: Sampling = Sampling()
    generate: GenerateSettings = GenerateSettings()

    @property
    def run_dir(self) -> Path:
        """Where this run lives."""
        return Path(self.run.dir) / self.run.name


# --- reading ----------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans: 1e-10 is a number, `off` and `no` are words; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+.0123456789"),
)


def load(recipe: str | Path | None, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a recipe: its bases, then itself, then `a.b=c` overrides whose values are YAML.

    Without a recipe the overrides change the defaults.

    `base:` names one recipe or a list of them, relative to the recipe that says so; later ones win, mappings are merged
    and lists replaced. Raises SettingsError for a file that cannot be read, a cycle of bases, an unknown key (naming
    the nearest valid one) and a value of the wrong type (naming field, got and needed).
    """
    raw = _read_recipe(Path(recipe), ()) if recipe else {}
    for override in overrides:
        _apply_override(raw, override)
    run = raw.setdefault("run", {})
    if recipe and isinstance(run, dict) and not run.get("name"):
        run["name"] = Path(recipe).stem
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError("\n".join(_describe(e) for e in error.errors())) from error


def dump(settings: Settings) -> str:
    """The resolved settings as a YAML recipe that `load` reads back as an equal object."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, width=120)


def resolve_spec(settings: Settings) -> ModelSpec:
    """The shape that `model.spec` names or, without it, that of the Hugging Face directory in `model.init`."""
    source = settings.model.spec or settings.model.init
    if source == "random":
        raise SettingsError(
            "model.init=random needs a shape: set model.spec to a config.json or a shipped shape's name"
        )
    try:
        return read_spec(source)
    except FileNotFoundError as error:
        name = "model.spec" if settings.model.spec else "model.init"
        raise SettingsError(f"{name}: {error}") from error
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _read_recipe(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in readers:
        chain = " -> ".join(str(p) for p in [*readers[readers.index(path) :], path])
        raise SettingsError(f"recipes are each other's base: {chain}")
    try:
        own = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise SettingsError(f"cannot read recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {error}") from error
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise SettingsError(f"{path} holds a {type(own).__name__}; needed: sections such as `train:`")
    bases = own.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise SettingsError(f"{path}: base={bases!r}; needed: a recipe's path or a list of them")
    _check_keys(own, Settings, "", str(path))
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, _read_recipe(path.parent / base, (*readers, path)))
    return _merge(merged, own)


def _merge(below: Any, above: Any) -> Any:
    """Mappings are merged key by key; anything else is replaced."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return copy.deepcopy(above)
    return below | {key: _merge(below.get(key), value) for key, value in above.items()}


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise SettingsError(f"{override!r} is no override; needed: section.name=value, such as train.steps=100")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SettingsError(f"{override!r}: the value is not YAML: {error}") from error
    parts = name.split(".")
    _check_path(name, parts)
    place: Any = raw
    for depth, part in enumerate(parts[:-1]):
        place = _step_into(place, part, ".".join(parts[: depth + 1]))
    _assign(place, parts[-1], value, name)


def _check_path(name: str, parts: list[str]) -> None:
    """Refuse an override whose dotted name leads nowhere."""
    nested: Any = None
    for part in reversed(parts):
        nested = [nested] if part.isdigit() else {part: nested}
    _check_keys(nested, Settings, "", "command line")


def _step_into(place: Any, part: str, name: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, name)]
    if not isinstance(place.get(part), dict | list):
        place[part] = {}
    return place[part]


def _assign(place: Any, part: str, value: Any, name: str) -> None:
    if isinstance(place, list):
        place[_index(place, part, name)] = value
    else:
        place[part] = _merge(place.get(part), value)


def _index(place: list[Any], part: str, name: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise SettingsError(f"{name}: the list has {len(place)} elements, 0 to {len(place) - 1}")
    return int(part)


def _check_keys(raw: Any, model: type[BaseModel], prefix: str, source: str) -> None:
    """Refuse the first key that is no setting, naming the nearest that is."""
    if not isinstance(raw, dict):
        return  # a wrong type: pydantic reports it
    for key, value in raw.items():
        name = f"{prefix}{key}"
        field = model.model_fields.get(str(key))
        if field is None:
            while isinstance(value, dict) and value:  # name a setting, not just its section
                key, value = next(iter(value.items()))
                name = f"{name}.{key}"
            raise SettingsError(f"{source}: there is no setting {name}; nearest: {_nearest(name)}")
        nested = _section_of(field.annotation)
        if nested is None:
            continue
        elements = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, element in elements:
            _check_keys(element, nested, f"{name}." if index is None else f"{name}.{index}.", source)


def _nearest(name: str) -> str:
    """The valid dotted name most like `name`; one in another section with the same last part comes first."""
    names = [dotted for dotted, _ in walk_fields()] if "." in name else list(Settings.model_fields)
    same_leaf = [dotted for dotted in names if dotted.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    return difflib.get_close_matches(name, same_leaf or names, n=1, cutoff=0.0)[0]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section behind a field: a model, or the model a list is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) is list:
        return _section_of(typing.get_args(annotation)[0])
    return None


def walk_fields(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as (dotted name, field); elements of a list are called <n>."""
    for key, field in model.model_fields.items():
        name = f"{prefix}{key}"
        nested = _section_of(field.annotation)
        in_list = nested is not None and nested is not field.annotation
        if nested is None or in_list:
            yield name, field
        if nested is not None:
            yield from walk_fields(nested, f"{name}.<n>." if in_list else f"{name}.")


def _describe(error: Any) -> str:
    # pydantic adds parts such as "list[int]" for the members of a union
    name = ".".join(part for part in map(str, error["loc"]) if part.isidentifier() or part.isdigit())
    if error["type"] == "missing":
        return f"{name} is not set; needed: a value in the recipe or {name}=... on the command line"
    return f"{name}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


# --- help -------------------------------------------------------------------------------------------------------------


def help_text() -> str:
    """Every setting with its dotted name, type, default and meaning, section by section."""
    lines = []
    for section, field in Settings.model_fields.items():
        model = _section_of(field.annotation)
        lines.append(f"{section}: {(model.__doc__ or '').splitlines()[0]}" if model else f"{section}:")
        for name, entry in walk_fields(model, f"{section}.") if model else [(section, field)]:
            lines.append(f"  {name} ({_type_name(entry.annotation)}{_default_text(entry)})")
            lines.append(f"      {entry.description}")
        lines.append("")
    return "\n".join(lines)


def _default_text(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    return ", required" if default is PydanticUndefined else f", default {_plain(default)}"


def _plain(value: Any) -> str:
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(args[0])
    if origin is Literal:
        return "|".join(str(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in args)
    if origin is list:
        return "list of " + _type_name(args[0])
    if origin is tuple:
        return "[" + ", ".join(_type_name(arg) for arg in args) + "]"
    if origin is dict:
        return "op: backend"
    if annotation is type(None):
        return "null"
    return "mapping" if issubclass(annotation, BaseModel) else annotation.__name__


# --- checking ---------------------------------------------------------------------------------------------------------


def validate(settings: Settings, spec: ModelSpec, world_size: int) -> list[str]:
    """Check the whole of the settings against the model and the number of ranks; pure, before any process group.

    Returns notes on what is worth knowing. Raises one SettingsError that lists every problem, each with what was got,
    what was needed and, where there is one, the nearest value that works.
    """
    problems: list[str] = []
    notes: list[str] = []
    _check_world(settings, world_size, problems)
    _check_tensor_parallel(settings, spec, problems, notes)
    _check_pipeline(settings, spec, world_size, problems)
    _check_sequence(settings, spec, problems, notes)
    _check_schedule(settings, notes)
    _check_sources(settings, problems, notes)
    _check_model(settings, spec, problems, notes)
    if problems:
        raise SettingsError("\n".join(problems))
    return notes


def validate_rl(settings: Settings, spec: ModelSpec, world_size: int) -> list[str]:
    """`validate` for an RL run, which reads `rl` and `sampling` where mid-training reads `data`."""
    problems: list[str] = []
    notes: list[str] = []
    _check_ranks(settings, world_size, problems)
    _check_tensor_parallel(settings, spec, problems, notes)
    _check_no_pipeline(settings, problems)
    _check_context(settings, spec, problems, notes)
    _check_rollouts(settings, problems, notes)
    _check_stop_ids(settings, spec, problems)
    _check_schedule(settings, notes)
    _check_model(settings, spec, problems, notes)
    if problems:
        raise SettingsError("\n".join(problems))
    return notes


def validate_generation(settings: Settings, spec: ModelSpec, world_size: int) -> list[str]:
    """`validate` for a run that only generates."""
    problems: list[str] = []
    notes: list[str] = []
    _check_ranks(settings, world_size, problems)
    _check_tensor_parallel(settings, spec, problems, notes)
    _check_no_pipeline(settings, problems)
    _check_stop_ids(settings, spec, problems)
    _check_model(settings, spec, problems, notes)
    if problems:
        raise SettingsError("\n".join(problems))
    return notes


def num_micro_batches(settings: Settings, world_size: int) -> int:
    """Forward passes of one data-parallel rank in a step; needs validated settings."""
    return settings.train.global_batch // (
        settings.train.micro_batch * data_parallel_size(settings.parallel, world_size)
    )


def _check_model(settings: Settings, spec: ModelSpec, problems: list[str], notes: list[str]) -> None:
    if settings.precision.fp8 != "off":
        problems.append(f"precision.fp8={settings.precision.fp8} is not supported yet; use precision.fp8=off")
    _check_initial_weights(settings, spec, problems, notes)
    unused = [kind for kind in settings.train.recompute if kind not in {LAYER_NAMES[c] for c in spec.pattern}]
    if unused:
        notes.append(f"train.recompute names {', '.join(unused)}: the model has no such sub-layer")


def _check_initial_weights(settings: Settings, spec: ModelSpec, problems: list[str], notes: list[str]) -> None:
    """Where model.spec and the config.json beside the weights say different things, a run computes the first."""
    init = Path(settings.model.init)
    if settings.model.spec is None or not (init / "config.json").is_file():
        return
    try:
        differences = spec.differences(read_spec(init))
    except ValueError as error:
        problems.append(str(error))
    else:
        listed = ", ".join(f"{name}={ours} (there {theirs})" for name, (ours, theirs) in differences.items())
        if listed:
            notes.append(f"model.spec is not {init}/config.json, which exports of the run will have: {listed}")


def _check_ranks(settings: Settings, world_size: int, problems: list[str]) -> int | None:
    """The data-parallel size, or None where the ranks do not fit."""
    parallel = settings.parallel
    if parallel.cp > 1:
        problems.append(f"parallel.cp={parallel.cp}: context parallelism is not supported yet; use parallel.cp=1")
    ranks = parallel.tp * parallel.pp * parallel.cp
    if world_size % ranks:
        problems.append(
            f"{world_size} ranks are not a multiple of tp*pp*cp={ranks}; {_nearest_multiples(world_size, ranks)}"
        )
        return None
    dp = world_size // ranks
    if dp % parallel.optimizer_instances:
        divisors = [n for n in range(1, dp + 1) if dp % n == 0]
        problems.append(
            f"parallel.optimizer_instances={parallel.optimizer_instances} does not divide the {dp} data-parallel ranks;"
            f" try {_or(_closest(divisors, parallel.optimizer_instances))}"
        )
    return dp


def _check_world(settings: Settings, world_size: int, problems: list[str]) -> None:
    train, dp = settings.train, _check_ranks(settings, world_size, problems)
    if dp is None:
        return
    step = train.micro_batch * dp
    if train.global_batch % step:
        problems.append(
            f"train.global_batch={train.global_batch} is not a multiple of micro_batch*dp={step};"
            f" {_nearest_multiples(train.global_batch, step)}"
        )


def _check_tensor_parallel(settings: Settings, spec: ModelSpec, problems: list[str], notes: list[str]) -> None:
    tp = settings.parallel.tp
    counts = {"attention heads": spec.num_heads, "key/value heads": spec.num_kv_heads, "MLP columns": spec.ffn_size}
    if "M" in spec.pattern:
        counts["Mamba heads"] = spec.mamba_num_heads
        if spec.ssm_groups > 1:  # one group is replicated, several are dealt out whole
            counts["SSM groups"] = spec.ssm_groups
    for what, count in counts.items():
        if count % tp:
            nearest = _or(_closest(_divisors(count), tp))
            problems.append(f"parallel.tp={tp} does not divide the model's {count} {what}; try {nearest}")
    padding = -spec.vocab_size % tp
    if padding:
        notes.append(f"vocabulary of {spec.vocab_size} is padded by {padding} rows to a multiple of tp={tp}")


def _check_pipeline(settings: Settings, spec: ModelSpec, world_size: int, problems: list[str]) -> None:
    parallel, layers = settings.parallel, len(spec.pattern)
    chunks = parallel.pp * parallel.vpp
    if parallel.vpp > 1 and parallel.pp == 1:
        problems.append(f"parallel.vpp={parallel.vpp} needs a pipeline; set parallel.pp > 1 or parallel.vpp=1")
    if layers < chunks:
        problems.append(f"pp*vpp={chunks} chunks are more than the model's {layers} sub-layers; use at most {layers}")
    if parallel.split != "auto":
        if len(parallel.split) != chunks:
            problems.append(f"parallel.split has {len(parallel.split)} numbers; needed: pp*vpp={chunks}, or auto")
        if sum(parallel.split) != layers:
            problems.append(f"parallel.split sums to {sum(parallel.split)}; needed: the model's {layers} sub-layers")
        if any(count < 1 for count in parallel.split):
            problems.append(f"parallel.split={parallel.split} leaves a chunk empty; needed: at least 1 sub-layer each")
    ranks = parallel.tp * parallel.pp * parallel.cp
    step = settings.train.micro_batch * max(world_size // ranks, 1)
    if parallel.vpp > 1 and parallel.pp > 1 and settings.train.global_batch % step == 0:
        micro_batches = settings.train.global_batch // step
        if micro_batches % parallel.pp:
            problems.append(
                f"interleaving (vpp={parallel.vpp}) needs a multiple of pp={parallel.pp} micro-batches per step, got"
                f" {micro_batches}; for train.global_batch,"
                f" {_nearest_multiples(settings.train.global_batch, step * parallel.pp)}"
            )


def _check_sequence(settings: Settings, spec: ModelSpec, problems: list[str], notes: list[str]) -> None:
    parallel, seq_len = settings.parallel, settings.data.seq_len
    if parallel.sequence_parallel and parallel.tp == 1:
        problems.append("parallel.sequence_parallel=true needs parallel.tp > 1; set it to false")
    elif parallel.sequence_parallel and seq_len % parallel.tp:
        problems.append(
            f"data.seq_len={seq_len} is not a multiple of tp={parallel.tp}, which sequence_parallel needs;"
            f" {_nearest_multiples(seq_len, parallel.tp)}"
        )
    if seq_len > spec.max_positions:
        excess = f"data.seq_len={seq_len} is longer than the model's {spec.max_positions} positions"
        if spec.position == "rope":
            problems.append(f"{excess}; use at most {spec.max_positions}, or a config.json with more positions")
        else:
            notes.append(f"{excess}; it has no position embedding, so nothing breaks, but it was not trained on it")


def _check_no_pipeline(settings: Settings, problems: list[str]) -> None:
    parallel = settings.parallel
    if parallel.pp > 1 or parallel.vpp > 1:
        problems.append(
            f"parallel.pp={parallel.pp}, vpp={parallel.vpp}: rollouts are generated on one stage; use pp=1 and vpp=1,"
            " and more tp where the model does not fit"
        )


def _check_context(settings: Settings, spec: ModelSpec, problems: list[str], notes: list[str]) -> None:
    context, longest = settings.rl.context, settings.sampling.max_tokens
    if settings.parallel.sequence_parallel and settings.parallel.tp == 1:
        problems.append("parallel.sequence_parallel=true needs parallel.tp > 1; set it to false")
    if longest >= context:
        problems.append(
            f"sampling.max_tokens={longest} leaves no room for a prompt in rl.context={context}; lower the one or raise"
            " the other"
        )
    if context > spec.max_positions:
        excess = f"rl.context={context} is longer than the model's {spec.max_positions} positions"
        if spec.position == "rope":
            problems.append(f"{excess}; use at most {spec.max_positions}, or a config.json with more positions")
        else:
            notes.append(f"{excess}; it has no position embedding, so nothing breaks, but it was not trained on it")


def _check_rollouts(settings: Settings, problems: list[str], notes: list[str]) -> None:
    rl, sampling = settings.rl, settings.sampling
    if not rl.prompts:
        problems.append("rl.prompts is empty; give at least one {path, weight, name}")
    elif sum(source.weight for source in rl.prompts) <= 0:
        problems.append(f"rl.prompts: all {len(rl.prompts)} weights are 0; at least one must be positive")
    if sampling.samples < 2:
        problems.append(f"sampling.samples={sampling.samples}: a group needs at least 2 to compare; the paper has 16")
    if sampling.temperature == 0:
        problems.append("sampling.temperature=0 gives a group of equal rollouts; use 1.0")
    if rl.prompts_per_step % rl.updates:
        problems.append(
            f"rl.prompts_per_step={rl.prompts_per_step} cannot be dealt over rl.updates={rl.updates};"
            f" {_nearest_multiples(rl.prompts_per_step, rl.updates)}"
        )
    if settings.guards.spike_threshold:
        problems.append(
            f"guards.spike_threshold={settings.guards.spike_threshold}: a policy loss lies around 0, so that no"
            " multiple of it is a spike; set it to 0"
        )
    if sampling.seed:
        notes.append(f"sampling.seed={sampling.seed} changes nothing: rollouts are drawn by run.seed")
    if sampling.top_k or sampling.top_p < 1:
        notes.append("sampling.top_k and top_p: log-probs are those before them, so the policy gradient is biased")
    if rl.reference_every and not rl.kl_coefficient:
        notes.append("rl.reference_every changes nothing: without rl.kl_coefficient there is no reference")


def _check_stop_ids(settings: Settings, spec: ModelSpec, problems: list[str]) -> None:
    unknown = [token for token in settings.sampling.stop_ids if not 0 <= token < spec.vocab_size]
    if unknown:
        problems.append(
            f"sampling.stop_ids holds {unknown[0]}; needed: ids from 0 to {spec.vocab_size - 1}, the model's vocabulary"
        )


def _check_schedule(settings: Settings, notes: list[str]) -> None:
    optimizer, steps = settings.optimizer, settings.train.steps
    if optimizer.warmup_steps >= steps:
        notes.append(f"optimizer.warmup_steps={optimizer.warmup_steps} of {steps} steps: lr is never reached")
    decay = round(optimizer.decay_fraction * steps)
    if optimizer.schedule == "wsd" and optimizer.warmup_steps + decay > steps:
        notes.append(f"wsd decays over the last {decay} steps, which start inside the warm-up: lr is never held")


def _check_sources(settings: Settings, problems: list[str], notes: list[str]) -> None:
    try:
        _, note = normalised_shares(settings.data.sources)
    except ValueError as error:
        problems.append(str(error))
    else:
        notes.extend([note] if note else [])


def _nearest_multiples(value: int, of: int) -> str:
    below = value // of * of
    return f"try {below} or {below + of}" if below else f"try {of}"


def _divisors(value: int) -> list[int]:
    return [n for n in range(1, value + 1) if value % n == 0]


def _closest(values: list[int], to: int) -> list[int]:
    """The largest of `values` below `to` and the smallest above it."""
    return [v for v in values if v < to][-1:] + [v for v in values if v > to][:1]


def _or(values: list[int]) -> str:
    return " or ".join(str(value) for value in values)
