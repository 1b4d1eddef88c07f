"""Causal grouped-query attention: RoPE or none, explicit scale, sliding window, document boundaries."""

# t packed tokens, h query heads, k key/value heads (both of this rank), p head_dim

from copy import copy
from enum import Enum

import torch
from torch import Tensor, nn

from prism_kernels.boundaries import Boundaries, document_ends, longest_document
from prism_kernels.caches import PagedCache
from prism_mcore.model.context import ModelContext
from prism_mcore.model.linear import Input, column_linear, norm, project, row_linear
from prism_mcore.model.state import Decode, PackedTokens, State


class LastCausal(Enum):
    """The name of Transformer Engine's mask for the last queries of longer documents, which megatron-core lacks."""

    padding_causal_bottom_right = 1


class TransformerEngineAttention(nn.Module):
    """Transformer Engine's fused attention over packed documents, through megatron-core's wrapper."""

    def __init__(self, context: ModelContext):
        super().__init__()
        from megatron.core.extensions.transformer_engine import TEDotProductAttention
        from megatron.core.transformer.enums import AttnMaskType

        config = copy(context.config)
        config.context_parallel_size = 1  # its own wants every document padded, and else rounds their lengths down
        self.causal = AttnMaskType.padding_causal
        self.core = TEDotProductAttention(  # window and head counts come from the config
            config, 1, self.causal, "self", softmax_scale=context.spec.attention_scale
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, boundaries: Boundaries, keys: Boundaries) -> Tensor:
        """q [t, h, p], k and v [tk, hk, p] -> [t, h * p]; a document's queries are its last tokens."""
        from megatron.core.packed_seq_params import PackedSeqParams

        packed = PackedSeqParams(
            "thd",
            boundaries.derive(document_ends),
            keys.derive(document_ends),
            max_seqlen_q=boundaries.derive(longest_document),
            max_seqlen_kv=keys.derive(longest_document),
        )
        mask = self.causal if keys is boundaries else LastCausal.padding_causal_bottom_right
        return self.core(q, k, v, None, mask, packed_seq_params=packed)


class Attention(nn.Module):
    def __init__(self, context: ModelContext):
        super().__init__()
        spec = self.spec = context.spec
        self.kv_heads = spec.num_kv_heads // context.groups.tp_size
        self.heads_per_kv = spec.num_heads // spec.num_kv_heads
        width = spec.num_heads * spec.head_dim
        rows = width + 2 * spec.num_kv_heads * spec.head_dim
        self.qkv = column_linear(context, rows, spec.hidden_size, spec.qkv_bias)
        if spec.qk_norm:
            self.q_norm, self.k_norm = norm(context, spec.head_dim), norm(context, spec.head_dim)
        self.out_proj = row_linear(context, spec.hidden_size, width)
        self.apply_rope = context.ops["rope"]
        self.attention = (
            TransformerEngineAttention(context) if context.ops.uses_te("attention") else context.ops["attention"]
        )
        self.attention_decode = context.ops["attention_decode"]

    def cache(self, blocks: int, block_len: int, dtype: torch.dtype, device: torch.device) -> PagedCache:
        """Room for the keys and values of blocks * block_len tokens."""
        return PagedCache.allocate(blocks, block_len, self.kv_heads, self.spec.head_dim, dtype, device)

    def forward(self, x: Input, seq: PackedTokens, state: State | None = None) -> Tensor:
        """[t, 1, d] -> [t, 1, d]."""
        qkv = project(self.qkv, x, state)
        tokens, p = qkv.shape[0], self.spec.head_dim
        grouped = qkv.view(tokens, self.kv_heads, self.heads_per_kv + 2, p)
        q = grouped[:, :, :-2].reshape(tokens, -1, p)
        k, v = grouped[:, :, -2], grouped[:, :, -1]
        if self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if seq.rope is not None:
            q, k = self.apply_rope(q, k, *seq.rope)
        if state is not None:
            assert isinstance(state.cache, PagedCache), "an attention sub-layer caches keys and values"
            state.cache.write(state.step.rows, k, v)
        if state is not None and isinstance(state.step, Decode):
            y = self.attention_decode(
                q,
                state.cache,
                state.step.block_table,
                state.step.lengths,
                self.spec.attention_scale,
                self.spec.sliding_window,
            )
        elif seq.reach is not None:
            y = seq.reach.attention(self._attend, q, k, v, self.spec.sliding_window, seq.recomputed)
        else:
            y = self._attend(q, k, v, seq.boundaries)
        return project(self.out_proj, y.reshape(tokens, 1, -1), state)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, boundaries: Boundaries, keys: Boundaries | None = None
    ) -> Tensor:
        """keys: where those of each document are, the queries being its last tokens; None: as the queries."""
        if isinstance(self.attention, TransformerEngineAttention):
            return self.attention(q, k, v, boundaries, boundaries if keys is None else keys)
        scale, window = self.spec.attention_scale, self.spec.sliding_window
        return self.attention(q, k, v, boundaries, scale, window, *(() if keys in (None, boundaries) else (keys,)))
