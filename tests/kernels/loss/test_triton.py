"""The loss kernel against plain torch: both forms, every gradient, entropy, chunks of tokens and of the vocabulary."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from tiny.accuracy import assert_as_exact_as, randn, relative_error, value_and_gradients

from prism_kernels import backends
from prism_kernels.loss import triton as module
from prism_kernels.loss.reference import linear_cross_entropy as reference
from prism_kernels.loss.triton import linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, HIDDEN, VOCAB, PADDED = 21, 24, 301, 310  # no multiple of a vector, of a tile, of the other


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of tokens, several of the vocabulary, and tiles that end inside a row."""
    monkeypatch.setattr(module, "TILE_TOKENS", 8)
    monkeypatch.setattr(module, "NUM_WARPS", 1)
    monkeypatch.setattr(module, "ROW_LOADS", {2: 1, 4: 1})


def problem(dtype=torch.float32, tokens=TOKENS):
    torch.manual_seed(0)
    hidden, weight = randn(tokens, HIDDEN, dtype=dtype), randn(PADDED, HIDDEN, dtype=dtype)
    weight[VOCAB:] = torch.nan  # padding never enters
    token_weights = torch.rand(tokens)
    token_weights[::5] = 0
    labels = torch.randint(0, VOCAB, (tokens,))
    labels[:2] = torch.tensor([0, VOCAB - 1])[:tokens]
    return [x.to(DEVICE) for x in (hidden, weight, labels, token_weights)]


def plain_loss(labels, token_weights, divisor):
    def run(hidden, weight):
        logits = (hidden @ weight[:VOCAB].t()).to(torch.promote_types(hidden.dtype, torch.float32)) / divisor
        return (F.cross_entropy(logits, labels, reduction="none") * token_weights).sum()

    return run


def fused_loss(labels, token_weights, divisor, **kwargs):
    def run(hidden, weight):
        kwargs.setdefault("vocab_size", VOCAB)
        return linear_cross_entropy(
            hidden, weight, labels, token_weights=token_weights, logits_divisor=divisor, **kwargs
        )[0]

    return run


def loss_of_logprobs(labels, token_weights, divisor, **kwargs):
    def run(hidden, weight):
        kwargs.setdefault("vocab_size", VOCAB)
        logprobs = linear_cross_entropy(hidden, weight, labels, token_weights=None, logits_divisor=divisor, **kwargs)
        return -(logprobs * token_weights).sum()

    return run


FORMS = pytest.mark.parametrize("form", [fused_loss, loss_of_logprobs])


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [None, 8])
def test_as_exact_as_plain_torch(form, dtype, chunk_tokens):
    hidden, weight, labels, token_weights = problem(dtype)
    ours = form(labels, token_weights, 3.7, chunk_tokens=chunk_tokens)
    assert_as_exact_as(ours, plain_loss(labels, token_weights, 3.7), [hidden, weight])


@FORMS
def test_sums_over_the_most_chunks_that_are_rounded_stay_within_twice_plain_torchs_error(form):
    hidden, weight, labels, token_weights = problem(torch.bfloat16, tokens=8 * module.MOST_ROUNDED_SUMS)
    ours = form(labels, token_weights, 1.0, chunk_tokens=8)
    assert_as_exact_as(ours, plain_loss(labels, token_weights, 1.0), [hidden, weight])


def test_sums_over_more_chunks_are_not_rounded(monkeypatch):
    hidden, weight, labels, token_weights = problem(torch.bfloat16, tokens=64)
    exact = value_and_gradients(
        plain_loss(labels, token_weights, 1.0), [hidden.double(), weight.double()], torch.tensor(1.0)
    )
    errors = []
    for most in (8, 7):
        monkeypatch.setattr(module, "MOST_ROUNDED_SUMS", most)
        ours = value_and_gradients(
            fused_loss(labels, token_weights, 1.0, chunk_tokens=8, fp32_logits=True),
            [hidden, weight],
            torch.tensor(1.0),
        )
        errors.append(relative_error(ours[2], exact[2]))
    assert errors[1] < 0.9 * errors[0], errors


@FORMS
def test_one_token(form):
    hidden, weight, labels, token_weights = problem(tokens=1)
    token_weights[:] = 1
    # The yardstick is its product of a batch: MKL takes one row by other code, with more partial sums on some CPUs.
    in_a_batch = plain_loss(labels.expand(TOKENS), token_weights.expand(TOKENS) / TOKENS, 1.0)
    plain = lambda hidden, weight: in_a_batch(hidden.expand(TOKENS, -1), weight)  # noqa: E731
    assert_as_exact_as(form(labels, token_weights, 1.0), plain, [hidden, weight])


def test_strided_hidden_and_a_scaled_gradient():
    hidden, weight, labels, token_weights = problem()
    wide = torch.cat([hidden, hidden], 1)
    ours, plain = fused_loss(labels, token_weights, 1.0), plain_loss(labels, token_weights, 1.0)
    mine = value_and_gradients(lambda h, w: ours(h[:, :HIDDEN], w) * 2.5, [wide, weight], torch.tensor(1.0))
    exact = value_and_gradients(lambda h, w: plain(h[:, :HIDDEN], w) * 2.5, [wide, weight], torch.tensor(1.0))
    for a, b in zip(mine, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_huge_logits_stay_finite():
    hidden, weight, labels, token_weights = problem()
    for form in (fused_loss, loss_of_logprobs):
        inputs = [hidden * 1e4, weight]
        for x in value_and_gradients(form(labels, token_weights, 1.0), inputs, torch.tensor(1.0)):
            assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_and_entropy_of_both_forms(dtype):
    hidden, weight, labels, token_weights = problem(dtype)
    kwargs = {"vocab_size": VOCAB, "return_entropy": True, "fp32_logits": True, "logits_divisor": 2.0}
    with torch.no_grad():
        _, fused, fused_entropy = linear_cross_entropy(hidden, weight, labels, token_weights=token_weights, **kwargs)
        logprobs, entropy = linear_cross_entropy(hidden, weight, labels, token_weights=None, **kwargs)
        _, expected = reference(hidden, weight, labels, token_weights=None, **kwargs)
    exact = (hidden.double() @ weight[:VOCAB].double().t() / 2).log_softmax(1)
    assert relative_error(fused, exact.gather(1, labels[:, None])[:, 0]) < 1e-6
    assert torch.equal(fused, logprobs) and torch.equal(fused_entropy, entropy)
    for got in (entropy, expected):
        torch.testing.assert_close(got.double(), -(exact.exp() * exact).sum(1), rtol=1e-5, atol=1e-5)


def test_logits_that_are_not_rounded_give_more_exact_gradients_too():
    hidden, weight, labels, token_weights = problem(torch.bfloat16)
    inputs = [hidden * 4, weight]
    exact = value_and_gradients(plain_loss(labels, token_weights, 1.0), [x.double() for x in inputs], torch.tensor(1.0))
    errors = []
    for fp32_logits in (False, True):
        run = loss_of_logprobs(labels, token_weights, 1.0, fp32_logits=fp32_logits)
        ours = value_and_gradients(run, inputs, torch.tensor(1.0))
        errors.append([relative_error(a, b) for a, b in zip(ours, exact, strict=True)])
    assert all(b < 0.8 * a for a, b in zip(*errors, strict=True)), errors


def test_a_second_backward_is_refused_not_wrong():
    hidden, weight, labels, token_weights = problem()
    loss = fused_loss(labels, token_weights, 1.0)(hidden.requires_grad_(), weight)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated before"):
        loss.backward()


def test_only_the_gradients_that_are_asked_for():
    hidden, weight, labels, token_weights = problem()
    for form in (fused_loss, loss_of_logprobs):
        run = form(labels, token_weights, 1.0)
        both = value_and_gradients(run, [hidden, weight], torch.tensor(1.0))
        (alone,) = torch.autograd.grad(run(hidden, w := weight.clone().requires_grad_()), w)
        assert torch.equal(alone, both[2])
        (alone,) = torch.autograd.grad(run(h := hidden.clone().requires_grad_(), weight), h)
        assert torch.equal(alone, both[1])


def test_what_is_not_covered_goes_to_the_reference_with_one_warning(caplog):
    hidden, weight, labels, token_weights = problem(torch.float64)
    op = backends.function("linear_cross_entropy", "triton")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            loss, _ = op(hidden, weight, labels, token_weights=token_weights, vocab_size=VOCAB)
    expected, _ = reference(hidden, weight, labels, token_weights=token_weights, vocab_size=VOCAB)
    assert torch.equal(loss, expected) and len(caplog.records) == 1
    with pytest.raises(ValueError, match="from 0 to 36"):
        op(hidden, weight, labels, token_weights=None, vocab_size=37)


@pytest.mark.parametrize(
    ("tokens", "rows"), [(8192, 128256), (8192, 131072), (8192, 49159), (8192, 16032), (1, 131072)]
)
def test_a_training_steps_chunks_fit_in_a_gibibyte_and_are_even(tokens, rows, monkeypatch):
    monkeypatch.undo()
    hidden = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="meta")
    for fp32_logits in (False, True):
        plan = module._Plan(module.Shard(0, rows, None), 1.0, None, False, fp32_logits)
        chunk, columns = plan.tokens(hidden), plan.rows(hidden)
        size = 6 if fp32_logits else 2
        assert chunk * rows * size <= 1.05 * 2**30 and tokens * columns * size <= 1.05 * 2**30
        for whole, part in ((tokens, chunk), (rows, columns)):
            count = math.ceil(whole / part)
            assert count * part < whole + count * 128
    assert (
        math.ceil(
            8192
            / module._Plan(module.Shard(0, 128256, None), 1.0, None, False, False).tokens(
                torch.empty(8192, 1, dtype=torch.bfloat16, device="meta")
            )
        )
        == 2
    )


# Two ranks: the second shard holds fewer real tokens, in the last case none at all.


def sharded(groups, cases):
    rank, group, results = groups.rank, groups.tp, []
    module.TILE_TOKENS, module.NUM_WARPS, module.ROW_LOADS = 8, 1, {2: 1, 4: 1}
    for hidden, weight, labels, token_weights, vocab_size in cases:
        hidden = hidden.clone().requires_grad_()
        shard = weight.chunk(2)[rank].clone().requires_grad_()
        kwargs = {"vocab_size": vocab_size, "group": group, "chunk_tokens": 8, "logits_divisor": 2.0}
        kwargs["return_entropy"] = True
        loss, fused, entropy = linear_cross_entropy(hidden, shard, labels, token_weights=token_weights, **kwargs)
        logprobs, again = linear_cross_entropy(hidden, shard, labels, token_weights=None, **kwargs)
        with torch.no_grad():
            frozen = hidden.detach(), shard.detach(), labels
            _, alone, _ = linear_cross_entropy(*frozen, token_weights=token_weights, **kwargs)
        for value in (loss, -(logprobs * token_weights).sum()):
            results += [value.detach(), *torch.autograd.grad(value, (hidden, shard)), entropy]
        assert torch.equal(fused, logprobs.detach()) and torch.equal(entropy, again) and torch.equal(fused, alone)
    return results


@pytest.mark.skipif(DEVICE == "cuda", reason="the ranks of the tests run on CPUs")
def test_two_ranks_give_what_one_does():
    hidden, weight, labels, token_weights = problem()
    cases = [(hidden, weight.nan_to_num(7.0), labels, token_weights, VOCAB)]
    cases.append((hidden, weight.nan_to_num(7.0), labels % 120, token_weights, 120))
    ranks = run_ranks(2, sharded, cases, tp=2)
    for i, (hidden, weight, labels, token_weights, vocab_size) in enumerate(cases):

        def plain(hidden, weight, labels=labels, token_weights=token_weights, vocab_size=vocab_size):
            logits = hidden @ weight[:vocab_size].t() / 2.0
            return (F.cross_entropy(logits, labels, reduction="none") * token_weights).sum()

        loss, grad_hidden, grad_weight = value_and_gradients(plain, [hidden, weight], torch.tensor(1.0))
        logprobs = (hidden @ weight[:vocab_size].t() / 2.0).log_softmax(1)
        for form in range(2):
            parts = [results[8 * i + 4 * form :][:4] for results in ranks]
            for part in parts:
                torch.testing.assert_close(part[0], loss, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(part[3], -(logprobs.exp() * logprobs).sum(1), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(parts[0][1] + parts[1][1], grad_hidden, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(torch.cat([parts[0][2], parts[1][2]]), grad_weight, rtol=1e-4, atol=1e-5)
