"""One call of each op: inputs (meta tensors for compiling, real ones for counting and measuring), how the op is called,
and the fewest bytes it must move."""

# t packed tokens (rows of a decode step), d hidden, f MLP width, h heads, hk key heads, p head_dim, g groups, n state,
# c conv channels, k taps, v vocabulary (local)

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prism_kernels.boundaries import Boundaries
from prism_kernels.caches import ConvCache, PagedCache, ScanCache
from prism_kernels.fp8 import Quantized
from prism_kernels.rope.angles import rope_table
from prism_kernels.scan.inputs import ScanInputs

BLOCK_LEN = 64  # tokens in a block of the paged cache
EPS = 1e-5

Shape = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """One call of an op. Bytes are the fewest possible: what it reads and writes, once each; FLOPs are of products."""

    leaves: tuple[Tensor, ...]  # inputs whose gradients are wanted
    forward_bytes: int
    backward_bytes: int = 0
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    args: tuple = ()  # the positional arguments, for implementations with another signature
    kwargs: dict[str, Any] = field(default_factory=dict)
    returns: bool = True  # or its first argument holds the result


class Inputs:
    """Makes random inputs of a case on a device; the same ones every time."""

    def __init__(self, device: str, gradients: bool):
        self.device, self.gradients = torch.device(device), gradients
        self.generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def _random(self, *shape: int, dtype: torch.dtype, scale: float) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, device="meta", dtype=dtype)
        return torch.randn(shape, device=self.device, dtype=dtype, generator=self.generator).mul_(scale)

    def bf16(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self._random(*shape, dtype=torch.bfloat16, scale=scale).requires_grad_(self.gradients)

    def fp32(self, *shape: int, scale: float = 1.0, gradients: bool = True) -> Tensor:
        return self._random(*shape, dtype=torch.float32, scale=scale).requires_grad_(self.gradients and gradients)

    def fp8(self, m: int, k: int, dtype: torch.dtype, rows: int) -> Quantized:
        """[m, k]; rows: how many share a scale with the 128 numbers next to each other, 0: all share one."""
        scales = (-(-m // rows), -(-k // 128)) if rows else ()
        data = self._random(m, k, dtype=torch.float32, scale=1.0).to(dtype)
        return Quantized(data, torch.ones(scales, device=self.device))

    def columns(self, tokens: int, *widths: int) -> list[Tensor]:
        """bf16 [t, width] each, all column slices of one buffer, as a fused projection leaves them."""
        buffer = self._random(tokens, sum(widths), dtype=torch.bfloat16, scale=1.0)
        return [x.detach().requires_grad_(self.gradients) for x in buffer.split(list(widths), -1)]

    def integers(self, *shape: int, high: int, dtype: torch.dtype = torch.int64) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, device="meta", dtype=dtype)
        return torch.randint(high, shape, device=self.device, dtype=dtype, generator=self.generator)

    def arange(self, size: int) -> Tensor:
        return torch.arange(size, device=self.device)

    def one_document(self, tokens: int) -> Boundaries:
        """The whole batch one document; the boundaries of meta inputs are on the CPU, as nothing may wait for them."""
        device = "cpu" if self.device.type == "meta" else self.device
        return Boundaries(torch.tensor([0, tokens], dtype=torch.int32, device=device))


def size(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _work(
    args: tuple, leaves: Sequence[Tensor | None], forward_bytes: int, backward_bytes: int = 0, **rest: Any
) -> Work:
    wanted = tuple(x for x in leaves if x is not None and x.requires_grad)
    return Work(wanted, forward_bytes, backward_bytes, args=args, **rest)


# ------------------------------------------------------------------------------------- norms, elementwise, optimizer


def adamw(make: Inputs, shape: Shape, tokens: int) -> Work:
    """[t, d] parameters: fp32 masters, gradients and moments, and the model's bf16 copies."""
    size_of_each, count = (tokens, shape["d"]), shape["tensors"]
    masters, grads, means, squares = (
        [make.fp32(*size_of_each, gradients=False).abs_() for _ in range(count)] for _ in range(4)
    )
    copies = [x.to(torch.bfloat16) for x in masters]
    hyper = {"step": 2, "lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    moved = size(*masters, *means, *squares) * 2 + size(*grads, *copies)
    return _work((masters, grads, means, squares, copies), (), moved, kwargs=hyper, returns=False)


def rms_norm(make: Inputs, shape: Shape, tokens: int) -> Work:
    x, weight = make.bf16(tokens, shape["d"]), make.bf16(shape["d"])
    return _work((x, weight, EPS), (x, weight), size(x, x, weight), size(x, x, x, weight, weight))


def add_rms_norm(make: Inputs, shape: Shape, tokens: int) -> Work:
    x, branch, weight = make.bf16(tokens, shape["d"]), make.bf16(tokens, shape["d"]), make.bf16(shape["d"])
    backward = size(*[x] * 4, weight, weight)  # h and both results' gradients in, one gradient out for x and branch
    if shape["alpha"] != 1:
        backward += size(x)
    args = (x, branch, shape["alpha"], weight, EPS)
    return _work(args, (x, branch, weight), size(*[x] * 4, weight), backward)


def gated_rms_norm(make: Inputs, shape: Shape, tokens: int) -> Work:
    width = shape["i"]
    y, (z, _) = make.bf16(tokens, width), make.columns(tokens, width, shape["other"])
    weight = make.bf16(width)
    backward = size(*[y] * 5, weight, weight)
    return _work((y, z, weight, EPS, shape["g"]), (y, z, weight), size(y, y, y, weight), backward)


def activation(factor: int) -> Callable[[Inputs, Shape, int], Work]:
    """An MLP activation that reads factor * f columns and writes f."""

    def build(make: Inputs, shape: Shape, tokens: int) -> Work:
        x = make.bf16(tokens, factor * shape["f"])
        return _work((x,), (x,), size(x) + size(x) // factor, 2 * size(x) + size(x) // factor)

    return build


def fp8_amax(make: Inputs, shape: Shape, tokens: int) -> Work:
    x = make.bf16(tokens, shape["d"]).detach()
    return _work((x,), (), size(x))


def fp8_quantize(recipe: str) -> Callable[[Inputs, Shape, int], Work]:
    """Both FP8 copies of an activation; tensorwise, its amax is known."""

    def build(make: Inputs, shape: Shape, tokens: int) -> Work:
        x = make.bf16(tokens, shape["d"]).detach()
        amax = make.fp32(1, gradients=False).abs().squeeze(0) if recipe == "tensorwise" else None
        scales = 0 if amax is not None else 2 * 4 * x.numel() // 128
        return _work((x, recipe, torch.float8_e4m3fn, amax), (), 2 * size(x) + scales)

    return build


def fp8_quantize_weight(make: Inputs, shape: Shape, tokens: int) -> Work:
    """A weight [tokens, d] in blocks, read across its rows as the gradient of a layer's input needs it."""
    weight = make.bf16(tokens, shape["d"]).detach()
    return _work((weight.t(), "blockwise", torch.float8_e4m3fn), (), size(weight) * 3 // 2)


def fp8_linear(recipe: str, gradient: str = "") -> Callable[[Inputs, Shape, int], Work]:
    """[t, d] times a square weight, or with `gradient` "x" or "weight" one of its gradients, in FP8."""

    def build(make: Inputs, shape: Shape, tokens: int) -> Work:
        d, tensorwise = shape["d"], recipe == "tensorwise"
        m, k, n = (d, tokens, d) if gradient == "weight" else (tokens, d, d)
        first = torch.float8_e5m2 if gradient and tensorwise else torch.float8_e4m3fn
        a = make.fp8(m, k, first, 0 if tensorwise else 1)
        b = make.fp8(n, k, torch.float8_e4m3fn, 0 if tensorwise else 1 if gradient == "weight" else 128)
        moved = size(a.data, a.scale_inv, b.data, b.scale_inv) + 2 * m * n
        return _work((a, b, torch.bfloat16), (), moved, forward_flops=2 * m * n * k)

    return build


def rms_norm_quantize(recipe: str) -> Callable[[Inputs, Shape, int], Work]:
    """The residual sum and its norm's two FP8 copies: tensorwise, h is read again once its amax is known."""

    def build(make: Inputs, shape: Shape, tokens: int) -> Work:
        x, branch = (make.bf16(tokens, shape["d"]).detach() for _ in range(2))
        weight = make.bf16(shape["d"]).detach()
        # Read x and branch, write h; read h, which every row's statistic needs whole, write both copies.
        moved = 5 * size(x) + size(weight) + (2 * 4 * x.numel() // 128 if recipe == "blockwise" else 0)
        return _work((x, branch, shape["alpha"], weight, EPS, recipe), (), moved)

    return build


def activation_quantize(factor: int, recipe: str) -> Callable[[Inputs, Shape, int], Work]:
    """An activation's two FP8 copies: tensorwise its input is read twice, in blocks once."""

    def build(make: Inputs, shape: Shape, tokens: int) -> Work:
        x = make.bf16(tokens, factor * shape["f"]).detach()
        elements = tokens * shape["f"]
        reads = 2 if recipe == "tensorwise" else 1
        scales = 2 * 4 * elements // 128 if recipe == "blockwise" else 0
        return _work((x, recipe), (), reads * size(x) + 2 * elements + scales)

    return build


def rope(make: Inputs, shape: Shape, tokens: int) -> Work:
    q, k, _ = _qkv(make, shape, tokens)
    cos, sin = rope_table(make.arange(tokens), shape["p"], 10_000.0)
    moved = size(q, q, k, k) + size(cos, sin) // 2  # both halves of a row of cos and of sin hold the same numbers
    return _work((q, k, cos, sin), (q, k), moved, moved)


def _qkv(make: Inputs, shape: Shape, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """As model/attention.py makes them of the fused projection: q copied together, k and v views."""
    h, hk, p = shape["h"], shape["hk"], shape["p"]
    (qkv,) = make.columns(tokens, (h + 2 * hk) * p)
    grouped = qkv.detach().view(tokens, hk, h // hk + 2, p)
    parts = grouped[:, :, :-2].reshape(tokens, h, p), grouped[:, :, -2], grouped[:, :, -1]
    q, k, v = (x.detach().requires_grad_(make.gradients) for x in parts)
    return q, k, v


# --------------------------------------------------------------------------------------------------------- Mamba-2


def causal_conv1d(make: Inputs, shape: Shape, tokens: int) -> Work:
    c, taps = shape["c"], shape["k"]
    _, x = make.columns(tokens, shape["other"], c)
    weight, bias = make.bf16(c, taps), make.bf16(c)
    backward = size(x, x, x, weight, weight, bias, bias)
    args = (x, weight, bias, make.one_document(tokens))
    return _work(args, (x, weight, bias), size(x, x, weight, bias), backward)


def conv_step(make: Inputs, shape: Shape, tokens: int) -> Work:
    c, taps = shape["c"], shape["k"]
    _, x = make.columns(tokens, shape["other"], c)
    cache, weight, bias = ConvCache(make.bf16(2 * tokens, c, taps - 1)), make.bf16(c, taps), make.bf16(c)
    moved = size(x, x, weight, bias, cache.state)  # half of the slots, read and written
    return _work((x, weight, bias, cache, make.arange(tokens)), (), moved)


def _scan_inputs(make: Inputs, shape: Shape, tokens: int) -> tuple[ScanInputs, tuple[Tensor, ...]]:
    h, p, g, n = (shape[key] for key in "hpgn")
    x, B, C = make.columns(tokens, h * p, g * n, g * n)
    dt, _ = make.columns(tokens, h, 2 * h * p)
    x, B, C = (
        y.detach().unflatten(-1, s).requires_grad_(make.gradients) for y, s in ((x, (h, p)), (B, (g, n)), (C, (g, n)))
    )
    A_log, D, dt_bias = make.fp32(h), make.fp32(h), make.fp32(h)
    tensors = (x, dt, A_log, B, C, D, dt_bias)
    return ScanInputs(*tensors), tensors


def ssd_scan(make: Inputs, shape: Shape, tokens: int) -> Work:
    inputs, tensors = _scan_inputs(make, shape, tokens)
    flops = scan_flops(shape, tokens)
    return _work(
        (inputs, make.one_document(tokens), shape["chunk"]),
        tensors,
        size(*tensors, inputs.x),
        size(*tensors, *tensors, inputs.x),
        forward_flops=flops,
        backward_flops=2.5 * flops,
    )


def scan_flops(shape: Shape, tokens: int) -> float:
    """Of the chunked algorithm (arXiv 2405.21060, section 6), the lower triangle of each chunk only."""
    h, p, g, n, chunk = (shape[key] for key in ("h", "p", "g", "n", "chunk"))
    within = chunk * (g * n + h * p)  # C B and its product with x: 2 * chunk / 2 pairs per token
    return tokens * (within + 4 * h * p * n)


def ssd_step(make: Inputs, shape: Shape, tokens: int) -> Work:
    inputs, tensors = _scan_inputs(make, shape, tokens)
    cache = ScanCache(make.fp32(2 * tokens, shape["h"], shape["p"], shape["n"]))
    slots = make.arange(tokens)
    moved = size(*tensors, inputs.x, cache.state)  # half of the slots, read and written
    return _work((inputs, cache, slots, slots), (), moved)


# ------------------------------------------------------------------------------------------------- attention, loss


def attention(make: Inputs, shape: Shape, tokens: int) -> Work:
    q, k, v = _qkv(make, shape, tokens)
    flops = 4 * shape["h"] * shape["p"] * attended_pairs(tokens, shape["window"])
    args = (q, k, v, make.one_document(tokens), shape["p"] ** -0.5, shape["window"])
    statistics = 4 * tokens * shape["h"]  # the log-sum-exp of each row
    forward = size(q, q, k, v) + statistics
    backward = size(*[q] * 4, *[k] * 4) + statistics
    return _work(args, (q, k, v), forward, backward, forward_flops=flops, backward_flops=2.5 * flops)


def attended_pairs(tokens: int, window: int | None) -> int:
    """(query, key) pairs of one document that causal attention may see."""
    w = min(window or tokens, tokens)
    return w * (w + 1) // 2 + (tokens - w) * w


def attention_decode(make: Inputs, shape: Shape, tokens: int) -> Work:
    h, hk, p, context = shape["h"], shape["hk"], shape["p"], shape["context"]
    q, per_row = make.bf16(tokens, h, p), -(-context // BLOCK_LEN)
    blocks = tokens * per_row
    cache = PagedCache(make.bf16(blocks, BLOCK_LEN, hk, p), make.bf16(blocks, BLOCK_LEN, hk, p))
    table = make.arange(blocks).flip(0).view(tokens, per_row).to(torch.int32)
    lengths = torch.full((tokens,), context, dtype=torch.int32, device=make.device)
    seen = min(shape["window"] or context, context)
    moved = size(q, q) + size(cache.keys, cache.values) * seen // context
    args = (q, cache, table, lengths, p**-0.5, shape["window"])
    return _work(args, (), moved, forward_flops=4 * tokens * h * p * seen)


def linear_cross_entropy(weighted: bool) -> Callable[[Inputs, Shape, int], Work]:
    """The loss of training (gradients in the forward pass, 3 products), or log-probabilities (4 products)."""

    def build(make: Inputs, shape: Shape, tokens: int) -> Work:
        d, v = shape["d"], shape["v"]
        hidden, weight = make.bf16(tokens, d), make.bf16(v, d, scale=d**-0.5)
        labels = make.integers(tokens, high=v)
        weights = torch.full((tokens,), 1 / tokens, device=make.device) if weighted else None
        kwargs = {"token_weights": weights, "logits_divisor": shape["divisor"], "vocab_size": v}
        product = 2.0 * tokens * d * v
        once = size(hidden, weight)
        return _work(
            (hidden, weight, labels),
            (hidden, weight),
            once * (2 if weighted else 1),
            0 if weighted else 2 * once,
            kwargs=kwargs,
            forward_flops=product * (3 if weighted else 1),
            backward_flops=0 if weighted else 3 * product,
        )

    return build


def differentiable(outputs: Any) -> list[Tensor]:
    """The results of a call that gradients flow back from."""
    results = outputs if isinstance(outputs, tuple) else (outputs,)
    return [x for x in results if isinstance(x, Tensor) and x.requires_grad]
