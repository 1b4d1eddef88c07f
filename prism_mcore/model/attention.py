"""Causal grouped-query attention: RoPE or none, explicit scale, sliding window, document boundaries."""

# t packed tokens, h query heads, k key/value heads (both of this rank), p head_dim

from torch import Tensor, nn

from prism_mcore.model.linear import Build, column_linear, row_linear
from prism_mcore.model.sequence import Sequence


class Attention(nn.Module):
    def __init__(self, build: Build):
        super().__init__()
        spec = self.spec = build.spec
        self.kv_heads = spec.num_kv_heads // build.groups.tp_size
        self.heads_per_kv = spec.num_heads // spec.num_kv_heads
        width = spec.num_heads * spec.head_dim
        self.qkv = column_linear(build, width + 2 * spec.num_kv_heads * spec.head_dim, spec.hidden_size)
        self.out_proj = row_linear(build, spec.hidden_size, width)
        self.apply_rope, self.attention = build.ops["rope"], build.ops["attention"]

    def forward(self, x: Tensor, seq: Sequence, state: None = None) -> Tensor:
        """[t, 1, d] -> [t, 1, d]."""
        qkv, _ = self.qkv(x)
        tokens, p = qkv.shape[0], self.spec.head_dim
        grouped = qkv.view(tokens, self.kv_heads, self.heads_per_kv + 2, p)
        q = grouped[:, :, :-2].reshape(tokens, -1, p)
        k, v = grouped[:, :, -2], grouped[:, :, -1]
        if seq.rope is not None:
            q, k = self.apply_rope(q, k, *seq.rope)
        y = self.attention(q, k, v, seq.boundaries, self.spec.attention_scale, self.spec.sliding_window)
        return self.out_proj(y.reshape(tokens, 1, -1))[0]
