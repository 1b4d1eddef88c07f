"""Cross entropy fused with the output projection, on one rank and over two."""

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from tiny.accuracy import assert_as_exact_as, randn, relative_error, value_and_gradients

from prism_kernels.loss.reference import linear_cross_entropy
from prism_kernels.norm.reference import gated_rms_norm

TOKENS, HIDDEN, VOCAB, PADDED = 23, 12, 37, 40


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    hidden, weight = randn(TOKENS, HIDDEN, dtype=dtype), randn(PADDED, HIDDEN, dtype=dtype)
    token_weights = torch.rand(TOKENS, dtype=torch.promote_types(dtype, torch.float32))
    token_weights[::5] = 0
    return hidden, weight, torch.randint(0, VOCAB, (TOKENS,)), token_weights


def plain_loss(labels, token_weights, divisor=1.0):
    def run(hidden, weight):
        logits = (hidden @ weight[:VOCAB].t()).to(token_weights.dtype) / divisor
        return (F.cross_entropy(logits, labels, reduction="none") * token_weights).sum()

    return run


def fused_loss(labels, token_weights, divisor=1.0, chunk_tokens=512):
    def run(hidden, weight):
        return linear_cross_entropy(
            hidden,
            weight,
            labels,
            token_weights=token_weights,
            logits_divisor=divisor,
            vocab_size=VOCAB,
            chunk_tokens=chunk_tokens,
        )[0]

    return run


def loss_of_logprobs(labels, token_weights, divisor=1.0, chunk_tokens=512):
    def run(hidden, weight):
        logprobs = linear_cross_entropy(
            hidden,
            weight,
            labels,
            token_weights=None,
            logits_divisor=divisor,
            vocab_size=VOCAB,
            chunk_tokens=chunk_tokens,
        )
        return -(logprobs * token_weights).sum()

    return run


@pytest.mark.parametrize("form", [fused_loss, loss_of_logprobs])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divisor", [1.0, 6.7])
def test_loss_is_as_exact_as_plain_torch(form, dtype, divisor):
    hidden, weight, labels, token_weights = problem(dtype)
    plain = plain_loss(labels, token_weights, divisor)
    assert_as_exact_as(form(labels, token_weights, divisor), plain, [hidden, weight])


@pytest.mark.parametrize("form", [fused_loss, loss_of_logprobs])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 512])
def test_loss_in_fp64_whatever_the_chunk(form, chunk_tokens):
    hidden, weight, labels, token_weights = problem()
    ours = value_and_gradients(form(labels, token_weights, 3.0, chunk_tokens), [hidden, weight], torch.tensor(2.0))
    exact = value_and_gradients(plain_loss(labels, token_weights, 3.0), [hidden, weight], torch.tensor(2.0))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_both_forms_give_the_same_logprobs_without_gradients():
    hidden, weight, labels, token_weights = problem(torch.float32)
    with torch.no_grad():
        _, fused = linear_cross_entropy(hidden, weight, labels, token_weights=token_weights, vocab_size=VOCAB)
        alone = linear_cross_entropy(hidden, weight, labels, token_weights=None, vocab_size=VOCAB)
    assert torch.equal(fused, alone)
    exact = (hidden.double() @ weight[:VOCAB].double().t()).log_softmax(1).gather(1, labels[:, None])[:, 0]
    assert relative_error(fused, exact) < 1e-6


def test_huge_logits_stay_finite():
    hidden, weight, labels, token_weights = problem(torch.float32)
    for x in value_and_gradients(fused_loss(labels, token_weights), [hidden * 1e4, weight], torch.tensor(1.0)):
        assert x.isfinite().all()


def test_a_label_outside_the_vocabulary_is_refused():
    hidden, weight, labels, _ = problem()
    labels[3] = VOCAB  # a padded row exists for it
    with pytest.raises(ValueError, match="to 37, the vocabulary from 0 to 36"):
        linear_cross_entropy(hidden, weight, labels, token_weights=None, vocab_size=VOCAB)


# Two ranks: the second shard holds fewer real tokens, in the last case none at all.


def sharded_ops(groups, cases):
    """Every sharded op of this file's two-rank test in one call: starting ranks costs more than running them."""
    rank, group, results = groups.rank, groups.tp, []
    for hidden, weight, labels, token_weights, vocab_size in cases:
        hidden = hidden.clone().requires_grad_()
        shard = weight.chunk(2)[rank].clone().requires_grad_()
        kwargs = {"vocab_size": vocab_size, "group": group, "chunk_tokens": 7, "logits_divisor": 2.0}
        loss, fused = linear_cross_entropy(hidden, shard, labels, token_weights=token_weights, **kwargs)
        logprobs = linear_cross_entropy(hidden, shard, labels, token_weights=None, **kwargs)
        for value in (loss, -(logprobs * token_weights).sum()):
            results += [value.detach(), *torch.autograd.grad(value, (hidden, shard))]
        assert torch.equal(fused, logprobs.detach())
    y, z, weight, upstream = (x.chunk(2, -1)[rank].clone().requires_grad_() for x in norm_problem())
    out = gated_rms_norm(y, z, weight, 1e-5, 1, group)
    return results, [out.detach(), *torch.autograd.grad(out, (y, z, weight), upstream.detach())]


def norm_problem():
    torch.manual_seed(1)
    return randn(5, 16), randn(5, 16), randn(16), randn(5, 16)


def test_two_ranks_give_what_one_does():
    hidden, weight, labels, token_weights = problem()
    cases = [(hidden, weight, labels, token_weights, VOCAB), (hidden, weight, labels % 20, token_weights, 20)]
    ranks = run_ranks(2, sharded_ops, cases, tp=2)
    for i, (hidden, weight, labels, token_weights, vocab_size) in enumerate(cases):

        def plain(hidden, weight, labels=labels, token_weights=token_weights, vocab_size=vocab_size):
            logits = hidden @ weight[:vocab_size].t() / 2.0
            return (F.cross_entropy(logits, labels, reduction="none") * token_weights).sum()

        loss, grad_hidden, grad_weight = value_and_gradients(plain, [hidden, weight], torch.tensor(1.0))
        for form in range(2):
            first = 6 * i + 3 * form
            parts = [results[first : first + 3] for results, _ in ranks]
            for part in parts:
                torch.testing.assert_close(part[0], loss)
            torch.testing.assert_close(parts[0][1] + parts[1][1], grad_hidden)
            torch.testing.assert_close(torch.cat([parts[0][2], parts[1][2]]), grad_weight)

    y, z, weight, upstream = norm_problem()
    exact = value_and_gradients(lambda *a: gated_rms_norm(*a, 1e-5, 1), [y, z, weight], upstream)
    for i, whole in enumerate(exact):
        torch.testing.assert_close(torch.cat([norms[i] for _, norms in ranks], -1), whole)


def test_a_spanning_norm_with_several_local_groups_is_refused():
    y, z, weight, _ = norm_problem()
    with pytest.raises(ValueError, match="16 channels do not split into num_groups=3"):
        gated_rms_norm(y, z, weight, 1e-5, 3)
