"""Vocabulary-parallel cross entropy fused with the output projection, for GPUs: cuBLAS products and one Triton kernel.

The logits of a chunk go through memory once in bf16: a product writes them, one kernel reads them for the row's
statistics and again, from the L2 cache, to put the gradient in their place, and two products read that. A product that
kept the logits on the chip would save 2 of 37 ms at 8,192 x 4,096 x 128k (4.2 GB at 3 TB/s) and would have to reach
cuBLAS's rate to gain anything: published fused kernels in Triton run at a third to two thirds of it.

The weight's gradient is summed over chunks of tokens by the products themselves, in the weight's dtype: fp32 sums would
be 2.1 GB at 4,096 x 128k. Where the gradient comes later (log-probabilities), logits are computed again, in chunks of
the vocabulary: then nothing of the weight's size is summed, and the sum for hidden is fp32.
"""

# t packed tokens, n tokens of a chunk, d hidden, v vocabulary (local rows that are real tokens)

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.backends import Uncovered
from prism_kernels.loss import CHUNK_BYTES, MOST_ROUNDED_SUMS
from prism_kernels.loss.reference import Shard, check_inputs, chunks, join_shards

LOG_2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-1e30)  # less than any logit; finite, so that differences of two are 0 and not nan
TILE_TOKENS = 128  # chunks are multiples of it: the height of cuBLAS's tiles

# A compile-time choice, not yet a measurement. 16 warps with eight 16-byte loads a thread: 64 KB in flight (Hopper
# needs some 20 of an SM for 3.35 TB/s) and 88 to 106 registers, so that one row per SM is at work and the rows at work
# (132 x 256 KB) stay in the L2 cache between their two readings. fp32 logits: four loads take 99 registers, eight 127.
NUM_WARPS = 16
ROW_LOADS = {2: 8, 4: 4}  # by bytes of a logit

SCALE_PROGRAMS, SCALE_BLOCK = 1056, 4096  # 8 to an SM


@triton.jit
def _tile(row, start, vocabulary, width, scale, SUB: tl.constexpr, W: tl.constexpr):
    """[SUB, W] columns from `start` on and their logits in fp32, base 2; the lowest number beyond the vocabulary."""
    columns = start + tl.arange(0, SUB)[:, None] * W + tl.arange(0, W)[None, :]
    # The mask is one of whole vectors (width is a multiple of 16), the vocabulary's end may not be.
    x = tl.load(row + columns, mask=columns < width, other=0.0).to(tl.float32) * scale
    return columns, tl.where(columns < vocabulary, x, LOWEST)


@triton.jit
def cross_entropy_kernel(
    logits,  # [n, width]
    grad,  # [n, width] in the inputs' dtype: the logits' own memory where they have it
    labels,  # [n] int64
    weights,  # [n] fp32: the gradient of the loss for -log p of each row
    lse,  # [n] fp32 log-sum-exp: written with STATISTICS, else read
    target,  # [n] fp32 the label's logit, or 0
    mean,  # [n] fp32 mean logit under the softmax
    first,  # the vocabulary's index of column 0
    vocabulary,  # columns that are real tokens
    width,  # columns in memory, a multiple of 16
    divisor,
    STATISTICS: tl.constexpr,
    ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr,
    SUB: tl.constexpr,
    W: tl.constexpr,
):
    """One row: its statistics, its gradient weight * (softmax - onehot) / divisor, or both. Logits are kept in base 2.

    A lane holds W columns' running maxima and sums; SUB rows of a tile are reduced within a thread first.
    """
    TILE: tl.constexpr = SUB * W
    row = tl.program_id(0)
    x_row = logits + row.to(tl.int64) * width
    scale = 1.4426950408889634 / divisor
    tiles = tl.cdiv(vocabulary, TILE)
    label = (tl.load(labels + row) - first).to(tl.int32)
    ours = (label >= 0) & (label < vocabulary)
    if STATISTICS:
        at_label = tl.load(x_row + tl.where(ours, label, 0)).to(tl.float32)
        tl.store(target + row, tl.where(ours, at_label / divisor, 0.0))
        highest = tl.full([W], LOWEST, tl.float32)
        sums = tl.zeros([W], tl.float32)
        products = tl.zeros([W], tl.float32)
        for i in range(tiles):
            _, x = _tile(x_row, i * TILE, vocabulary, width, scale, SUB, W)
            higher = tl.maximum(highest, tl.max(x, 0))
            e = tl.exp2(x - higher[None, :])
            keep = tl.exp2(highest - higher)
            sums = sums * keep + tl.sum(e, 0)
            if ENTROPY:
                products = products * keep + tl.sum(e * x, 0)
            highest = higher
        top = tl.max(highest, 0)
        keep = tl.exp2(highest - top)  # 0 in lanes that saw no token
        total = tl.sum(sums * keep, 0)
        log2_sum = top + tl.log2(total)
        tl.store(lse + row, log2_sum * LOG_2)
        if ENTROPY:
            tl.store(mean + row, tl.sum(products * keep, 0) / total * LOG_2)
    else:
        log2_sum = tl.load(lse + row) / LOG_2
    if GRADIENT:
        g_row = grad + row.to(tl.int64) * width
        coefficient = tl.load(weights + row) / divisor
        for i in range(tiles):  # backwards: what was read last is in the cache
            columns, x = _tile(x_row, (tiles - 1 - i) * TILE, vocabulary, width, scale, SUB, W)
            g = tl.exp2(x - log2_sum)
            g = tl.where(columns == label, g - 1.0, g) * coefficient
            tl.store(g_row + columns, g.to(grad.dtype.element_ty), mask=columns < width)


@triton.jit
def scale_kernel(x, factor, size, BLOCK: tl.constexpr):
    """x *= factor[0], without touching x where that is 1: the loss is nearly always the last thing before backward."""
    value = tl.load(factor).to(tl.float32)
    if value != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            old = tl.load(x + at, mask=at < size)
            tl.store(x + at, (old.to(tl.float32) * value).to(x.dtype.element_ty), mask=at < size)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None,
    logits_divisor: float = 1.0,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    return_entropy: bool = False,
    fp32_logits: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`reference.linear_cross_entropy` for bf16 and fp32 on a GPU; at most 1 GiB of logits at a time.

    chunk_tokens: rows whose logits are held at a time; by default as many as fit. fp32_logits: for bf16 inputs the
    products are stored unrounded; a logit then takes 6 bytes instead of 2, so chunks are a third as long, and 3 GB more
    go through memory at 8,192 x 128k: about 1 ms. Gradients are the same as without, but for the rounded logits.
    Differs from the reference: a loss can be differentiated once (its gradients are scaled in place and handed out),
    and labels on a GPU are not checked: one outside the vocabulary counts as a logit of 0.
    """
    check_inputs(hidden, labels, vocab_size)
    if hidden.dtype not in (torch.bfloat16, torch.float32) or weight.dtype != hidden.dtype:
        raise Uncovered(f"hidden {hidden.dtype}, weight {weight.dtype}: needs both bf16 or both fp32")
    if not len(labels):
        raise Uncovered("no tokens")
    group = group if group is not None and dist.get_world_size(group) > 1 else None
    plan = _Plan(Shard.of(weight, vocab_size, group), float(logits_divisor), chunk_tokens, return_entropy, fp32_logits)
    hidden, weight = hidden.contiguous(), weight.contiguous()
    if token_weights is None:
        logprobs, entropy = _LogProbs.apply(hidden, weight, labels, plan)
        return (logprobs, entropy) if return_entropy else logprobs
    loss, logprobs, entropy = _WeightedLoss.apply(hidden, weight, labels, token_weights.float(), plan)
    return (loss, logprobs, entropy) if return_entropy else (loss, logprobs)


class _Plan(NamedTuple):
    shard: Shard
    divisor: float
    chunk_tokens: int | None
    entropy: bool
    fp32_logits: bool

    def logits_dtype(self, hidden: Tensor) -> torch.dtype:
        return torch.float32 if self.fp32_logits else hidden.dtype

    def tokens(self, hidden: Tensor) -> int:
        """How many tokens a chunk has where it holds the logits of the whole local vocabulary."""
        return self.chunk_tokens or _even(len(hidden), CHUNK_BYTES // (self._bytes(hidden) * _width(self.shard.rows)))

    def rows(self, hidden: Tensor) -> int:
        """How many rows of the vocabulary a chunk has where it holds the logits of all tokens."""
        limit = self.chunk_tokens * self.shard.rows if self.chunk_tokens else CHUNK_BYTES // self._bytes(hidden)
        return _even(max(1, self.shard.rows), limit // len(hidden))

    def _bytes(self, hidden: Tensor) -> int:
        """Of a logit and its gradient."""
        return 6 if self.logits_dtype(hidden) != hidden.dtype else hidden.element_size()


def _even(size: int, most: int) -> int:
    """The length of equal chunks of `size`, at most about `most` each, in multiples of the products' tiles."""
    count = -(-size // max(TILE_TOKENS, most))
    return -(-size // (count * TILE_TOKENS)) * TILE_TOKENS


def _width(rows: int) -> int:
    """The row stride of logits: products and vector loads want aligned rows, and 49,159 tokens would not give them."""
    return max(1, -(-rows // 16)) * 16


class _Chunk:
    """Room for the logits of a chunk and for their gradient, used again by every chunk."""

    def __init__(self, tokens: int, rows: int, hidden: Tensor, plan: _Plan):
        self.plan = plan
        self.logits = hidden.new_empty(tokens, _width(rows), dtype=plan.logits_dtype(hidden))
        self.logits[:, rows:] = 0  # loaded, though not used
        same = self.logits.dtype == hidden.dtype
        self.grad = self.logits if same else hidden.new_empty(self.logits.shape)

    def project(self, hidden: Tensor, rows: Tensor) -> None:
        out = self.logits[: len(hidden), : len(rows)]
        if out.dtype == hidden.dtype:
            torch.mm(hidden, rows.t(), out=out)
        elif hidden.device.type == "cpu":  # products that widen are for GPUs; the interpreter's tests need them here
            torch.mm(hidden.to(out.dtype), rows.t().to(out.dtype), out=out)
        else:
            torch.mm(hidden, rows.t(), out_dtype=out.dtype, out=out)

    def run(
        self, labels: Tensor, stats: Tensor, first: int, rows: int, weights: Tensor | None, statistics: bool
    ) -> Tensor:
        """Fill stats [3, n] with (log-sum-exp, label's logit, mean logit), or read them; the gradient [n, rows] where
        there are `weights` [n]."""
        size = self.logits.element_size()
        lse, target, mean = stats.unbind()
        cross_entropy_kernel[(len(labels),)](
            self.logits,
            self.grad,
            labels,
            lse if weights is None else weights,
            lse,
            target,
            mean,
            first,
            rows,
            self.logits.shape[1],
            self.plan.divisor,
            STATISTICS=statistics,
            ENTROPY=self.plan.entropy,
            GRADIENT=weights is not None,
            SUB=ROW_LOADS[size],
            W=32 * NUM_WARPS * 16 // size,
            num_warps=NUM_WARPS,
        )
        return self.grad[: len(labels), :rows]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in one product that does not round before it adds."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cpu":
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


class _WeightGradient:
    """Sums the weight's gradient over chunks of tokens; rows beyond the vocabulary get none."""

    def __init__(self, weight: Tensor, rows: int, num_chunks: int):
        self.dtype, self.rows, self.empty = weight.dtype, rows, True
        self.total = torch.empty_like(weight, dtype=torch.float32 if num_chunks > MOST_ROUNDED_SUMS else weight.dtype)
        self.total[rows:] = 0

    def add(self, grad: Tensor, hidden: Tensor) -> None:
        if self.empty and self.total.dtype == grad.dtype:
            torch.mm(grad.t(), hidden, out=self.total[: self.rows])
        else:
            if self.empty:
                self.total.zero_()
            _add_product(self.total[: self.rows], grad.t(), hidden)
        self.empty = False

    def result(self) -> Tensor:
        return self.total.to(self.dtype)


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights, plan):
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        tokens, shard = plan.tokens(hidden), plan.shard
        gradient = wants_hidden or wants_weight
        stats = _no_statistics(hidden)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = _WeightGradient(weight, shard.rows, -(-len(hidden) // tokens)) if wants_weight else None
        chunk = _Chunk(min(tokens, len(hidden)), shard.rows, hidden, plan)
        # Over several ranks a row's gradient needs the others' sums first: a second launch, after they are known.
        at_once = gradient and shard.group is None
        for part in chunks(len(hidden), tokens):
            weights, of_part = token_weights[part], stats[:, part]
            if shard.rows:
                chunk.project(hidden[part], weight[: shard.rows])
                grad = chunk.run(labels[part], of_part, shard.first, shard.rows, weights if at_once else None, True)
            if shard.group is not None and gradient:
                _join(of_part, shard.group)
                if shard.rows:
                    grad = chunk.run(labels[part], of_part, shard.first, shard.rows, weights, False)
            if grad_hidden is not None:
                torch.mm(grad, weight[: shard.rows], out=grad_hidden[part]) if shard.rows else grad_hidden[part].zero_()
            if grad_weight is not None and shard.rows:
                grad_weight.add(grad, hidden[part])
        if shard.group is not None and not gradient:
            _join(stats, shard.group)
        ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.result()
        logprobs, entropy = _results(stats, plan)
        ctx.mark_non_differentiable(logprobs, *([] if entropy is None else [entropy]))
        return -(logprobs * token_weights).sum(), logprobs, entropy

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: this loss was differentiated before, and its gradients given away"
            )
        gradients, ctx.gradients = ctx.gradients, None
        for g in gradients:
            if g is not None:
                scale_kernel[(SCALE_PROGRAMS,)](g, grad_loss, g.numel(), SCALE_BLOCK, num_warps=8)
        return *gradients, *(None,) * 3


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, plan):
        tokens, shard = plan.tokens(hidden), plan.shard
        stats = _no_statistics(hidden)
        if shard.rows:
            chunk = _Chunk(min(tokens, len(hidden)), shard.rows, hidden, plan)
            for part in chunks(len(hidden), tokens):
                chunk.project(hidden[part], weight[: shard.rows])
                chunk.run(labels[part], stats[:, part], shard.first, shard.rows, None, True)
        if shard.group is not None:
            _join(stats, shard.group)
        ctx.save_for_backward(hidden, weight, labels, stats)
        ctx.plan = plan
        logprobs, entropy = _results(stats, plan)
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, *_):
        hidden, weight, labels, stats = ctx.saved_tensors
        plan, shard = ctx.plan, ctx.plan.shard
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        weights = -grad_logprobs.float()
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        if grad_weight is not None:
            grad_weight[shard.rows :] = 0
        width = plan.rows(hidden)
        chunk = _Chunk(len(hidden), min(width, shard.rows), hidden, plan)
        for part in chunks(shard.rows, width):
            rows = weight[part]
            chunk.project(hidden, rows)
            grad = chunk.run(labels, stats, shard.first + part.start, len(rows), weights, False)
            if grad_weight is not None:
                torch.mm(grad.t(), hidden, out=grad_weight[part])
            if grad_hidden is not None:
                _add_product(grad_hidden, grad, rows)
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None


def _no_statistics(hidden: Tensor) -> Tensor:
    """[3, t] fp32: log-sum-exp, label's logit and mean logit of a rank without a token of the vocabulary."""
    stats = hidden.new_zeros(3, len(hidden), dtype=torch.float32)
    stats[0] = -torch.inf
    return stats


def _join(stats: Tensor, group: dist.ProcessGroup) -> None:
    stats.copy_(torch.stack(join_shards(stats.contiguous(), group)))


def _results(stats: Tensor, plan: _Plan) -> tuple[Tensor, Any]:
    """(log-probabilities, entropy or None), each [t]."""
    lse, target, mean = stats.unbind()
    return target - lse, lse - mean if plan.entropy else None
