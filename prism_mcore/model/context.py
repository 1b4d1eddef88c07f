"""What the constructors of all layers share."""

from dataclasses import dataclass, replace

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from prism_mcore.model.fp8 import Fp8
from prism_mcore.model.ops import Ops
from prism_mcore.model.spec import ModelSpec
from prism_mcore.parallel import Groups


@dataclass(frozen=True)
class ModelContext:
    """The shape of the model, the layout and the ops that a rank's part of it is made with."""

    spec: ModelSpec
    config: TransformerConfig  # megatron-core's view of the same model and layout
    groups: Groups
    ops: Ops  # the op table, decided once at start
    fp8: Fp8 | None = None  # the FP8 recipe of the large linears' products; None where they are of config.params_dtype

    def fusing(self, quantize_op: str, *ops: str) -> Fp8 | None:
        """The FP8 recipe, where what these ops give can be quantised as it is computed: by the same backend."""
        backends = {self.ops.backends[op].name for op in (quantize_op, *ops)}
        return None if self.fp8 is None or self.fp8.by_te or len(backends) > 1 else self.fp8

    def of_layer(self, layer: int) -> "ModelContext":
        """That of a sub-layer, some of which may be kept out of FP8."""
        return self if self.fp8 is None or self.fp8.covers(layer, len(self.spec.pattern)) else replace(self, fp8=None)


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
        # Transformer Engine quantises a weight in every micro-batch: kept ones would go stale, since megatron-core says
        # that weights have changed in its schedules only, which generating and scoring do not go through.
        disable_parameter_transpose_cache=True,
        # gloo's overlapped sends read the output after megatron-core has freed it: another loss, silently.
        deallocate_pipeline_outputs=torch.cuda.is_available() or not interleaved,
        # Without overlap the interleaved schedule gives garbage gradients at PP=2, silently (megatron-core 0.16.1).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
    )
