"""Context parallelism: two and four ranks with parts of every sequence compute what one rank with all of them does."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny.gradients import close, losses_and_gradients
from tiny.models import SPECS, packed_batch

from prism_mcore.batch import context_chunks
from prism_mcore.model.build import build_chunks
from prism_mcore.model.ops import Ops

SPECS = SPECS | {"window": replace(SPECS["dense"], sliding_window=13)}


def documents(spec, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(spec.vocab_size, (n,), generator=generator) for n in lengths]


# Lengths of documents in a micro-batch of 64 tokens: chunks of 16 on two ranks, of 8 on four.
HARD = {
    "one document": [64],
    "over more than two chunks": [5, 50, 9],
    "borders on chunks": [16, 32, 8, 8],
    "shorter than the convolution, at borders": [14, 1, 3, 13, 2, 20, 3, 8],
}


def hard_batches(spec):
    """A micro-batch of each, in rows of 64; of the last one only tokens count that one rank of two, or of four, has."""
    batches = [packed_batch(documents(spec, lengths, i), 64, i) for i, lengths in enumerate(HARD.values())]
    mask = batches[-1].loss_mask.clone()
    mask[:, 8:56] = False
    return [*batches[:-1], replace(batches[-1], loss_mask=mask, num_tokens=int(mask.sum()))]


def of_hard_batches(groups, name, sequence_parallel=False, **options):
    spec = SPECS[name]
    return losses_and_gradients(groups, spec, sequence_parallel, batches=hard_batches(spec), **options)


def keywords(groups, name, options):
    return of_hard_batches(groups, name, **options)


@pytest.fixture(scope="module")
def alone():
    return {name: run_ranks(1, of_hard_batches, name)[0] for name in SPECS}


def check(got, want, tolerance=1e-5):
    (stats, gradients), (want_stats, want_gradients) = got, want
    assert stats.loss == pytest.approx(want_stats.loss, rel=tolerance)
    assert stats.source_loss == pytest.approx(want_stats.source_loss, rel=tolerance)
    assert stats.source_tokens == want_stats.source_tokens
    assert gradients.keys() == want_gradients.keys()
    wrong = [name for name in gradients if not close(gradients[name], want_gradients[name], tolerance)]
    assert not wrong, wrong


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("name", SPECS)
def test_same_loss_and_gradients_as_one_rank(alone, name, cp):
    for result in run_ranks(cp, of_hard_batches, name, cp=cp):
        check(result, alone[name])


LAYOUTS = {
    "tp2": (4, {"tp": 2}, {}),
    "tp2+sp": (4, {"tp": 2}, {"sequence_parallel": True}),
    "pp2": (4, {"pp": 2}, {}),
    "pp2 interleaved": (4, {"pp": 2, "vpp": 2}, {}),
    "dp2": (4, {}, {}),
    "dp2, overlapped": (4, {}, {"overlap": True}),
    "recomputed": (2, {}, {"recompute": "M*-"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_every_other_kind_of_parallelism(alone, layout):
    """Two SSM groups, which tensor-parallel ranks divide, and one, which each of them has."""
    world_size, degrees, options = LAYOUTS[layout]
    for name in ("hybrid", "granite hybrid"):
        for result in run_ranks(world_size, keywords, name, options, cp=2, **degrees):
            check(result, alone[name])


def model_and_sent(groups, name):
    """A model, and a list that gets (collective, bytes for others) as long as the rank lives."""
    sent = []
    gather, exchange = dist.all_gather_into_tensor, dist.all_to_all_single

    def counted_gather(out, x, group=None, **more):
        sent.append(("gather", x.nbytes * (group.size() - 1)))
        return gather(out, x, group=group, **more)

    def counted_exchange(out, x, receives=None, sends=None, group=None, **more):
        rows = sends or [len(x) // group.size()] * group.size()
        others = sum(rows) - rows[group.rank()]
        sent.append(("exchange", others * (x.nbytes // len(x) if len(x) else 0)))
        return exchange(out, x, receives, sends, group=group, **more)

    dist.all_gather_into_tensor, dist.all_to_all_single = counted_gather, counted_exchange
    ops = Ops({}, torch.device("cpu"))
    layers = list(range(len(SPECS[name].pattern)))
    (model,) = build_chunks(SPECS[name], [layers], groups, ops, dtype=torch.float32, device=torch.device("cpu"))
    model.initialise(7)
    return model, sent, (gather, exchange)


def bytes_sent(groups, name, lengths):
    """What a forward and a backward pass send, of all ranks, by collective."""
    model, sent, originals = model_and_sent(groups, name)
    try:
        batch = packed_batch(documents(SPECS[name], lengths, 0), sum(lengths)).shard(groups.cp_size, groups.cp_rank)
        model(batch)[0].backward()
    finally:
        dist.all_gather_into_tensor, dist.all_to_all_single = originals
    total = torch.tensor([sum(n for kind, n in sent if kind == which) for which in ("gather", "exchange")])
    dist.all_reduce(total, group=groups.cp)
    return total.tolist(), len(sent)


def rows_needed(lengths, cp, reach):
    """Of all ranks: tokens that lie before their chunks, in the same document and in reach, on other ranks."""
    t, starts = sum(lengths), [sum(lengths[:i]) for i in range(len(lengths))]
    count = 0
    for rank in range(cp):
        chunks = context_chunks(t, cp, rank)
        mine = {token for chunk in chunks for token in chunk}
        needed = set()
        for chunk in chunks:
            start = max(s for s in starts if s <= chunk.start)
            needed |= set(range(max(start, chunk.start - reach), chunk.start))
        count += len(needed - mine)
    return count


@pytest.mark.parametrize("cp", [2, 4])
def test_bytes_of_attention_are_those_of_the_formula(cp):
    """Keys and values forward, again in backward, and their gradients: 3 x 2 x heads x head_dim x 4 bytes a row."""
    spec = SPECS["dense"]
    row = 3 * 2 * spec.num_kv_heads * spec.head_dim * 4 * spec.pattern.count("*")
    for lengths, name in [([64], "dense"), ([5, 50, 9], "dense"), ([64], "window"), ([5, 50, 9], "window")]:
        (gathered, exchanged), _ = run_ranks(cp, bytes_sent, name, lengths, cp=cp)[0]
        assert gathered == 0
        assert exchanged == row * rows_needed(lengths, cp, SPECS[name].sliding_window - 1 if name == "window" else 64)
    # A whole sequence of one document: every rank gets what lies before its later chunk.
    assert rows_needed([64], cp, 64) == (1.5 * cp - 1.5) * cp * 64 // (2 * cp)


def test_documents_that_end_with_their_chunks_send_nothing():
    for name in SPECS:
        assert run_ranks(2, bytes_sent, name, [16, 16, 16, 10, 6], cp=2)[0] == ([0, 0], 0)


@pytest.mark.parametrize("cp", [2, 4])
def test_bytes_of_mamba_do_not_grow_with_the_tokens(cp):
    spec = SPECS["hybrid"]
    mamba, attention = spec.pattern.count("M"), spec.pattern.count("*")
    heads, channels = spec.mamba_num_heads, spec.mamba_inner_size + 2 * spec.ssm_groups * spec.ssm_state_size
    states = 2 * (heads * spec.mamba_head_dim * spec.ssm_state_size + heads) * 4  # of a rank's two chunks
    for t in (64, 128):
        (gathered, exchanged), _ = run_ranks(cp, bytes_sent, "hybrid", [t], cp=cp)[0]
        assert gathered == mamba * cp * (cp - 1) * states
        of_attention = attention * 3 * 2 * spec.num_kv_heads * spec.head_dim * 4 * rows_needed([t], cp, t)
        halo = mamba * 2 * rows_needed([t], cp, spec.conv_kernel - 1) * channels * 4
        assert exchanged == of_attention + gathered + halo


def logprobs(groups, name, tokens):
    """Of each of the rank's tokens, in order of the t."""
    model, _, originals = model_and_sent(groups, name)
    dist.all_gather_into_tensor, dist.all_to_all_single = originals
    lengths = HARD["over more than two chunks"]
    batch = packed_batch(list(tokens.split(lengths)), 64)
    with torch.no_grad():
        return model(batch.shard(groups.cp_size, groups.cp_rank))[1]


@pytest.mark.parametrize("name", SPECS)
def test_no_other_document_moves_a_bit(name):
    tokens = torch.randint(61, (64,), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[7] = (other[7] + 1) % 61  # in the second document, which begins on the first rank and is on both
    before, after = (run_ranks(2, logprobs, name, x, cp=2) for x in (tokens, other))
    moved = torch.zeros(64, dtype=torch.bool)
    for rank, (a, b) in enumerate(zip(before, after, strict=True)):
        moved[torch.tensor([token for chunk in context_chunks(64, 2, rank) for token in chunk])] = a != b
    reached = 32 if name == "window" else 54  # through one chunk more, or all that the document has a part of
    assert moved[reached - 8 : reached].any()
    assert not moved[:4].any() and not moved[55:].any()  # token 4's label is masked, 54's too


def in_bf16(groups, name, kernels):
    """Loss, and the gradients of the first attention's projection, of both ranks together."""
    layers = list(range(len(SPECS[name].pattern)))
    ops = Ops(kernels, torch.device("cpu"))
    (model,) = build_chunks(SPECS[name], [layers], groups, ops, dtype=torch.bfloat16, device=torch.device("cpu"))
    model.initialise(7)
    batch = packed_batch(documents(SPECS[name], HARD["over more than two chunks"], 0), 64)
    loss = model(batch.shard(groups.cp_size, groups.cp_rank) if groups.cp_size > 1 else batch)[0]
    loss.backward()
    weight = next(w for n, w in model.named_parameters() if n.endswith("qkv.weight"))
    both = torch.cat([loss.detach().view(1).float(), weight.grad.float().flatten()])
    dist.all_reduce(both, group=groups.cp)
    return both


@pytest.mark.parametrize("name", ["window", "hybrid"])
def test_tritons_kernels_do_the_same(name):
    """They keep the keys and values that backward gathers again."""
    kernels = dict.fromkeys(("attention", "ssd_scan", "causal_conv1d"), "triton")
    exact, plain = (run_ranks(n, in_bf16, name, {}, cp=n)[0] for n in (1, 2))
    ours = run_ranks(2, in_bf16, name, kernels, cp=2)[0]
    assert (ours - exact).norm() <= 2 * (plain - exact).norm() + 0.01 * exact.norm()
