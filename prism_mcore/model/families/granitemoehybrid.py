"""Granite 4: Mamba-2 or attention, each followed by SwiGLU."""

from typing import Any

from prism_mcore.model.families import (
    ATTENTION_TENSORS,
    check_num_layers,
    common_fields,
    dt_limit,
    granite_multipliers,
    layer_pattern,
    mamba_tensors,
    read_rope,
)
from prism_mcore.model.spec import ATTENTION, MAMBA, MLP, Family, Keys, ModelSpec, Table

# The experts' width (there are none), and what no layer reads where no layer is Mamba.
IGNORED = frozenset(
    """
    intermediate_size mamba_expand mamba_n_heads mamba_n_groups mamba_d_head mamba_d_state mamba_d_conv
    mamba_conv_bias mamba_proj_bias mamba_chunk_size time_step_limit
    """.split()  # noqa: SIM905
)

SHARED_MLP_TENSORS: Table = {
    "post_attention_layernorm.weight": ["norm.weight"],
    "shared_mlp.input_linear.weight": ["mixer.gate_up.weight.gate", "mixer.gate_up.weight.up"],
    "shared_mlp.output_linear.weight": ["mixer.down.weight"],
}


def read(keys: Keys) -> ModelSpec:
    """RoPE only where the file says so; the MLP is `shared_mlp`, no layer has experts."""
    keys.expect("num_local_experts", 0, absent=False)
    keys.expect("hidden_act", "silu", absent=False)
    keys.expect("normalization_function", "rmsnorm")
    keys.expect("attention_bias", False)
    mixers = layer_pattern(keys, "layer_types", keys.value("layer_types", "layers_block_type"))
    if set(mixers) - {MAMBA, ATTENTION}:
        keys.fail("layer_types", "only mamba (linear_attention) and attention (full_attention)")
    check_num_layers(keys, len(mixers))
    theta, scaling = read_rope(keys)
    # transformers applies RoPE for "rope" and nothing for every other value, null and no key included
    rope = keys.expect("position_embedding_type", "rope", "nope") == "rope"
    return ModelSpec(
        family="granitemoehybrid",
        pattern="".join(mixer + MLP for mixer in mixers),
        norm_eps=keys.number("rms_norm_eps", above=0),
        sliding_window=None,
        position="rope" if rope else "none",
        rope_theta=theta if rope else 0.0,
        rope_scaling=scaling if rope else None,
        ffn_size=keys.integer("shared_intermediate_size"),
        activation="swiglu",
        **(common_fields(keys) | granite_multipliers(keys) | (_mamba(keys) if MAMBA in mixers else {})),
    )


def _mamba(keys: Keys) -> dict[str, Any]:
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
        dt_limit=dt_limit(keys),
    )


FAMILY = Family(
    "GraniteMoeHybridForCausalLM",
    read,
    {
        ATTENTION: ATTENTION_TENSORS,
        MLP: SHARED_MLP_TENSORS,
        MAMBA: {"input_layernorm.weight": ["norm.weight"], **mamba_tensors("mamba")},
    },
    ignored=IGNORED,
)
