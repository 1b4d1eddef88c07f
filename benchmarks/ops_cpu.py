"""Forward + backward time of each reference op on a CPU beside the code transformers runs without its kernels.

    python benchmarks/ops_cpu.py --dtype bf16 --threads 2

Shape: one layer of a ~10M-parameter model at 4 sequences of 512 tokens. The two sides take turns and the minima are
compared, so that other load on the machine hurts both alike.
"""

# t packed tokens, d hidden, h heads, p head_dim, g groups, n state, v vocabulary

import argparse
import ctypes
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.nemotron_h import modeling_nemotron_h as nemotron

from prism_kernels.activation import reference as activations
from prism_kernels.attention import reference as attentions
from prism_kernels.boundaries import Boundaries
from prism_kernels.conv import reference as convolutions
from prism_kernels.loss import reference as losses
from prism_kernels.norm import reference as norms
from prism_kernels.rope import reference as rotations
from prism_kernels.rope.angles import rope_table
from prism_kernels.scan import reference as scans
from prism_kernels.scan.inputs import ScanInputs
from prism_mcore.megatron_patches import ParallelLinear

BATCH, LENGTH, HIDDEN, HEADS, HEAD_DIM, VOCAB = 4, 512, 256, 8, 64, 8192
TOKENS, INNER = BATCH * LENGTH, HEADS * HEAD_DIM
Sides = tuple[Callable[[], None], Callable[[], None]]  # ours, the peer's


def leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


def both_ways(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of function(*inputs) with respect to every input that wants a gradient."""
    wanted = [x for x in inputs if x.requires_grad]
    with torch.no_grad():
        grad = torch.randn_like(function(*inputs))

    def run() -> None:
        torch.autograd.grad(function(*inputs), wanted, grad)

    return run


def scan(dtype: torch.dtype, groups: int, state: int, boundaries: Boundaries) -> Sides:
    x, dt = leaf(TOKENS, HEADS, HEAD_DIM, dtype=dtype), leaf(TOKENS, HEADS, dtype=dtype)
    B, C = (leaf(TOKENS, groups, state, dtype=dtype, scale=state**-0.5) for _ in range(2))
    A_log = torch.arange(1, HEADS + 1).float().log().requires_grad_()
    D, dt_bias = leaf(HEADS, dtype=torch.float32), torch.full((HEADS,), -3.0, requires_grad=True)

    def ours(*inputs):
        return scans.ssd_scan(ScanInputs(*inputs), boundaries, 128)

    def peer(x, dt, A_log, B, C, D, dt_bias):
        x, dt, B, C = (y.unflatten(0, (BATCH, LENGTH)) for y in (x, dt, B, C))
        y = nemotron.mamba2_chunk_scan(x, dt, -A_log.exp(), B, C, 128, D=D, dt_bias=dt_bias, dt_softplus=True)
        return y.flatten(0, 1).to(dtype)

    inputs = (x, dt, A_log, B, C, D, dt_bias)
    return both_ways(ours, *inputs), both_ways(peer, *inputs)


def conv(dtype: torch.dtype, boundaries: Boundaries) -> Sides:
    channels = INNER + 2 * 64
    x, weight, bias = leaf(TOKENS, channels, dtype=dtype), leaf(channels, 4, dtype=dtype), leaf(channels, dtype=dtype)

    def peer(x, weight, bias):
        rows = x.unflatten(0, (BATCH, LENGTH)).transpose(1, 2)
        return nemotron.causal_conv1d_fn(rows, weight, bias, activation="silu").transpose(1, 2).flatten(0, 1)

    inputs = (x, weight, bias)
    return both_ways(lambda x, w, b: convolutions.causal_conv1d(x, w, b, boundaries), *inputs), both_ways(peer, *inputs)


def rms_norm(dtype: torch.dtype) -> Sides:
    x, weight = leaf(TOKENS, HIDDEN, dtype=dtype), leaf(HIDDEN, dtype=dtype)
    norm = LlamaRMSNorm(HIDDEN, 1e-5).to(dtype)
    ours = both_ways(lambda x, w: norms.rms_norm(x, w, 1e-5), x, weight)
    return ours, both_ways(lambda x, w: norm(x), x, norm.weight)


def gated_rms_norm(dtype: torch.dtype) -> Sides:
    y, z, weight = leaf(TOKENS, INNER, dtype=dtype), leaf(TOKENS, INNER, dtype=dtype), leaf(INNER, dtype=dtype)
    norm = nemotron.NemotronHRMSNormGated(INNER, INNER // 2, 1e-5).to(dtype)
    ours = both_ways(lambda y, z, w: norms.gated_rms_norm(y, z, w, 1e-5, 2), y, z, weight)
    return ours, both_ways(lambda y, z, w: norm(y, z), y, z, norm.weight)


def swiglu(dtype: torch.dtype) -> Sides:
    x = leaf(TOKENS, 2 * 768, dtype=dtype)
    return both_ways(activations.swiglu, x), both_ways(lambda x: F.silu(x[:, :768]) * x[:, 768:], x)


def squared_relu(dtype: torch.dtype) -> Sides:
    x = leaf(TOKENS, 1024, dtype=dtype)
    return both_ways(activations.squared_relu, x), both_ways(lambda x: torch.square(F.relu(x)), x)


def rope(dtype: torch.dtype) -> Sides:
    q, k = leaf(TOKENS, 4, HEAD_DIM, dtype=dtype), leaf(TOKENS, 2, HEAD_DIM, dtype=dtype)
    cos, sin = rope_table(torch.arange(LENGTH).repeat(BATCH), HEAD_DIM, 10_000.0)
    wide = [x.unflatten(0, (BATCH, LENGTH)).to(dtype) for x in (cos, torch.cat([sin[:, 32:]] * 2, 1))]

    def ours(q, k):
        return torch.cat(rotations.rope(q, k, cos, sin), 1)

    def peer(q, k):
        q, k = (x.unflatten(0, (BATCH, LENGTH)).transpose(1, 2) for x in (q, k))
        return torch.cat(apply_rotary_pos_emb(q, k, *wide), 1).transpose(1, 2).flatten(0, 1)

    return both_ways(ours, q, k), both_ways(peer, q, k)


def attention(dtype: torch.dtype, boundaries: Boundaries) -> Sides:
    q, k, v = (leaf(TOKENS, heads, HEAD_DIM, dtype=dtype) for heads in (4, 2, 2))

    def peer(q, k, v):
        q, k, v = (x.unflatten(0, (BATCH, LENGTH)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return both_ways(lambda q, k, v: attentions.attention(q, k, v, boundaries, 0.125), q, k, v), both_ways(
        peer, q, k, v
    )


def cross_entropy(dtype: torch.dtype, fused: bool) -> Sides:
    hidden, weight = leaf(TOKENS, HIDDEN, dtype=dtype), leaf(VOCAB, HIDDEN, dtype=dtype, scale=HIDDEN**-0.5)
    labels = torch.randint(0, VOCAB, (TOKENS,))
    token_weights = torch.ones(TOKENS) if fused else None

    def ours(hidden, weight):
        result = losses.linear_cross_entropy(hidden, weight, labels, token_weights=token_weights, vocab_size=VOCAB)
        return result[0] if isinstance(result, tuple) else result.sum()

    def peer(hidden, weight):
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    return both_ways(ours, hidden, weight), both_ways(peer, hidden, weight)


def linear(dtype: torch.dtype) -> Sides:
    x, weight = leaf(TOKENS, HIDDEN, dtype=dtype), leaf(1024, HIDDEN, dtype=dtype)
    no_parallelism = (None, None, False, False, None, None, None)
    ours = both_ways(lambda x, weight: ParallelLinear.apply(x, weight, *no_parallelism), x, weight)
    return ours, both_ways(F.linear, x, weight)


def cases(dtype: torch.dtype) -> dict[str, Callable[[], Sides]]:
    even = Boundaries(torch.arange(0, TOKENS + 1, LENGTH, dtype=torch.int32))
    ragged = Boundaries(torch.tensor([0, 100, 300, 512, 1024, 1500, 1536, 2000, 2048, 2048], dtype=torch.int32))
    return {
        "scan g=1 n=64": lambda: scan(dtype, 1, 64, even),
        "scan g=1 n=128": lambda: scan(dtype, 1, 128, even),
        "scan g=2 n=128": lambda: scan(dtype, 2, 128, even),
        "scan g=1 n=64 ragged": lambda: scan(dtype, 1, 64, ragged),
        "conv": lambda: conv(dtype, even),
        "conv ragged": lambda: conv(dtype, ragged),
        "rms_norm": lambda: rms_norm(dtype),
        "gated_rms_norm": lambda: gated_rms_norm(dtype),
        "swiglu": lambda: swiglu(dtype),
        "squared_relu": lambda: squared_relu(dtype),
        "rope": lambda: rope(dtype),
        "attention": lambda: attention(dtype, even),
        "attention ragged": lambda: attention(dtype, ragged),
        "cross_entropy fused": lambda: cross_entropy(dtype, True),
        "cross_entropy logprobs": lambda: cross_entropy(dtype, False),
        "linear": lambda: linear(dtype),
    }


def minima(sides: Sides, rounds: int) -> list[float]:
    best = [float("inf")] * len(sides)
    for _ in range(rounds):
        for i, run in enumerate(sides):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12, help="turns of each side; the minimum counts")
    parser.add_argument("--only", default="", help="ops whose name contains this")
    args = parser.parse_args()
    # As prism_mcore.platform does, for both sides: never hand freed memory back, or page faults decide the comparison.
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.dtype}, {args.threads} threads, minimum of {args.rounds} turns")
    print(f"{'op, forward + backward':24} {'ours ms':>9} {'peer ms':>9} {'ratio':>7}")
    for name, make in cases({"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]).items():
        if args.only in name:
            ours, peer = minima(make(), args.rounds)
            print(f"{name:24} {ours * 1e3:9.2f} {peer * 1e3:9.2f} {peer / ours:7.2f}", flush=True)


if __name__ == "__main__":
    main()
