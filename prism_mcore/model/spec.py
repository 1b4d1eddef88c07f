"""ModelSpec: the shape of a model, read from a Hugging Face `config.json` as it lies on disk.

The file is read as plain JSON, in the older and in transformers 5's key style, never through `AutoConfig`. Every key is
either read, checked against the one value this engine computes, or listed as one that changes no number; a key that is
none of these is an error that names it, so that nothing about a model is silently dropped.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

SHIPPED = Path(__file__).parent / "configs"

MAMBA, ATTENTION, MLP = "M", "*", "-"
LAYER_NAMES = {MAMBA: "mamba", ATTENTION: "attention", MLP: "mlp"}

INITIAL_VALUES = {"initializer_range", "dt_min", "dt_max", "dt_floor"}  # of a spec: only random weights depend on them

Family = Literal["llama", "mistral", "granite", "granitemoehybrid", "nemotron_h"]


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
class ModelSpec:
    """One model's shape. A sub-layer, one character of `pattern`, is x + residual_multiplier * mixer(norm(x)).

    Llama-3.1-8B:    pattern "*-" * 32, num_heads 32, num_kv_heads 8, head_dim 128, attention_scale 128**-0.5
    Granite-4-H:     pattern "M-M-M-M-M-*-...", ssm_groups 1, mamba_num_heads 64, logits_divisor 8.0, position "none"
    Nemotron-H-8B:   pattern "M-M-M-M*-...", ssm_groups 8, activation "squared_relu", position "none"
    """

    family: Family
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
    rope_scaling: RopeScaling | None
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
# What transformers 5 writes into a Nemotron-H without experts: with no "E" in the pattern nothing reads it.
IGNORED_NEMOTRON = frozenset(
    """
    expand n_routed_experts n_shared_experts moe_intermediate_size moe_shared_expert_intermediate_size
    moe_latent_size moe_shared_expert_overlap routed_scaling_factor n_group topk_group norm_topk_prob
    mtp_layers_block_type mtp_hybrid_override_pattern
    """.split()  # noqa: SIM905
)
# Granite hybrid: the experts' width (there are none), and what no layer reads where no layer is Mamba.
IGNORED_GRANITE_HYBRID = frozenset(
    """
    intermediate_size mamba_expand mamba_n_heads mamba_n_groups mamba_d_head mamba_d_state mamba_d_conv
    mamba_conv_bias mamba_proj_bias mamba_chunk_size time_step_limit
    """.split()  # noqa: SIM905
)

ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "GraniteForCausalLM": "granite",
    "GraniteMoeHybridForCausalLM": "granitemoehybrid",
    "NemotronHForCausalLM": "nemotron_h",
}

LAYER_TYPES = {
    "mamba": MAMBA,
    "linear_attention": MAMBA,
    "attention": ATTENTION,
    "full_attention": ATTENTION,
    "mlp": MLP,
    "moe": "E",
}

_REQUIRED = object()


class UnsupportedModel(ValueError):
    """A config.json says something this engine does not compute."""


class _Keys:
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
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            self.fail(next((n for n in names if n in self.raw), names[0]), "a positive integer")
        return value

    def number(self, *names: str, default: Any = _REQUIRED) -> float:
        value = self.value(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(next((n for n in names if n in self.raw), names[0]), "a number")
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


def read_config(path: str | Path) -> dict[str, Any]:
    """A raw config.json: a file, a directory that holds one, or the name of a shipped one such as `llama-3.1-8b`.

    Infinity may be bare, as Python writes it, or `{"__float__": "Infinity"}`, as transformers 5 does.
    """
    file = _find_config(path)
    try:
        raw = json.loads(file.read_text(), object_hook=_decode_float)
    except json.JSONDecodeError as error:
        raise UnsupportedModel(f"{file} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UnsupportedModel(f"{file} holds a {type(raw).__name__}; needed: an object, as in a config.json")
    return raw


def _find_config(path: str | Path) -> Path:
    candidates = [Path(path), Path(path) / "config.json", SHIPPED / f"{path}.json"]
    for file in candidates:
        if file.is_file():
            return file
    shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.json")))
    raise FileNotFoundError(f"{path} is no config.json, no directory with one, and no shipped shape ({shipped})")


def _decode_float(value: dict[str, Any]) -> Any:
    return float(value["__float__"]) if set(value) == {"__float__"} else value


def read_spec(path: str | Path) -> ModelSpec:
    """The spec of a config.json, a directory with one, or a shipped shape; raises UnsupportedModel naming the key."""
    return spec_from_config(read_config(path), str(path))


def spec_from_config(raw: dict[str, Any], source: str = "config.json") -> ModelSpec:
    """The spec of a parsed config.json; `source` is what messages call it.

    Raises UnsupportedModel that names the key and value for everything the engine cannot honour: an unknown
    architecture, experts, biases, another activation or rope type, dropout, shapes that do not fit, unknown keys.
    """
    keys = _Keys(raw, source)
    family = _family(keys)
    if family == "nemotron_h":
        spec = _nemotron_h(keys)
        keys.refuse_the_rest(IGNORED | IGNORED_NEMOTRON)
    elif family == "granitemoehybrid":
        spec = _granite_hybrid(keys)
        keys.refuse_the_rest(IGNORED | IGNORED_GRANITE_HYBRID)
    else:
        spec = _dense(keys, family)
        keys.refuse_the_rest(IGNORED)
    _check_shape(source, spec)
    return spec


def _family(keys: _Keys) -> Family:
    names = keys.raw.get("architectures") or []
    known = ", ".join(ARCHITECTURES)
    if not names:  # a bare config without a model class
        if keys.raw.get("model_type") not in ARCHITECTURES.values():
            keys.fail("model_type", f"a model type of {known}")
        return keys.raw["model_type"]
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        keys.fail("architectures", f"one of {known}")
    family = ARCHITECTURES[names[0]]
    if keys.raw.get("model_type", family) != family:
        keys.fail("model_type", f"{family}, which is what {names[0]} is")
    return family


def _shared(keys: _Keys) -> dict[str, Any]:
    """Fields that all families write under the same key."""
    keys.expect("attention_dropout", 0, 0.0)
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    # Nemotron-H's own file says attention_head_dim, transformers 5 head_dim
    head_dim = keys.integer("head_dim", "attention_head_dim", default=hidden // heads)
    return dict(
        hidden_size=hidden,
        vocab_size=keys.integer("vocab_size"),
        max_positions=keys.integer("max_position_embeddings"),
        tied_embeddings=keys.flag("tie_word_embeddings", default=False),
        initializer_range=keys.number("initializer_range", default=0.02),
        num_heads=heads,
        num_kv_heads=keys.integer("num_key_value_heads", default=heads),
        head_dim=head_dim,
        attention_scale=head_dim**-0.5,
    )


def _granite_multipliers(keys: _Keys) -> dict[str, float]:
    return dict(
        embedding_multiplier=keys.number("embedding_multiplier"),
        attention_scale=keys.number("attention_multiplier"),  # in place of head_dim**-0.5
        residual_multiplier=keys.number("residual_multiplier"),
        logits_divisor=keys.number("logits_scaling"),
    )


def _rope(keys: _Keys) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_theta` and `rope_scaling`, or from transformers 5's `rope_parameters`."""
    keys.expect("partial_rotary_factor", 1, 1.0)
    name = "rope_parameters" if keys.raw.get("rope_parameters") is not None else "rope_scaling"
    parameters = keys.value(name, default={})
    keys.value("rope_parameters", "rope_scaling", default=None)  # both, when they agree
    if not isinstance(parameters, dict):
        keys.fail(name, "an object with rope_type")
    nested = _Keys(parameters, f"{keys.source}: {name}")
    theta = nested.number("rope_theta", default=keys.value("rope_theta", default=None))
    nested.expect("partial_rotary_factor", 1, 1.0)
    kind = nested.value("rope_type", "type", default="default")
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(
            factor=nested.number("factor"),
            low_freq_factor=nested.number("low_freq_factor"),
            high_freq_factor=nested.number("high_freq_factor"),
            original_max_positions=nested.integer("original_max_position_embeddings"),
        )
    elif kind != "default":
        nested.fail("rope_type" if "rope_type" in parameters else "type", '"default" or "llama3"')
    nested.refuse_the_rest(frozenset())
    return theta, scaling


def _layer_pattern(keys: _Keys, name: str, kinds: list[str]) -> str:
    """The pattern of a list of layer types, in either naming."""
    if not isinstance(kinds, list) or not kinds or any(kind not in LAYER_TYPES for kind in kinds):
        keys.fail(name, "a list of " + ", ".join(LAYER_TYPES))
    return "".join(LAYER_TYPES[kind] for kind in kinds)


def _dense(keys: _Keys, family: Family) -> ModelSpec:
    """Llama, Mistral and Granite: attention and SwiGLU in turn."""
    keys.expect("hidden_act", "silu", absent=False)
    keys.expect("attention_bias", False)
    keys.expect("mlp_bias", False)
    window = None
    if family == "mistral":
        if "sliding_window" not in keys.raw:  # null means no window; transformers takes an absent key to mean 4096
            keys.fail("sliding_window", "a window in tokens, or null for none")
        window = None if keys.value("sliding_window", default=None) is None else keys.integer("sliding_window")
    theta, scaling = _rope(keys)
    return ModelSpec(
        family=family,
        pattern="*-" * keys.integer("num_hidden_layers"),
        norm_eps=keys.number("rms_norm_eps"),
        sliding_window=window,
        position="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        ffn_size=keys.integer("intermediate_size"),
        activation="swiglu",
        **(_shared(keys) | (_granite_multipliers(keys) if family == "granite" else {})),
    )


def _granite_hybrid(keys: _Keys) -> ModelSpec:
    """Granite 4: Mamba-2 or attention, each followed by SwiGLU (`shared_mlp`); RoPE only where the file says so."""
    keys.expect("num_local_experts", 0, absent=False)
    keys.expect("hidden_act", "silu", absent=False)
    keys.expect("normalization_function", "rmsnorm")
    keys.expect("attention_bias", False)
    mixers = _layer_pattern(keys, "layer_types", keys.value("layer_types", "layers_block_type"))
    if set(mixers) - {MAMBA, ATTENTION}:
        keys.fail("layer_types", "only mamba (linear_attention) and attention (full_attention)")
    _check_num_layers(keys, len(mixers))
    theta, scaling = _rope(keys)
    # transformers applies RoPE for "rope" and nothing for every other value, null and no key included
    rope = keys.expect("position_embedding_type", "rope", "nope") == "rope"
    return ModelSpec(
        family="granitemoehybrid",
        pattern="".join(mixer + MLP for mixer in mixers),
        norm_eps=keys.number("rms_norm_eps"),
        sliding_window=None,
        position="rope" if rope else "none",
        rope_theta=theta if rope else 0.0,
        rope_scaling=scaling if rope else None,
        ffn_size=keys.integer("shared_intermediate_size"),
        activation="swiglu",
        **(_shared(keys) | _granite_multipliers(keys) | (_granite_mamba(keys) if MAMBA in mixers else {})),
    )


def _granite_mamba(keys: _Keys) -> dict[str, Any]:
    keys.expect("mamba_proj_bias", False)
    inner = keys.integer("mamba_expand") * keys.integer("hidden_size")
    heads, groups = keys.integer("mamba_n_heads"), keys.integer("mamba_n_groups")
    auto = keys.value("mamba_d_head", default="auto") == "auto"
    head_dim = inner // heads if auto else keys.integer("mamba_d_head")
    if heads * head_dim != inner:
        keys.fail("mamba_d_head", f"mamba_expand * hidden_size / mamba_n_heads = {inner / heads:g}")
    return dict(
        mamba_num_heads=heads,
        mamba_head_dim=head_dim,
        ssm_state_size=keys.integer("mamba_d_state"),
        ssm_groups=groups,
        gated_norm_groups=groups,
        conv_kernel=keys.integer("mamba_d_conv"),
        conv_bias=keys.flag("mamba_conv_bias"),
        chunk_len=keys.integer("mamba_chunk_size"),
        dt_limit=_dt_limit(keys),
    )


def _nemotron_h(keys: _Keys) -> ModelSpec:
    """Nemotron-H: Mamba-2, attention without positions and squared-ReLU MLP, in the order the file gives."""
    keys.expect("mlp_hidden_act", "relu2", absent=False)
    keys.expect("mamba_hidden_act", "silu", absent=False)
    for bias in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias", "residual_in_fp32"):
        keys.expect(bias, False)
    keys.expect("hidden_dropout", 0, 0.0)
    keys.expect("num_nextn_predict_layers", 0)
    keys.expect("sliding_window")
    groups = keys.integer("n_groups")
    return ModelSpec(
        family="nemotron_h",
        pattern=_nemotron_pattern(keys),
        norm_eps=keys.number("layer_norm_epsilon", "rms_norm_eps"),
        sliding_window=None,
        position="none",
        rope_theta=0.0,
        rope_scaling=None,
        ffn_size=keys.integer("intermediate_size"),
        activation="squared_relu",
        mamba_num_heads=keys.integer("mamba_num_heads"),
        mamba_head_dim=keys.integer("mamba_head_dim"),
        ssm_state_size=keys.integer("ssm_state_size"),
        ssm_groups=groups,
        gated_norm_groups=groups,
        conv_kernel=keys.integer("conv_kernel"),
        conv_bias=keys.flag("use_conv_bias"),
        chunk_len=keys.integer("chunk_size"),
        # transformers 5 ignores this key and clamps at time_step_min in prefill, at nothing in decode
        dt_limit=_dt_limit(keys),
        dt_min=keys.number("time_step_min", default=ModelSpec.dt_min),
        dt_max=keys.number("time_step_max", default=ModelSpec.dt_max),
        dt_floor=keys.number("time_step_floor", default=ModelSpec.dt_floor),
        **_shared(keys),
    )


def _nemotron_pattern(keys: _Keys) -> str:
    kinds = keys.value("layers_block_type", "layer_types", default=None)
    pattern = keys.value("hybrid_override_pattern", default=None)
    if kinds is not None:
        listed = _layer_pattern(keys, "layers_block_type" if "layers_block_type" in keys.raw else "layer_types", kinds)
        if pattern not in (None, listed):
            keys.fail("hybrid_override_pattern", f"the same layers as layers_block_type, {listed}")
        pattern = listed
    if not isinstance(pattern, str) or not pattern or set(pattern) - {MAMBA, ATTENTION, MLP}:
        name = "hybrid_override_pattern" if kinds is None else "layers_block_type"
        keys.fail(name, "Mamba (M), attention (*) and MLP (-) layers only; experts (E, moe) are not supported")
    _check_num_layers(keys, len(pattern))
    return pattern


def _check_num_layers(keys: _Keys, layers: int) -> None:
    if keys.integer("num_hidden_layers", default=layers) != layers:
        keys.fail("num_hidden_layers", f"{layers}, the length of the layer pattern")


def _dt_limit(keys: _Keys) -> tuple[float, float]:
    limit = keys.value("time_step_limit", default=[0.0, math.inf])
    if not isinstance(limit, list) or len(limit) != 2 or not all(isinstance(x, int | float) for x in limit):
        keys.fail("time_step_limit", "two numbers, lowest and highest time step")
    return float(limit[0]), float(limit[1])


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
