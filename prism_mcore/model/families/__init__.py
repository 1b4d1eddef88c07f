"""One file per family of models, called as its `model_type`: how its config.json is read, how its tensors are called.

`spec.families()` finds them; each file's FAMILY is all there is to say of one. Here is what several of them share.
"""

import math
from typing import Any

from prism_mcore.model.spec import ATTENTION, MAMBA, MLP, Keys, ModelSpec, RopeScaling, Table, YarnScaling

# --- how tensors are called -------------------------------------------------------------------------------------------
# Left: the name in a directory after "<prefix>layers.<layer>.". Right: our keys after "layers.<sub-layer>.", in the
# order of the rows. `Q`, `K` and `V` are the rows of our qkv: for each key/value head its queries, its key, its value.

Q, K, V = "mixer.qkv.weight[q]", "mixer.qkv.weight[k]", "mixer.qkv.weight[v]"

ATTENTION_TENSORS: Table = {
    "input_layernorm.weight": ["norm.weight"],
    "self_attn.q_proj.weight": [Q],
    "self_attn.k_proj.weight": [K],
    "self_attn.v_proj.weight": [V],
    "self_attn.o_proj.weight": ["mixer.out_proj.weight"],
}
MLP_TENSORS: Table = {
    "post_attention_layernorm.weight": ["norm.weight"],
    "mlp.gate_proj.weight": ["mixer.gate_up.weight.gate"],
    "mlp.up_proj.weight": ["mixer.gate_up.weight.up"],
    "mlp.down_proj.weight": ["mixer.down.weight"],
}
DECODER_TENSORS: dict[str, Table] = {ATTENTION: ATTENTION_TENSORS, MLP: MLP_TENSORS}


def mamba_tensors(module: str) -> Table:
    """The tensors of a Mamba-2 mixer under `module`, without the norm before it."""
    table: Table = {
        "in_proj.weight": [
            "mixer.in_proj.weight.z",
            "mixer.in_proj.weight.x",
            "mixer.in_proj_bc.weight.B",
            "mixer.in_proj_bc.weight.C",
            "mixer.in_proj.weight.dt",
        ],
        "conv1d.weight": ["mixer.conv_x.weight", "mixer.conv_bc.weight.B", "mixer.conv_bc.weight.C"],
        "conv1d.bias": ["mixer.conv_x.bias", "mixer.conv_bc.bias.B", "mixer.conv_bc.bias.C"],
        "dt_bias": ["mixer.dt_bias"],
        "A_log": ["mixer.A_log"],
        "D": ["mixer.D"],
        "norm.weight": ["mixer.norm.weight"],
        "out_proj.weight": ["mixer.out_proj.weight"],
    }
    return {f"{module}.{name}": keys for name, keys in table.items()}


# --- how config.json is read ------------------------------------------------------------------------------------------

MOST_LAYERS = 10_000  # a pattern has a letter for each
LAYER_TYPES = {
    "mamba": MAMBA,
    "linear_attention": MAMBA,
    "attention": ATTENTION,
    "full_attention": ATTENTION,
    "mlp": MLP,
    "moe": "E",
}


def common_fields(keys: Keys) -> dict[str, Any]:
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


def read_rope(keys: Keys) -> tuple[float, RopeScaling | YarnScaling | None]:
    """(theta, scaling) from `rope_theta` and `rope_scaling`, or from transformers 5's `rope_parameters`."""
    keys.expect("partial_rotary_factor", 1, 1.0)
    name = "rope_parameters" if keys.raw.get("rope_parameters") is not None else "rope_scaling"
    parameters = keys.value(name, default={})
    keys.value("rope_parameters", "rope_scaling", default=None)  # both, when they agree
    if not isinstance(parameters, dict):
        keys.fail(name, "an object with rope_type")
    nested = Keys(parameters, f"{keys.source}: {name}")
    theta = nested.number("rope_theta", default=keys.value("rope_theta", default=None), above=0)
    nested.expect("partial_rotary_factor", 1, 1.0)
    kind = nested.value("rope_type", "type", default="default")
    scaling: RopeScaling | YarnScaling | None = None
    if kind == "llama3":
        scaling = RopeScaling(
            factor=nested.number("factor"),
            low_freq_factor=nested.number("low_freq_factor"),
            high_freq_factor=nested.number("high_freq_factor"),
            original_max_positions=nested.integer("original_max_position_embeddings"),
        )
    elif kind == "yarn":
        nested.expect("truncate", True)
        nested.expect("mscale", None)
        nested.expect("mscale_all_dim", None)
        factor = nested.number("factor", above=0)
        scaling = YarnScaling(
            factor=factor,
            original_max_positions=nested.integer("original_max_position_embeddings"),
            attention_factor=nested.number(
                "attention_factor", default=YarnScaling.usual_attention_factor(factor), above=0
            ),
            beta_fast=nested.number("beta_fast", default=32.0, above=0),
            beta_slow=nested.number("beta_slow", default=1.0, above=0),
        )
    elif kind != "default":
        nested.fail("rope_type" if "rope_type" in parameters else "type", '"default", "llama3" or "yarn"')
    nested.refuse_the_rest(frozenset())
    return theta, scaling


def decoder(keys: Keys, family: str, **more: Any) -> ModelSpec:
    """Attention with RoPE and SwiGLU in turn, as in Llama; `more` adds fields, or replaces those of Llama."""
    keys.expect("hidden_act", "silu", absent=False)
    keys.expect("attention_bias", False)
    keys.expect("mlp_bias", False)
    theta, scaling = read_rope(keys)
    fields: dict[str, Any] = dict(
        pattern=(ATTENTION + MLP) * num_layers(keys),
        norm_eps=keys.number("rms_norm_eps", above=0),
        sliding_window=None,
        position="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        ffn_size=keys.integer("intermediate_size"),
        activation="swiglu",
    )
    return ModelSpec(family=family, **(fields | common_fields(keys) | more))


def qwen_window(keys: Keys) -> int | None:
    """Qwen's sliding window: that of all layers or of none, as `layer_types` or `max_window_layers` say."""
    layers = num_layers(keys)
    used = keys.flag("use_sliding_window", default=False)
    window, full = keys.value("sliding_window", default=None), keys.value("max_window_layers", default=layers)
    kinds = keys.value("layer_types", default=None)
    if kinds is None:
        if isinstance(full, bool) or not isinstance(full, int):
            keys.fail("max_window_layers", "the number of layers without a window")
        if used and window is not None and 0 < full < layers:
            keys.fail("max_window_layers", f"0 or {layers}: a window in every layer or in none")
        sliding = full <= 0
    else:
        if not isinstance(kinds, list) or set(map(str, kinds)) not in ({"full_attention"}, {"sliding_attention"}):
            keys.fail("layer_types", "full_attention in every layer, or sliding_attention in every layer")
        check_num_layers(keys, len(kinds))
        sliding = kinds[0] == "sliding_attention"
    # Without use_sliding_window transformers reads past the window that most files name nevertheless.
    return keys.integer("sliding_window") if used and window is not None and sliding else None


def granite_multipliers(keys: Keys) -> dict[str, float]:
    return dict(
        embedding_multiplier=keys.number("embedding_multiplier"),
        attention_scale=keys.number("attention_multiplier"),  # in place of head_dim**-0.5
        residual_multiplier=keys.number("residual_multiplier"),
        logits_divisor=keys.number("logits_scaling", above=0),
    )


def layer_pattern(keys: Keys, name: str, kinds: list[str]) -> str:
    """The pattern of a list of layer types, in either naming."""
    if not isinstance(kinds, list) or not kinds or any(str(kind) not in LAYER_TYPES for kind in kinds):
        keys.fail(name, "a list of " + ", ".join(LAYER_TYPES))
    return "".join(LAYER_TYPES[kind] for kind in kinds)


def num_layers(keys: Keys) -> int:
    count = keys.integer("num_hidden_layers")
    if count > MOST_LAYERS:
        keys.fail("num_hidden_layers", f"at most {MOST_LAYERS:,}")
    return count


def check_num_layers(keys: Keys, layers: int) -> None:
    if keys.integer("num_hidden_layers", default=layers) != layers:
        keys.fail("num_hidden_layers", f"{layers}, the length of the layer pattern")


def dt_limit(keys: Keys) -> tuple[float, float]:
    limit = keys.value("time_step_limit", default=[0.0, math.inf])
    if (
        not isinstance(limit, list)
        or [type(x) in (int, float) for x in limit] != [True] * 2
        or not limit[0] <= limit[1]
    ):
        keys.fail("time_step_limit", "two numbers, lowest and highest time step")
    return float(limit[0]), float(limit[1])
