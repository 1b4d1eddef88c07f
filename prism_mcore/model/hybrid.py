"""HybridModel: the one model, for dense transformers and attention-Mamba hybrids, whole or one pipeline chunk of it."""

# t packed tokens (t / tp of them where activations are sequence-parallel), d hidden

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prism_kernels.boundaries import Boundaries, longest_document
from prism_kernels.matmul import mm
from prism_kernels.rope.angles import rope_table
from prism_mcore.batch import PackedBatch
from prism_mcore.model.attention import Attention
from prism_mcore.model.context import ModelContext
from prism_mcore.model.context_shard import ContextShard
from prism_mcore.model.linear import Input, add_and_norm, norm, residual_sum
from prism_mcore.model.mamba import GLOBAL_NAMES, Mamba
from prism_mcore.model.mlp import MLP
from prism_mcore.model.parameters import Parameter, padded_vocabulary, parameters
from prism_mcore.model.shared_prefix import SharedPrefixes
from prism_mcore.model.state import Cache, Decode, PackedTokens, Prefill, State
from prism_mcore.model.tensors import draw, shard

MIXERS: dict[str, type[nn.Module]] = {"*": Attention, "-": MLP, "M": Mamba}


class Block(nn.Module):
    """One sub-layer: x + residual_multiplier * mixer(norm(x)).

    The sum is left to the next sub-layer, whose norm reads it anyway: hidden states travel as (x, branch).
    """

    def __init__(self, context: ModelContext, kind: str, recompute: bool):
        super().__init__()
        self.norm, self.mixer = norm(context, context.spec.hidden_size), MIXERS[kind](context)
        self.residual_multiplier, self.recompute = context.spec.residual_multiplier, recompute
        self.exact = context.ops.uses_exact("add_rms_norm")
        self.config, self.fp8 = context.config, context.fusing("rms_norm_quantize", "rms_norm", "add_rms_norm")

    def forward(
        self, x: Tensor, seq: PackedTokens, branch: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, Tensor]:
        """The previous sub-layer's (x, branch) -> this one's, each [t, 1, d]; no branch: x is the whole."""
        if self.recompute and torch.is_grad_enabled():
            x = self.total(x, branch)  # one tensor to keep instead of two
            seq = replace(seq, recomputed=True)
            # Nothing here draws random numbers, so there is no state to restore.
            return x, checkpoint(self.branch, x, seq, use_reentrant=False, preserve_rng_state=False)
        normed, x = self.normed(x, branch)
        return x, self.mixer(normed, seq, state)

    def branch(self, x: Tensor, seq: PackedTokens) -> Tensor:
        return self.mixer(self.normed(x, None)[0], seq)

    def normed(self, x: Tensor, branch: Tensor | None) -> tuple[Input, Tensor]:
        """(norm(h), h) of the hidden states h; in FP8 where a kernel does both, and no tokens are to be gathered."""
        fused = self.fp8 is not None and self.fp8.enabled and not self.config.sequence_parallel
        return add_and_norm(self.norm, x, branch, self.residual_multiplier, self.fp8 if fused else None)

    def total(self, x: Tensor, branch: Tensor | None) -> Tensor:
        """The hidden states that (x, branch) stands for."""
        return residual_sum(x, branch, self.residual_multiplier, self.exact)


class Embedding(VocabParallelEmbedding):
    """Token ids -> hidden states, scaled; sharded over the vocabulary."""

    def __init__(self, context: ModelContext):
        spec, groups = context.spec, context.groups
        super().__init__(
            padded_vocabulary(spec, groups.tp_size),
            spec.hidden_size,
            init_method=lambda weight: weight,
            reduce_scatter_embeddings=context.config.sequence_parallel,
            config=context.config,
            tp_group=groups.tp,
        )
        self.multiplier = spec.embedding_multiplier

    def forward(self, tokens: Tensor) -> Tensor:
        """[t] -> [t, 1, d], or this rank's [t / tp, 1, d] under sequence parallelism."""
        x = super().forward(tokens.view(1, -1))  # sequence-parallel: already [t / tp, 1, d]
        x = x if self.reduce_scatter_embeddings else x.transpose(0, 1)
        return x if self.multiplier == 1 else x * self.multiplier


class Head(nn.Module):
    """Final hidden states -> loss and log-probs, vocabulary-parallel, never holding the logits of the whole batch."""

    def __init__(self, context: ModelContext, weight: Tensor | None):
        super().__init__()
        self.context = context
        rows = padded_vocabulary(context.spec, context.groups.tp_size) // context.groups.tp_size
        if weight is None:
            self.weight = nn.Parameter(torch.empty(rows, context.spec.hidden_size, dtype=context.config.params_dtype))
        self.linear_cross_entropy, self.lm_logits = context.ops["linear_cross_entropy"], context.ops["lm_logits"]

    def forward(self, use: Callable[..., Any], *arguments: Any) -> Any:
        """`output(Head.loss, ...)`: overlapped parameter gathering waits for a module's weight when it is called."""
        return use(self, *arguments)

    def loss(self, x: Tensor, labels: Tensor, loss_mask: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """[t, 1, d], labels [t], mask [t] -> sum of -log p over unmasked labels, log p of every label [t] fp32."""
        weight = self.weight if weight is None else weight
        if not torch.is_grad_enabled():
            weight = weight.detach()  # an autograd.Function cannot see no_grad: it would compute the weight's gradient
        return self.linear_cross_entropy(
            self._all_tokens(x),
            weight,
            labels,
            token_weights=loss_mask.float(),
            logits_divisor=self.context.spec.logits_divisor,
            vocab_size=self.context.spec.vocab_size,
            group=self.context.groups.tp if self.context.groups.tp_size > 1 else None,
        )

    def policy(self, x: Tensor, labels: Tensor, weight: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
        """[t, 1, d], labels [t] -> log p of every label under softmax(logits / temperature), and its entropy; [t] fp32.

        The log-probs are differentiable, and their logits not rounded: the sampler's are not either.
        """
        spec, groups = self.context.spec, self.context.groups
        return self.linear_cross_entropy(
            self._all_tokens(x),
            self.weight if weight is None else weight,
            labels,
            token_weights=None,
            logits_divisor=spec.logits_divisor * temperature,
            vocab_size=spec.vocab_size,
            group=groups.tp if groups.tp_size > 1 else None,
            return_entropy=True,
            fp32_logits=True,
        )

    def logits(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """[t, 1, d] -> logits [t, v] fp32 of the whole vocabulary, unpadded, on every rank; no gradients."""
        spec, groups = self.context.spec, self.context.groups
        mine = mm(self._all_tokens(x), (self.weight if weight is None else weight).t())
        ranks = [torch.empty_like(mine) for _ in range(groups.tp_size)]
        dist.all_gather(ranks, mine, group=groups.tp)
        return torch.cat(ranks, dim=-1)[:, : spec.vocab_size].float() / spec.logits_divisor

    def local_logits(self, x: Tensor, weight: Tensor | None, temperature: float) -> Tensor:
        """[n, 1, d] -> logits / temperature [n, v] fp32 of this rank's part of the vocabulary, without padding."""
        spec, groups = self.context.spec, self.context.groups
        weight = self.weight if weight is None else weight
        rows = max(0, min(len(weight), spec.vocab_size - groups.tp_rank * len(weight)))
        return self.lm_logits(x.squeeze(1), weight[:rows], spec.logits_divisor * temperature)

    def _all_tokens(self, x: Tensor) -> Tensor:
        """[t, 1, d], or a sequence-parallel part of it, -> [t, d]."""
        tp = self.context.groups.tp
        if self.context.config.sequence_parallel:
            return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=tp).squeeze(1)
        return copy_to_tensor_model_parallel_region(x, group=tp).squeeze(1)


class HybridModel(MegatronModule):
    """A pipeline chunk of the model: the sub-layers `layers`, the embedding before the first, the head after the last.

    Megatron-core's schedules, DDP and optimizers see a module with `set_input_tensor`, `pre_process` and the shared
    embedding protocol. Parameter names carry global sub-layer indices: `layers.7.mixer.qkv.weight`.
    """

    def __init__(
        self, context: ModelContext, layers: list[int], *, recompute: frozenset[str] = frozenset(), vp_stage: int = 0
    ):
        super().__init__(config=context.config)
        spec = self.spec = context.spec
        self.context, self.vp_stage, self.model_type = context, vp_stage, ModelType.encoder_or_decoder
        self.pre_process = bool(layers) and layers[0] == 0
        self.post_process = bool(layers) and layers[-1] == len(spec.pattern) - 1
        self.share_embeddings_and_output_weights = spec.tied_embeddings
        self.input_tensor: Tensor | None = None

        if self.pre_process:
            self.embedding = Embedding(context)
        self.layers = nn.ModuleDict(
            {str(i): Block(context.of_layer(i), spec.pattern[i], spec.pattern[i] in recompute) for i in layers}
        )
        if self.post_process:
            self.final_norm = norm(context, spec.hidden_size)
            self.output = Head(context, self.embedding.weight if self.pre_process and spec.tied_embeddings else None)
        self._mark_parameters()

    def forward(
        self, batch: PackedBatch, logits: bool = False, temperature: float | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Hidden states [t, 1, d] for the next stage; from the last stage (loss sum in nats, log-probs [t] fp32).

        With `logits` the last stage adds those of the whole vocabulary, [t, v] fp32 and without gradients. With a
        `temperature` it returns (log-probs [t] fp32 at it, differentiable; entropies [t] fp32).
        """
        x, branch = self._run_layers(batch)
        if not self.post_process:
            return residual_sum(x, branch, self.spec.residual_multiplier)
        assert batch.labels is not None and batch.loss_mask is not None, "the loader gives the last stage its labels"
        tied = self._tied_weight()
        x, _ = add_and_norm(self.final_norm, x, branch, self.spec.residual_multiplier)
        if temperature is not None:
            return self.output(Head.policy, x, batch.labels.flatten(), tied, temperature)
        loss = self.output(Head.loss, x, batch.labels.flatten(), batch.loss_mask.flatten(), tied)
        return (*loss, self.output(Head.logits, x.detach(), tied)) if logits else loss

    def hidden(self, batch: PackedBatch, rows: Tensor) -> Tensor:
        """Hidden states [n, 1, d] of the tokens `rows` [n] after the final norm, without gradients of the others.

        The model is whole on this rank or its TP group. A last MLP, which acts on single tokens, sees these alone.
        """
        x, branch = self._run_layers(batch, rows)
        return add_and_norm(self.final_norm, x, branch, self.spec.residual_multiplier)[0]

    def _run_layers(self, batch: PackedBatch, rows: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The stream [t, 1, d] before the last sub-layer's output is added to it, and that output; of `rows` alone."""
        seq = self._sequence(batch)
        if self.pre_process:
            assert batch.tokens is not None, "the loader gives the first stage its tokens"
            x = self.embedding(batch.tokens.flatten())
        else:
            assert self.input_tensor is not None, "the schedule gives the later stages theirs"
            x = self.input_tensor
        branch: Tensor | None = None
        for number, layer in enumerate(self.layers.values(), start=1):
            if rows is not None and number == len(self.layers) and isinstance(layer.mixer, MLP):
                x, branch, rows = x[rows], None if branch is None else branch[rows], None
            x, branch = layer(x, seq, branch)
        return (x, branch) if rows is None else (x[rows], None if branch is None else branch[rows])

    def _sequence(self, batch: PackedBatch) -> PackedTokens:
        device, cp = batch.position_ids.device, self.context.groups.cp
        angles = self.rope(batch.position_ids.flatten())
        if cp.size() > 1:
            shard = ContextShard(cp, device, Boundaries(batch.cu_seqlens))
            return PackedTokens(shard.pieces, shard.pieces.derive(longest_document), angles, shard)
        shared = None if batch.parents is None else SharedPrefixes.of(device, batch.cu_seqlens, batch.parents)
        boundaries = Boundaries.on(device, batch.cu_seqlens)
        return PackedTokens(boundaries, batch.max_seqlen, angles, shared)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rotary angles of tokens at these positions [t]; None where the model has no positional encoding."""
        if self.spec.position != "rope":
            return None
        scaling = self.spec.rope_scaling.as_config() if self.spec.rope_scaling else None
        return rope_table(positions, self.spec.head_dim, self.spec.rope_theta, scaling)

    def _tied_weight(self) -> Tensor | None:
        return self.embedding.weight if self.pre_process and self.spec.tied_embeddings else None

    # Generation: the same sub-layers, with caches. The whole model is on this rank or its tensor-parallel group.

    def caches(self, slots: int, blocks: int, block_len: int) -> dict[str, Cache]:
        """Empty caches by sub-layer for `slots` sequences, or `blocks` * block_len tokens, as its kind needs."""
        dtype, device = self.config.params_dtype, next(self.parameters()).device
        made: dict[str, Cache] = {}
        for name, layer in self.layers.items():
            if isinstance(layer.mixer, Attention):
                made[name] = layer.mixer.cache(blocks, block_len, dtype, device)
            else:
                made[name] = layer.mixer.cache(slots, dtype, device) if isinstance(layer.mixer, Mamba) else None
        return made

    def advance(self, tokens: Tensor, seq: PackedTokens, step: Prefill | Decode, caches: dict[str, Cache]) -> Tensor:
        """Tokens [t] continue the sequences that `step` names: hidden states [t, 1, d] after the final norm.

        Under tensor parallelism every rank gets all tokens, and `whole_sequences` must be in force.
        """
        x, branch = self.embedding(tokens), None
        with self.context.fp8.step(step) if self.context.fp8 else nullcontext():
            for name, layer in self.layers.items():
                x, branch = layer(x, seq, branch, State(step, caches[name]))
        return add_and_norm(self.final_norm, x, branch, self.spec.residual_multiplier)[0]

    def next_logits(self, x: Tensor, temperature: float) -> Tensor:
        """Hidden states [n, 1, d] -> logits / temperature [n, v] fp32 of this rank's part of the vocabulary."""
        return self.output(Head.local_logits, x, self._tied_weight(), temperature)

    def release_kept_weights(self) -> None:
        """Free the weights in FP8 that decoding steps read, a byte a number; without them they are quantised again."""
        if self.context.fp8:
            self.context.fp8.kept.clear()

    def without_fp8(self) -> AbstractContextManager[None]:
        """Inside, all products are of the model's own precision."""
        return self.context.fp8.off() if self.context.fp8 else nullcontext()

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Inside, activations are not sharded over tensor-parallel ranks: a decoding step has too few tokens."""
        if not self.config.sequence_parallel:
            yield
            return
        places = [m for m in self.modules() if getattr(m, "sequence_parallel", False)] + [self.config]
        try:
            for place in places:
                place.sequence_parallel = False
            self.embedding.reduce_scatter_embeddings = False
            yield
        finally:
            for place in places:
                place.sequence_parallel = True
            self.embedding.reduce_scatter_embeddings = True

    # What megatron-core asks of a model.

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """The previous stage's hidden states, given by the pipeline schedule before each forward."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight: the embedding's on the first stage, its copy on the last."""
        if self.pre_process:
            return self.embedding.weight
        return self.output.weight if self.post_process else None

    # What the table of parameters says of each of ours.

    def global_name(self, name: str) -> str:
        """The name of a local parameter in the table; the last stage's copy of a tied embedding is the embedding."""
        if name == "output.weight" and self.spec.tied_embeddings:
            return "embedding.weight"
        local = next((local for local in GLOBAL_NAMES if name.endswith(f".{local}")), "")
        return name.removesuffix(local) + GLOBAL_NAMES[local] if local else name

    def table(self) -> list[tuple[str, nn.Parameter, Parameter]]:
        """(global name, local tensor, its row of the table) for every parameter of this chunk."""
        table = parameters(self.spec, self.context.groups.tp_size)
        named = [(self.global_name(name), tensor) for name, tensor in self.named_parameters()]
        return [(name, tensor, table[name]) for name, tensor in named]

    def _mark_parameters(self) -> None:
        sequence_parallel = self.context.config.sequence_parallel
        for name, tensor, parameter in self.table():
            tensor.tensor_model_parallel = parameter.tp_axis is not None
            tensor.partition_dim = -1 if parameter.tp_axis is None else parameter.tp_axis
            tensor.partition_stride = 1
            # Replicated over ranks, but each rank sees a part of what it acts on: its tokens, or its heads.
            by_heads = parameter.tp_axis is None and ".mixer." in name
            tensor.sequence_parallel = by_heads or (sequence_parallel and parameter.tp_axis is None)
            tensor.sum_over_tp = (
                by_heads and not sequence_parallel
            )  # megatron-core sums only under sequence parallelism
            # The copy of a tied embedding on the last stage counts once in the gradient norm.
            tensor.shared = name == "embedding.weight" and not self.pre_process
            # A bucket of its own on both stages: sharded alike over data-parallel ranks, whose shards are then summed.
            tied = name == "embedding.weight" and self.spec.tied_embeddings
            tensor.shared_embedding = tied and not (self.pre_process and self.post_process)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Random weights that depend on (seed, global name) alone, so that every layout starts from the same model."""
        groups = self.context.groups
        for name, tensor, parameter in self.table():
            tensor.copy_(shard(draw(name, parameter, seed), parameter, groups.tp_rank, groups.tp_size))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets=(), metadata: dict | None = None
    ) -> ShardedStateDict:
        """megatron-core's description of every parameter for distributed checkpoints; keys know no layout."""
        return {name: self._sharded(name, tensor, parameter) for name, tensor, parameter in self.table()}

    def _sharded(self, name: str, tensor: nn.Parameter, parameter: Parameter) -> ShardedTensor | ShardedTensorFactory:
        groups, axis = self.context.groups, parameter.tp_axis
        replica = (int(tensor.shared), groups.tp_rank if axis is None else 0, groups.dp_cp.rank())
        offsets = [] if axis is None else [(axis, groups.tp_rank, groups.tp_size)]

        def piece(key: str, data: Tensor, replica_id) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(
                key, data, *offsets, replica_id=replica_id, allow_shape_mismatch=parameter.vocabulary
            )

        if not parameter.parts:
            return piece(name, tensor, replica)
        parts_axis = 0 if axis is None else axis
        sizes = [size // (1 if axis is None else groups.tp_size) for size in parameter.parts]

        def split(key: str, data: Tensor, replica_id, flattened_range) -> list[ShardedTensor]:
            pieces = data.split(sizes, dim=parts_axis)
            return [piece(f"{key}.{n}", p, replica_id) for n, p in zip(parameter.names, pieces, strict=True)]

        return ShardedTensorFactory(name, tensor, split, lambda pieces: torch.cat(pieces, dim=parts_axis), replica)
