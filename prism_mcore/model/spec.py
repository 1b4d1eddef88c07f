"""ModelSpec: the shape of a model, read from a Hugging Face `config.json` as it lies on disk.

The file is read as plain JSON, in the older and in transformers 5's key style, never through `AutoConfig`. Every key is
either read, checked against the one value this engine computes, or listed as one that changes no number; a key that is
none of these is an error that names it, so that nothing about a model is silently dropped. What the keys of a family
mean is said by its file in `families/`.
"""

import importlib
import json
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn

SHIPPED = Path(__file__).parent / "configs"

MAMBA, ATTENTION, MLP = "M", "*", "-"
LAYER_NAMES = {MAMBA: "mamba", ATTENTION: "attention", MLP: "mlp"}

INITIAL_VALUES = {"initializer_range", "dt_min", "dt_max", "dt_floor"}  # of a spec: only random weights depend on them


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling (transformers `_compute_llama3_parameters`); all factors come from the file."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def as_config(self) -> dict[str, Any]:
        """The same under the keys of a config.json."""
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_positions,
        }


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071; transformers `_compute_yarn_parameters`): low frequencies interpolated by `factor`."""

    factor: float
    original_max_positions: int
    attention_factor: float  # queries and keys are multiplied by it
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @staticmethod
    def usual_attention_factor(factor: float) -> float:
        """What a config.json means that does not say."""
        return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0

    def as_config(self) -> dict[str, Any]:
        """The same under the keys of a config.json."""
        return {
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original_max_positions,
            "attention_factor": self.attention_factor,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
        }


@dataclass(frozen=True)
class ModelSpec:
    """One model's shape. A sub-layer, one character of `pattern`, is x + residual_multiplier * mixer(norm(x)).

    Llama-3.1-8B:    pattern "*-" * 32, num_heads 32, num_kv_heads 8, head_dim 128, attention_scale 128**-0.5
    Granite-4-H:     pattern "M-M-M-M-M-*-...", ssm_groups 1, mamba_num_heads 64, logits_divisor 8.0, position "none"
    Nemotron-H-8B:   pattern "M-M-M-M*-...", ssm_groups 8, activation "squared_relu", position "none"
    Qwen3-8B:        pattern "*-" * 36, qk_norm True
    """

    family: str  # the name of its file in families/
    pattern: str  # one of "M", "*", "-" per sub-layer
    hidden_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    tied_embeddings: bool
    initializer_range: float
    # attention
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_scale: float  # scores are q.k * attention_scale
    sliding_window: int | None  # keys a query sees, itself included
    position: Literal["rope", "none"]
    rope_theta: float  # 0 where position is "none"
    rope_scaling: RopeScaling | YarnScaling | None
    # MLP
    ffn_size: int
    activation: Literal["swiglu", "squared_relu"]
    # Mamba-2; zeros where the pattern has no "M"
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    ssm_state_size: int = 0
    ssm_groups: int = 0
    gated_norm_groups: int = 0  # groups of the RMSNorm after the scan: both families normalise per SSM group
    conv_kernel: int = 0
    conv_bias: bool = False
    chunk_len: int = 0
    dt_limit: tuple[float, float] = (0.0, math.inf)  # softplus(dt + dt_bias) is clamped to this
    dt_min: float = 0.001  # dt at initialisation is log-uniform in [dt_min, dt_max], at least dt_floor
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    # Qwen's attention
    qkv_bias: bool = False
    qk_norm: bool = False  # an RMSNorm of each query and key head, with one weight for all of them
    # Granite's multipliers; 1 elsewhere
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0

    @property
    def mamba_inner_size(self) -> int:
        """Width of z, x and y inside a Mamba mixer."""
        return self.mamba_num_heads * self.mamba_head_dim

    def differences(self, other: "ModelSpec") -> dict[str, tuple[Any, Any]]:
        """(ours, the other's) value by field, where they differ and it changes a number of a forward pass."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in INITIAL_VALUES}


# --- reading ----------------------------------------------------------------------------------------------------------

# Keys that change no number of a forward or backward pass without dropout.
IGNORED = frozenset(
    """
    architectures model_type auto_map transformers_version torch_dtype dtype use_cache tokenizer_class
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id decoder_start_token_id
    return_dict output_hidden_states output_attentions torchscript chunk_size_feed_forward is_encoder_decoder
    id2label label2id problem_type task_specific_params pretraining_tp num_logits_to_keep use_mamba_kernels
    mamba_ssm_cache_dtype init_method rescale_prenorm_residual output_router_logits router_aux_loss_coef
    num_experts_per_tok
    """.split()  # noqa: SIM905
)
_REQUIRED = object()
LARGEST = 10**8  # of any size in a config.json: a hundred times what a model of today has


class UnsupportedModel(ValueError):
    """A config.json cannot be read, or says something this engine does not compute."""


class Keys:
    """The keys of one config.json; remembers which were read, so that the rest can be refused."""

    def __init__(self, raw: dict[str, Any], source: str):
        self.raw, self.source = raw, source
        self.seen: set[str] = set()

    def fail(self, key: str, needed: str) -> NoReturn:
        got = f"{key}={json.dumps(self.raw[key])}" if key in self.raw else f"no {key}"
        raise UnsupportedModel(f"{self.source} has {got}; needed: {needed}")

    def value(self, *names: str, default: Any = _REQUIRED) -> Any:
        """The value under the first of `names` that is there and not null; two that differ are an error."""
        self.seen.update(names)
        found = [name for name in names if self.raw.get(name) is not None]
        if len({json.dumps(self.raw[name]) for name in found}) > 1:
            self.fail(found[0], f"the same value as {found[1]}={json.dumps(self.raw[found[1]])}")
        if found:
            return self.raw[found[0]]
        if default is _REQUIRED:
            self.fail(names[0], "a value (" + " or ".join(names) + ")")
        return default

    def integer(self, *names: str, default: Any = _REQUIRED) -> int:
        value = self.value(*names, default=default)
        if type(value) is not int or not 0 < value <= LARGEST:
            self.fail(next((n for n in names if n in self.raw), names[0]), f"an integer from 1 to {LARGEST:,}")
        return value

    def number(self, *names: str, default: Any = _REQUIRED, above: float = -math.inf) -> float:
        """A finite number, larger than `above`."""
        value = self.value(*names, default=default)
        if type(value) not in (int, float) or not above < value < math.inf:  # NaN is in no order
            what = "a number" if above == -math.inf else f"a number above {above:g}"
            self.fail(next((n for n in names if n in self.raw), names[0]), what)
        return float(value)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        value = self.value(name, default=default)
        if not isinstance(value, bool):
            self.fail(name, "true or false")
        return value

    def expect(self, name: str, *values: Any, absent: bool = True) -> Any:
        """Read a key for which only `values` are supported; null and, unless `absent` is false, no key are fine too."""
        value = self.value(name, default=None if absent else _REQUIRED)
        if value is not None and value not in values:
            self.fail(name, " or ".join(json.dumps(v) for v in values) + ", the only values supported")
        return value

    def refuse_the_rest(self, ignored: frozenset[str]) -> None:
        rest = [key for key in self.raw if key not in self.seen | ignored and not key.startswith("_")]
        for key in rest:
            if self.raw[key] is not None:
                self.fail(key, "a key this reader knows (remove it from a copy of the file if it changes no number)")


Table = dict[str, list[str]]


@dataclass(frozen=True)
class Family:
    """A family of models: the config.json it has, and what its tensors are called in a Hugging Face directory.

    layers: by kind of sub-layer, what follows "<prefix>layers.<layer>." in a tensor's name -> the keys it is made of,
    row after row, each as it is called after "layers.<sub-layer>." (`families/__init__.py` has those of most).
    """

    architecture: str  # in config.json
    read: Callable[[Keys], ModelSpec]
    layers: dict[str, Table]
    ignored: frozenset[str] = frozenset()  # keys of its config.json, beside IGNORED, that change no number
    sublayers: int = 2  # of ours, in one layer of theirs
    prefixes: tuple[str, ...] = ("model.",)  # the first is the one to write, all are read
    embedding: str = "embed_tokens.weight"
    final_norm: str = "norm.weight"
    output: str = "lm_head.weight"


def read_config(path: str | Path) -> dict[str, Any]:
    """A raw config.json: a file, a directory that holds one, or the name of a shipped one such as `llama-3.1-8b`.

    Infinity may be bare, as Python writes it, or `{"__float__": "Infinity"}`, as transformers 5 does.
    """
    file = find_config(path)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"), object_hook=_decode_float)
    except (ValueError, RecursionError) as error:  # bytes that are no text, too
        raise UnsupportedModel(f"{file} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UnsupportedModel(f"{file} holds a {type(raw).__name__}; needed: an object, as in a config.json")
    return raw


def find_config(path: str | Path) -> Path:
    candidates = [Path(path), Path(path) / "config.json", SHIPPED / f"{path}.json"]
    for file in candidates:
        if file.is_file():
            return file
    shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.json")))
    raise FileNotFoundError(f"{path} is no config.json, no directory with one, and no shipped shape ({shipped})")


def _decode_float(value: dict[str, Any]) -> Any:
    return float(value["__float__"]) if set(value) == {"__float__"} else value  # a ValueError is "not JSON", too


def read_spec(path: str | Path) -> ModelSpec:
    """The spec of a config.json, a directory with one, or a shipped shape; raises UnsupportedModel naming the key."""
    return spec_from_config(read_config(path), str(path))


def spec_from_config(raw: dict[str, Any], source: str = "config.json") -> ModelSpec:
    """The spec of a parsed config.json; `source` is what messages call it.

    Raises UnsupportedModel that names the key and value for everything the engine cannot honour: an unknown
    architecture, experts, biases, another activation or rope type, dropout, shapes that do not fit, unknown keys.
    """
    keys = Keys(raw, source)
    family = _family(keys)
    spec = family.read(keys)
    keys.refuse_the_rest(IGNORED | family.ignored)
    _check_shape(source, spec)
    return spec


def _family(keys: Keys) -> Family:
    by_architecture = {family.architecture: (name, family) for name, family in families().items()}
    known = ", ".join(by_architecture)
    names = keys.raw.get("architectures") or []
    if not names:  # a bare config without a model class
        named = keys.raw.get("model_type")
        if not isinstance(named, str) or named not in families():
            keys.fail("model_type", f"a model type of {known}")
        return families()[named]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(by_architecture):
        keys.fail("architectures", f"one of {known}")
    name, family = by_architecture[names[0]]
    if keys.raw.get("model_type", name) != name:
        keys.fail("model_type", f"{name}, which is what {names[0]} is")
    return family


@cache
def families() -> dict[str, Family]:
    """The families this engine knows, by `model_type`: what each file of `families/` says of the one it is called as.

    Found by their place, not imported from here: they import this file.
    """
    files = pkgutil.iter_modules([str(Path(__file__).parent / "families")])
    return {file.name: importlib.import_module(f"{__package__}.families.{file.name}").FAMILY for file in files}


def _check_shape(source: str, spec: ModelSpec) -> None:
    """Refuse shapes that no such model can have."""
    problems = []
    if spec.num_heads % spec.num_kv_heads:
        problems.append(
            f"num_attention_heads={spec.num_heads} is no multiple of num_key_value_heads={spec.num_kv_heads}"
        )
    if spec.position == "rope" and spec.head_dim % 2:
        problems.append(f"head_dim={spec.head_dim} is odd; RoPE rotates pairs")
    if spec.ssm_groups and spec.mamba_num_heads % spec.ssm_groups:
        problems.append(f"{spec.mamba_num_heads} Mamba heads are no multiple of {spec.ssm_groups} SSM groups")
    if problems:
        raise UnsupportedModel(f"{source}: " + "; ".join(problems))
