"""From settings to this rank's model chunks."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from prism_mcore.config import Settings, SettingsError
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.model.linear import Build
from prism_mcore.model.ops import Ops
from prism_mcore.model.spec import LAYER_NAMES, ModelSpec
from prism_mcore.parallel import Groups
from prism_mcore.plan.split import split_layers

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def chunks_of(settings: Settings, spec: ModelSpec, groups: Groups, device: torch.device) -> list[HybridModel]:
    """This rank's pipeline chunks as the settings cut the model, weights not yet set.

    Raises SettingsError for a choice of `kernels` that cannot be had here.
    """
    parallel = settings.parallel
    try:
        ops = Ops(settings.kernels, device)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return build_chunks(
        spec,
        split_layers(spec, parallel.pp, parallel.vpp, settings.data.seq_len, parallel.split),
        groups,
        ops,
        dtype=DTYPES[settings.precision.dtype],
        device=device,
        sequence_parallel=parallel.sequence_parallel,
        recompute=frozenset(kind for kind, name in LAYER_NAMES.items() if name in settings.train.recompute),
    )


def build_chunks(
    spec: ModelSpec,
    split: list[list[int]],
    groups: Groups,
    ops: Ops,
    *,
    dtype: torch.dtype,
    device: torch.device,
    sequence_parallel: bool = False,
    recompute: frozenset[str] = frozenset(),
) -> list[HybridModel]:
    """This rank's pipeline chunks, weights not yet set; on the `meta` device nothing is allocated.

    split: the sub-layers of every chunk of the whole model in its order; chunk k is on stage k % pp. recompute: the
    kinds of sub-layer ("M", "*", "-") whose activations are computed again in the backward pass.
    """
    config = transformer_config(spec, groups, dtype, sequence_parallel, device)
    build = Build(spec, config, groups, ops)
    mine = split[groups.pp_rank :: groups.pp_size]
    with torch.device(device):
        return [HybridModel(build, layers, recompute=recompute, vp_stage=i) for i, layers in enumerate(mine)]


def transformer_config(
    spec: ModelSpec, groups: Groups, dtype: torch.dtype, sequence_parallel: bool, device: torch.device
) -> TransformerConfig:
    """megatron-core's settings for this model and layout: what its linears, schedules, DDP and optimizer read."""
    interleaved = groups.vpp > 1
    return TransformerConfig(
        num_layers=len(spec.pattern),
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_heads or spec.mamba_num_heads,
        num_query_groups=spec.num_kv_heads or None,
        kv_channels=spec.head_dim or None,
        ffn_hidden_size=spec.ffn_size or None,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        softmax_scale=spec.attention_scale,
        window_size=None if spec.sliding_window is None else (spec.sliding_window - 1, 0),
        tensor_model_parallel_size=groups.tp_size,
        pipeline_model_parallel_size=groups.pp_size,
        virtual_pipeline_model_parallel_size=groups.vpp if interleaved else None,
        context_parallel_size=groups.cp_size,
        sequence_parallel=sequence_parallel and groups.tp_size > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The loss is a sum over the tokens of the global batch, so that no split of it changes the gradient.
        calculate_per_token_loss=True,
        # HybridModel draws every weight from (seed, name). With "CPU initialization" megatron-core's own modules follow
        # torch.device, also onto "meta", but Transformer Engine's are made on the CPU; without, all are on this GPU.
        perform_initialization=False,
        use_cpu_initialization=device.type != "cuda",
        # The backward pass of megatron-core's embedding adds in any order without.
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        gradient_accumulation_fusion=False,
        # gloo's overlapped sends read the output after megatron-core has freed it: another loss, silently.
        deallocate_pipeline_outputs=torch.cuda.is_available() or not interleaved,
        # Without overlap the interleaved schedule gives garbage gradients at PP=2, silently (megatron-core 0.16.1).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
    )
