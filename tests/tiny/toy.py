"""A toy pipeline of megatron-core's own parallel layers, in any layout, for tests of what lies beneath the model."""

# b sequences in a micro-batch, s tokens in a sequence, d hidden, f = 2 d inner, v vocabulary

import functools
import zlib
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from prism_mcore.parallel import Groups

NUM_LAYERS, D, V, S, B = 4, 8, 16, 6, 2


class ToyChunk(MegatronModule):
    """One pipeline chunk of: embedding, NUM_LAYERS x (x + row(tanh(column(x)))), head."""

    def __init__(self, config: TransformerConfig, groups: Groups, chunk: int):
        super().__init__(config)
        num_chunks = groups.pp_size * groups.vpp
        place = chunk * groups.pp_size + groups.pp_rank
        per_chunk = NUM_LAYERS // num_chunks
        self.pre_process, self.post_process = place == 0, place == num_chunks - 1
        self.share_embeddings_and_output_weights = False
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = chunk if groups.vpp > 1 else None
        self.input_tensor: torch.Tensor | None = None
        common: dict[str, Any] = {
            "config": config,
            "init_method": torch.nn.init.zeros_,
            "bias": True,
            "skip_bias_add": False,
            "tp_group": groups.tp,
        }
        if self.pre_process:
            self.embedding = VocabParallelEmbedding(
                V,
                D,
                init_method=torch.nn.init.zeros_,
                reduce_scatter_embeddings=config.sequence_parallel,
                config=config,
                tp_group=groups.tp,
            )
        self.layers = torch.nn.ModuleDict()
        for index in range(place * per_chunk, (place + 1) * per_chunk):
            layer = {
                "up": ColumnParallelLinear(D, 2 * D, gather_output=False, **common),
                "down": RowParallelLinear(2 * D, D, input_is_parallel=True, **common),
            }
            self.layers[str(index)] = torch.nn.ModuleDict(layer)
        if self.post_process:
            self.head = ColumnParallelLinear(D, V, gather_output=False, **{**common, "bias": False})
        self._draw_weights(groups)

    def _draw_weights(self, groups: Groups) -> None:
        """Each tensor from its name alone, then sliced: the same model in any layout."""
        for name, weight in self.named_parameters():
            axis = weight.partition_dim if getattr(weight, "tensor_model_parallel", False) else None
            shape = list(weight.shape)
            if axis is not None:
                shape[axis] *= groups.tp_size
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            full = 0.5 * torch.randn(shape, generator=generator)
            part = full if axis is None else full.chunk(groups.tp_size, axis)[groups.tp_rank]
            weight.data.copy_(part)

    def set_input_tensor(self, input_tensor: Any) -> None:
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if not self.pre_process:
            x = self.input_tensor
        elif self.config.sequence_parallel:
            x = self.embedding(tokens)  # reduce-scatter wants [s, b, d], and the layer transposes
        else:
            x = self.embedding(tokens).transpose(0, 1).contiguous()  # what a stage sends must be contiguous
        for layer in self.layers.values():
            x = x + layer["down"](torch.tanh(layer["up"](x)[0]))[0]
        if not self.post_process:
            return x
        logits = self.head(x)[0]
        return vocab_parallel_cross_entropy(logits.float(), tokens.t().contiguous()).t()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = {}
        for name, module in self.named_modules():
            if hasattr(module, "sharded_state_dict") and module is not self:
                state.update(module.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        return {name: tensor for name, tensor in state.items() if not name.endswith("_extra_state")}


def toy_config(groups: Groups, sequence_parallel: bool = False, bf16: bool = False) -> TransformerConfig:
    dtype = torch.bfloat16 if bf16 else torch.float32
    return TransformerConfig(
        num_layers=NUM_LAYERS,
        hidden_size=D,
        num_attention_heads=2,
        tensor_model_parallel_size=groups.tp_size,
        pipeline_model_parallel_size=groups.pp_size,
        virtual_pipeline_model_parallel_size=groups.vpp if groups.vpp > 1 else None,
        sequence_parallel=sequence_parallel,
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,
        overlap_p2p_comm=groups.vpp > 1,
        batch_p2p_comm=False,
        gradient_accumulation_fusion=False,
    )


class Toy:
    """Model chunks, distributed optimizer and a training step."""

    def __init__(self, groups: Groups, sequence_parallel: bool = False, bf16: bool = False, lr: float = 0.05):
        self.groups = groups
        self.config = toy_config(groups, sequence_parallel, bf16)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            num_distributed_optimizer_instances=groups.dp_cp.size() // groups.collection.intra_dp_cp.size(),
        )
        self.chunks = []
        for chunk in range(groups.vpp):
            module: torch.nn.Module = ToyChunk(self.config, groups, chunk)
            if bf16:
                module = Float16Module(self.config, module)
            self.chunks.append(DistributedDataParallel(self.config, ddp, module, pg_collection=groups.collection))
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                lr=lr, bf16=bf16, params_dtype=self.config.params_dtype, use_distributed_optimizer=True, clip_grad=1.0
            ),
            self.chunks,
            use_gloo_process_groups=False,
            pg_collection=groups.collection,
        )
        self.config.finalize_model_grads_func = functools.partial(finalize_model_grads, pg_collection=groups.collection)

    def gradients(self, step: int, num_micro_batches: int = 4) -> float:
        """Forward and backward of the step's batch; the summed loss of this rank's part, 0 before the last stage."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(0, V, (num_micro_batches, B, S), generator=generator)
        mine = list(batch.chunk(self.groups.dp_size)[self.groups.dp_rank])

        def forward_step(tokens: Any, model: Any) -> Any:
            return model(next(tokens)), lambda losses: (losses.sum(), torch.tensor(B * S), {"loss": losses.sum()})

        run = get_forward_backward_func(self.groups.pp_size, self.groups.vpp if self.groups.vpp > 1 else None)
        losses = run(
            forward_step_func=forward_step,
            data_iterator=[iter(mine) for _ in self.chunks] if self.groups.vpp > 1 else iter(mine),
            model=self.chunks if self.groups.vpp > 1 else self.chunks[0],
            num_microbatches=len(mine),
            seq_length=S,
            micro_batch_size=B,
            p2p_communicator=P2PCommunicator(self.groups.pp, self.config),
            pg_collection=self.groups.collection,
        )
        return float(sum(loss["loss"] for loss in losses)) if losses else 0.0

    def step(self, step: int) -> tuple[float, float]:
        """One update; (loss of this rank's part, global gradient norm)."""
        loss = self.gradients(step)
        _, grad_norm, _ = self.optimizer.step()
        return loss, float(grad_norm)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {
            name.removeprefix("module.").removeprefix("module."): parameter
            for chunk in self.chunks
            for name, parameter in chunk.named_parameters()
        }

    def full(self, attribute: str = "data") -> dict[str, torch.Tensor]:
        """Every weight (or `main_grad`) of this rank's stages, gathered over tensor-parallel ranks, in fp32."""
        whole = {}
        for name, parameter in self.parameters().items():
            part = getattr(parameter, attribute).detach().float().contiguous()
            if getattr(parameter, "tensor_model_parallel", False):
                parts = [torch.empty_like(part) for _ in range(self.groups.tp_size)]
                torch.distributed.all_gather(parts, part, group=self.groups.tp)
                part = torch.cat(parts, parameter.partition_dim)
            whole[name] = part.clone()
        return whole
