"""Exact ops: a token's result has the same bits in training and decoding, alone and in any batch, with any threads."""

import math

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny.accuracy import assert_as_exact_as, documents, randn

from prism_kernels.activation import exact as activation
from prism_kernels.activation import reference as plain_activation
from prism_kernels.attention import exact as attention
from prism_kernels.attention import reference as plain_attention
from prism_kernels.backends import select
from prism_kernels.caches import ConvCache, PagedCache
from prism_kernels.conv import exact as conv
from prism_kernels.conv import reference as plain_conv
from prism_kernels.linear.exact import linear, mm, sum_over_ranks
from prism_kernels.loss.exact import linear_cross_entropy, lm_logits, token_logprobs
from prism_kernels.norm import exact as norm
from prism_kernels.norm import reference as plain_norm
from prism_kernels.rope import exact as rotary
from prism_kernels.scan import exact as scan
from prism_kernels.scan import reference as plain_scan
from prism_kernels.scan.exact import _Softplus
from prism_kernels.scan.inputs import ScanInputs

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = (5, 1, 130, 64, 71)  # shorter than a block, one token, more than two blocks, a whole one


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


with_threads = pytest.mark.usefixtures("threads")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_rows_stand_alone(function, *inputs):
    """Rows of the result are the same bits for any number of rows, from any offset."""
    whole = function(*inputs)
    n = len(whole)
    for count in (1, 2, 3, 5, 7, 8, 13, 33, n - 1):
        for start in {0, 3, n - count}:
            part = function(*(x[start : start + count] for x in inputs))
            assert torch.equal(part, whole[start : start + count]), f"{count} rows from row {start} of {n}"


# What decides the library and its code path: one row's length and columns, on either side of every threshold.
@with_threads
@pytest.mark.parametrize("k, n", [(16, 61), (48, 80), (100, 333), (128, 1024), (1376, 512), (2048, 64), (4096, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_product(k, n, dtype):
    weight = randn(n, k, dtype=dtype)
    assert_rows_stand_alone(lambda x: mm(x, weight.t()), randn(520, k, dtype=dtype))


def rms(x):
    return norm.rms_norm(x, torch.linspace(0.5, 2, x.shape[-1]).to(x.dtype), 1e-5)


def add_rms(x):
    normed, h = norm.add_rms_norm(x, x.flip(-1), 0.22, torch.linspace(0.5, 2, x.shape[-1]).to(x.dtype), 1e-5)
    return torch.cat([normed, h], -1)


def gated_rms(x):
    return norm.gated_rms_norm(x, x.flip(-1), torch.linspace(0.5, 2, x.shape[-1]).to(x.dtype), 1e-5, 2)


def rope(x):
    heads = x.unflatten(-1, (2, -1))
    heads = heads[..., : heads.shape[-1] // 2 * 2]
    angles = x[:, : heads.shape[-1]].float()
    return rotary.rope(heads, heads, angles.cos(), angles.sin())[0]


def log_softmax(x):
    logits = lm_logits(x, torch.eye(x.shape[-1], dtype=x.dtype)[: min(61, x.shape[-1] - 3)], 1.7)
    return token_logprobs(logits, torch.full((len(x),), 2))


def columns_of_a_buffer(function):
    """The op on columns of a wider buffer, as the model's projections hand them out."""
    return lambda x: function(torch.cat([x, x, x], -1)[:, x.shape[-1] : 2 * x.shape[-1]])


@with_threads
@pytest.mark.parametrize("width", [20, 122, 1036])  # no multiple of a vector's 16: the rest is where bits differ
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "op",
    [rms, add_rms, gated_rms, activation.swiglu, activation.squared_relu, _Softplus.apply, rope, log_softmax],
    ids=["rms_norm", "add_rms_norm", "gated_rms_norm", "swiglu", "squared_relu", "softplus", "rope", "log_softmax"],
)
def test_rows_of_elementwise_ops_norms_and_softmax(op, dtype, width):
    x = randn(400, width, dtype=dtype, scale=4)
    assert_rows_stand_alone(op, x)
    assert torch.equal(columns_of_a_buffer(op)(x), op(x))


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)[:-1]


def steps(lengths, done=None):
    """(rows that have a token i, where those tokens lie, i), for each i that is not done; rows in a changing order."""
    done, first = done or [0] * len(lengths), starts(lengths)
    for i in range(max(lengths)):
        rows = torch.tensor([r for r, n in enumerate(lengths) if done[r] <= i < n], dtype=torch.int64)
        if len(rows):
            rows = rows.roll(i)
            yield rows, first[rows] + i, i


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution_step_by_step(dtype):
    channels, taps = 37, 4
    x, weight = randn(sum(LENGTHS), channels, dtype=dtype), randn(channels, taps, dtype=dtype)
    bias = randn(channels, dtype=dtype)
    whole, final = conv.causal_conv1d(x, weight, bias, documents(*LENGTHS), return_final_state=True)
    cache = ConvCache.allocate(len(LENGTHS), channels, taps, dtype, torch.device("cpu"))
    for rows, at, _ in steps(LENGTHS):
        assert torch.equal(conv.conv_step(x[at], weight, bias, cache, rows), whole[at])
    assert torch.equal(cache.state, final)
    for start, n in zip(starts(LENGTHS).tolist(), LENGTHS, strict=True):
        alone = conv.causal_conv1d(x[start : start + n], weight, bias, documents(n))
        assert torch.equal(alone, whole[start : start + n])


def decoded_attention(q, k, v, scale, window):
    """Token by token over a paged cache whose blocks are dealt out in a random order; unused ones hold rubbish."""
    blocks = max(-(-n // 64) for n in LENGTHS)
    cache = PagedCache.allocate(blocks * len(LENGTHS), 64, k.shape[1], k.shape[2], k.dtype, torch.device("cpu"))
    cache.keys.fill_(1e4), cache.values.fill_(1e4)
    table = torch.randperm(blocks * len(LENGTHS)).view(len(LENGTHS), blocks).int()
    out = torch.empty_like(q)
    for rows, at, i in steps(LENGTHS):
        cache.write(table[rows, i // 64].long() * 64 + i % 64, k[at], v[at])
        lengths = torch.full((len(rows),), i + 1, dtype=torch.int32)
        out[at] = attention.attention_decode(q[at], cache, table[rows], lengths, scale, window)
    return out


@pytest.mark.parametrize("heads, key_heads, head_dim, window", [(4, 2, 16, None), (8, 1, 40, 30)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_step_by_step(dtype, heads, key_heads, head_dim, window):
    t = sum(LENGTHS)
    q, k, v = (randn(t, n, head_dim, dtype=dtype) for n in (heads, key_heads, key_heads))
    whole = attention.attention(q, k, v, documents(*LENGTHS), head_dim**-0.5, window)
    assert torch.equal(decoded_attention(q, k, v, head_dim**-0.5, window), whole)
    for start, n in zip(starts(LENGTHS).tolist(), LENGTHS, strict=True):
        document = slice(start, start + n)
        alone = attention.attention(q[document], k[document], v[document], documents(n), head_dim**-0.5, window)
        assert torch.equal(alone, whole[document])


@with_threads
def test_rows_of_different_lengths_decode_together():
    lengths = torch.tensor([1, 64, 65, 200], dtype=torch.int32)
    cache = PagedCache.allocate(16, 64, 2, 16, torch.float32, torch.device("cpu"))
    cache.keys.copy_(randn(*cache.keys.shape)), cache.values.copy_(randn(*cache.values.shape))
    q, table = randn(4, 4, 16, dtype=torch.float32), torch.arange(16, dtype=torch.int32).view(4, 4)
    together = attention.attention_decode(q, cache, table, lengths, 0.25)
    for i, n in enumerate(lengths.tolist()):
        alone = attention.attention_decode(
            q[i : i + 1], cache, table[i : i + 1, : -(-n // 64)], lengths[i : i + 1], 0.25
        )
        assert torch.equal(alone[0], together[i])


def test_attention_decode_wants_blocks_as_training_has_them():
    cache = PagedCache.allocate(2, 32, 1, 16, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="blocks of 32 tokens; exact mode needs 64"):
        attention.attention_decode(randn(1, 1, 16), cache, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1), 1.0)


def scan_inputs(t, heads, head_dim, groups, state, dtype):
    x, B, C = randn(t, heads, head_dim), randn(t, groups, state), randn(t, groups, state)
    dt, A_log, D, dt_bias = randn(t, heads, scale=2), randn(heads).abs(), randn(heads), randn(heads)
    return *(y.to(dtype) for y in (x, dt)), A_log.float(), *(y.to(dtype) for y in (B, C)), D.float(), dt_bias.float()


# With steps of at most 0.01 a state outlives its chunk.
@pytest.mark.parametrize(
    "heads, head_dim, groups, state, limit", [(4, 16, 2, 16, (0.0, math.inf)), (6, 24, 1, 32, (0.001, 0.01))]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scan_step_by_step(dtype, heads, head_dim, groups, state, limit):
    """Prompts of any length go into the cache, fork into other slots full of rubbish, and are replayed by one row."""
    x, dt, A_log, B, C, D, dt_bias = scan_inputs(sum(LENGTHS), heads, head_dim, groups, state, dtype)
    whole = scan.ssd_scan(ScanInputs(x, dt, A_log, B, C, D, dt_bias, limit), documents(*LENGTHS), 128)
    cache = scan.ssd_cache(2 * len(LENGTHS), heads, head_dim, groups, state, dtype, torch.device("cpu"))
    for tensor in cache.tensors():
        tensor.fill_(1e4)
    prompts = [3, 0, 64, 63, 70]
    prefilled = [r for r, n in enumerate(prompts) if n]
    at = torch.cat([torch.arange(n) + start for n, start in zip(prompts, starts(LENGTHS), strict=True)])
    boundaries, slots = documents(*(prompts[r] for r in prefilled)), torch.tensor(prefilled)
    inputs = ScanInputs(x[at], dt[at], A_log, B[at], C[at], D, dt_bias, limit)
    y = scan.ssd_prefill(inputs, boundaries, 128, cache, slots)
    assert torch.equal(y, whole[at])
    cache.copy(slots, slots + len(LENGTHS))
    for rows, at, i in steps(LENGTHS, prompts):
        for fork in (0, len(LENGTHS)):
            place = torch.full((len(rows),), i)
            inputs = ScanInputs(x[at], dt[at], A_log, B[at], C[at], D, dt_bias, limit)
            assert torch.equal(scan.ssd_step(inputs, cache, rows + fork, place), whole[at])


@with_threads
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scanned_document_stands_alone(dtype):
    x, dt, A_log, B, C, D, dt_bias = scan_inputs(sum(LENGTHS), 4, 16, 2, 16, dtype)
    whole = scan.ssd_scan(ScanInputs(x, dt, A_log, B, C, D, dt_bias), documents(*LENGTHS), 128)
    for start, n in zip(starts(LENGTHS).tolist(), LENGTHS, strict=True):
        part = slice(start, start + n)
        inputs = ScanInputs(x[part], dt[part], A_log, B[part], C[part], D, dt_bias)
        alone = scan.ssd_scan(inputs, documents(n), 128)
        assert torch.equal(alone, whole[part])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_training_and_sampler_give_a_token_one_logprob(dtype, weighted):
    hidden, weight, labels = randn(70, 48, dtype=dtype), randn(61, 48, dtype=dtype), torch.randint(57, (70,))
    token_weights = torch.ones(70) if weighted else None
    out = linear_cross_entropy(
        hidden, weight, labels, token_weights=token_weights, logits_divisor=1.3 * 0.7, vocab_size=57, chunk_tokens=33
    )
    trained = out[1] if weighted else out
    for i in range(0, 70, 3):
        logits = lm_logits(hidden[i : i + 2], weight[:57], 1.3 * 0.7)
        assert torch.equal(token_logprobs(logits, labels[i : i + 2]), trained[i : i + 2])


def shared_logprobs(groups, hidden, weight, labels):
    rows = len(weight) // groups.tp_size
    first = groups.tp_rank * rows
    mine = weight[first : first + rows]
    trained = linear_cross_entropy(hidden, mine, labels, token_weights=None, vocab_size=57, group=groups.tp)
    logits = lm_logits(hidden[3:5], mine[: min(rows, 57 - first)], 1.0)
    return trained, token_logprobs(logits, labels[3:5], first, groups.tp)


def test_training_and_sampler_agree_over_a_cut_vocabulary():
    hidden, weight, labels = randn(9, 48).float(), randn(60, 48).float(), torch.randint(57, (9,))
    whole = linear_cross_entropy(hidden, weight, labels, token_weights=None, vocab_size=57)
    for trained, sampled in run_ranks(2, shared_logprobs, hidden, weight, labels, tp=2):
        assert torch.equal(trained[3:5], sampled)
        assert (trained - whole).abs().max() < 1e-5


def sums_and_parts(groups, dtype):
    x = torch.randn(4099, 3, generator=torch.Generator().manual_seed(dist.get_rank())).to(dtype)
    return sum_over_ranks(x, groups.tp), sum_over_ranks(x[77:80], groups.tp), x


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_four_ranks_are_taken_in_rank_order_whatever_their_size(dtype):
    results = run_ranks(4, sums_and_parts, dtype, tp=4)
    parts = [x.float() for *_, x in results]
    expected = (((parts[0] + parts[1]) + parts[2]) + parts[3]).to(dtype)
    for large, small, _ in results:
        assert torch.equal(large, expected)
        assert torch.equal(small, expected[77:80])


def with_ones(x, dt, B, C):
    return ScanInputs(x, dt, torch.ones(4), B, C, torch.ones(4), torch.ones(4))


BOUNDARIES = documents(*LENGTHS)
WITH_GRADIENTS = {
    "linear": (linear, lambda x, w: x @ w.t(), ((50, 24), (30, 24))),
    "swiglu": (activation.swiglu, plain_activation.swiglu, ((40, 26),)),
    "gated_rms_norm": (
        lambda y, z, w: norm.gated_rms_norm(y, z, w, 1e-5, 2),
        lambda y, z, w: plain_norm.gated_rms_norm(y, z, w, 1e-5, 2),
        ((40, 24), (40, 24), (24,)),
    ),
    "add_rms_norm": (
        lambda x, y, w: torch.cat(norm.add_rms_norm(x, y, 0.3, w, 1e-5)),
        lambda x, y, w: torch.cat([plain_norm.rms_norm(x + 0.3 * y, w, 1e-5), x + 0.3 * y]),
        ((40, 24), (40, 24), (24,)),
    ),
    "conv": (
        lambda x, w, b: conv.causal_conv1d(x, w, b, BOUNDARIES),
        lambda x, w, b: plain_conv.causal_conv1d(x, w, b, BOUNDARIES),
        ((271, 8), (8, 4), (8,)),
    ),
    "attention": (
        lambda q, k, v: attention.attention(q, k, v, BOUNDARIES, 0.25, 100),
        lambda q, k, v: plain_attention.attention(q, k, v, BOUNDARIES, 0.25, 100),
        ((271, 4, 16), (271, 2, 16), (271, 2, 16)),
    ),
    "scan": (
        lambda *four: scan.ssd_scan(with_ones(*four), BOUNDARIES, 64),
        lambda *four: plain_scan.ssd_scan(with_ones(*four), BOUNDARIES, 64),
        ((271, 4, 16), (271, 4), (271, 2, 8), (271, 2, 8)),
    ),
    "loss": (
        lambda h, w: linear_cross_entropy(
            h, w, torch.arange(50) % 29, token_weights=torch.linspace(-1, 1, 50), vocab_size=29
        )[0],
        lambda h, w: (
            -(
                (h @ w[:29].t()).log_softmax(-1)[torch.arange(50), torch.arange(50) % 29] * torch.linspace(-1, 1, 50)
            ).sum()
        ),
        ((50, 24), (30, 24)),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_results_and_gradients_are_as_exact_as_the_references(name, dtype):
    ours, plain, shapes = WITH_GRADIENTS[name]
    assert_as_exact_as(ours, plain, [randn(*shape, dtype=dtype) for shape in shapes])


def test_exact_is_refused_on_a_gpu():
    with pytest.raises(ValueError, match="its bits are promised on a CPU only"):
        select({"ssd_scan": "exact"}, "cuda")
