"""FLOPs of a model: formulas, not measurements.

A multiply-add is 2 FLOPs. Counted are matrix products, attention over the keys a causal query sees, the SSD scan and
the short convolution; norms, activations, rotations and the optimizer are not. Backward is twice forward. Attention
counts the lower triangle only (as Megatron-Bridge does since 25.09), and so does the scan inside a chunk.
"""

# d hidden, v vocabulary, h heads, k key/value heads, p head_dim, f MLP width
# i Mamba inner width, H Mamba heads, g SSM groups, n SSM state, c conv kernel, Q chunk_len

from collections import Counter
from collections.abc import Collection

import numpy as np

from prism_mcore.model.spec import ATTENTION, LAYER_NAMES, MAMBA, MLP, ModelSpec


def mean_keys(seq_len: int, window: int | None = None) -> float:
    """Keys a causal query of one document of seq_len tokens sees on average, itself included."""
    window = min(window or seq_len, seq_len)
    return window - window * (window - 1) / (2 * seq_len)


def sublayer_flops(spec: ModelSpec, kind: str, seq_len: int) -> float:
    """Forward FLOPs per token of one sub-layer, in sequences of one document.

    attention  2d(h+2k)p + 2hpd for the projections, 4hp * mean_keys for scores and values
    MLP        6df with a gate, 4df without
    Mamba-2    2d(2i+2gn+H) + 2id for the projections, 2c(i+2gn) for the convolution, and for the scan per token
               (Q+1)/2 * (2gn + 2i) inside the chunk (C B^T, then times x), 4in for the chunk's state in and out,
               2in/Q to carry it on, 2i for the skip
    """
    d = spec.hidden_size
    if kind == ATTENTION:
        width, keys = spec.num_heads * spec.head_dim, mean_keys(seq_len, spec.sliding_window)
        return 2 * d * (2 * width + 2 * spec.num_kv_heads * spec.head_dim) + 4 * width * keys
    if kind == MLP:
        return (6 if spec.activation == "swiglu" else 4) * d * spec.ffn_size
    assert kind == MAMBA, kind
    inner, state, groups = spec.mamba_inner_size, spec.ssm_state_size, spec.ssm_groups * spec.ssm_state_size
    chunk = min(spec.chunk_len, seq_len)
    projections = 2 * d * (3 * inner + 2 * groups + spec.mamba_num_heads)
    conv = 2 * spec.conv_kernel * (inner + 2 * groups)
    scan = (chunk + 1) / 2 * (2 * groups + 2 * inner) + 4 * inner * state + 2 * inner * state / chunk + 2 * inner
    return projections + conv + scan


def head_flops(spec: ModelSpec) -> float:
    """Forward FLOPs per token of the output layer."""
    return 2 * spec.hidden_size * spec.vocab_size


def flops_per_token(spec: ModelSpec, seq_len: int, recompute: Collection[str] = ()) -> float:
    """Forward and backward FLOPs per token of the whole model: 3 times forward.

    With `recompute`, names of sub-layer types as in train.recompute, what the hardware really does: one more forward of
    those. Model FLOPs, which MFU is made of, are those without.
    """
    layers = sum(
        count * (4 if LAYER_NAMES[kind] in recompute else 3) * sublayer_flops(spec, kind, seq_len)
        for kind, count in Counter(spec.pattern).items()
    )
    return layers + 3 * head_flops(spec)


def flops_of_documents(spec: ModelSpec, lengths: np.ndarray) -> float:
    """Model FLOPs, forward and backward, over documents of so many tokens each, none of which sees another."""
    each = zip(*np.unique(lengths, return_counts=True), strict=True)
    return sum(int(count) * int(length) * flops_per_token(spec, int(length)) for length, count in each)
