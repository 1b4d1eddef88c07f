"""Nemotron-H: Mamba-2, attention without positions and squared-ReLU MLP, in the order the file gives."""

from prism_mcore.model.families import K, Q, V, check_num_layers, common_fields, dt_limit, layer_pattern, mamba_tensors
from prism_mcore.model.spec import ATTENTION, MAMBA, MLP, Family, Keys, ModelSpec

# What transformers 5 writes into a Nemotron-H without experts: with no "E" in the pattern nothing reads it.
IGNORED = frozenset(
    """
    expand n_routed_experts n_shared_experts moe_intermediate_size moe_shared_expert_intermediate_size
    moe_latent_size moe_shared_expert_overlap routed_scaling_factor n_group topk_group norm_topk_prob
    mtp_layers_block_type mtp_hybrid_override_pattern
    """.split()  # noqa: SIM905
)


def read(keys: Keys) -> ModelSpec:
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
        pattern=_pattern(keys),
        norm_eps=keys.number("layer_norm_epsilon", "rms_norm_eps", above=0),
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
        dt_limit=dt_limit(keys),
        dt_min=keys.number("time_step_min", default=ModelSpec.dt_min, above=0),
        dt_max=keys.number("time_step_max", default=ModelSpec.dt_max, above=0),
        dt_floor=keys.number("time_step_floor", default=ModelSpec.dt_floor, above=0),
        **common_fields(keys),
    )


def _pattern(keys: Keys) -> str:
    kinds = keys.value("layers_block_type", "layer_types", default=None)
    pattern = keys.value("hybrid_override_pattern", default=None)
    if kinds is not None:
        listed = layer_pattern(keys, "layers_block_type" if "layers_block_type" in keys.raw else "layer_types", kinds)
        if pattern not in (None, listed):
            keys.fail("hybrid_override_pattern", f"the same layers as layers_block_type, {listed}")
        pattern = listed
    if not isinstance(pattern, str) or not pattern or set(pattern) - {MAMBA, ATTENTION, MLP}:
        name = "hybrid_override_pattern" if kinds is None else "layers_block_type"
        keys.fail(name, "Mamba (M), attention (*) and MLP (-) layers only; experts (E, moe) are not supported")
    check_num_layers(keys, len(pattern))
    return pattern


FAMILY = Family(
    "NemotronHForCausalLM",
    read,
    {
        ATTENTION: {
            "norm.weight": ["norm.weight"],
            "mixer.q_proj.weight": [Q],
            "mixer.k_proj.weight": [K],
            "mixer.v_proj.weight": [V],
            "mixer.o_proj.weight": ["mixer.out_proj.weight"],
        },
        MLP: {
            "norm.weight": ["norm.weight"],
            "mixer.up_proj.weight": ["mixer.up.weight"],
            "mixer.down_proj.weight": ["mixer.down.weight"],
        },
        MAMBA: {"norm.weight": ["norm.weight"], **mamba_tensors("mixer")},
    },
    ignored=IGNORED,
    sublayers=1,
    # What NVIDIA published and transformers writes; and what transformers 5 calls them in memory.
    prefixes=("backbone.", "model."),
    embedding="embeddings.weight",
    final_norm="norm_f.weight",
)
