"""How gradients travel between data-parallel ranks changes nothing, or what rounding them to bf16 explains."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny.gradients import close, losses_and_gradients
from tiny.models import SPECS

from prism_mcore.model.build import build_chunks
from prism_mcore.model.ops import Ops
from prism_mcore.train import optimizer


def reduced(groups, padded_from=optimizer.PADDED_FROM, **options):
    """Whole gradients of the hybrid, and how many buckets they were reduced in."""
    before, optimizer.PADDED_FROM = optimizer.PADDED_FROM, padded_from
    try:
        return losses_and_gradients(groups, "hybrid", overlap=True, **options)[1]
    finally:
        optimizer.PADDED_FROM = before


@pytest.fixture(scope="module")
def plain():
    return run_ranks(2, reduced)[0]


@pytest.mark.parametrize(
    "options", [{"bucket_size": 3000}, {"padded_from": 2}, {"padded_from": 2, "bucket_size": 3000}]
)
def test_sizes_and_padding_of_buckets_change_no_bit(plain, options):
    for gradients in run_ranks(2, keywords, options):
        assert all(torch.equal(gradients[name], want) for name, want in plain.items())


def keywords(groups, options):
    return reduced(groups, **options)


def test_bf16_rounds_each_ranks_gradient_once(plain):
    """Sums over two ranks of numbers rounded by 2**-9 of themselves; afterwards fp32 is fp32 again."""
    for gradients in run_ranks(2, keywords, {"grad_reduce": "bf16"}):
        assert all(close(gradients[name], want, 2.0**-8) for name, want in plain.items())
        assert not all(torch.equal(gradients[name], want) for name, want in plain.items())
    for gradients in run_ranks(2, keywords, {}):
        assert all(torch.equal(gradients[name], want) for name, want in plain.items())


def formats(groups):
    """Of what micro-batches are summed in, and of what is sent."""
    spec, sent = SPECS["hybrid"], []
    ops = Ops({}, torch.device("cpu"))
    layers = [list(range(len(spec.pattern)))]
    (chunk,) = build_chunks(spec, layers, groups, ops, dtype=torch.bfloat16, device=torch.device("cpu"))
    chunk.initialise(0)
    (ddp,) = optimizer.wrap([chunk], groups, grad_reduce="bf16")
    all_to_all = dist.all_to_all_single
    dist.all_to_all_single = lambda output, input, **more: sent.append(input.dtype) or all_to_all(output, input, **more)
    try:
        ddp.start_grad_sync()
        ddp.finish_grad_sync()
    finally:
        dist.all_to_all_single = all_to_all
    return {parameter.main_grad.dtype for parameter in chunk.parameters()}, set(sent)


def test_sums_over_micro_batches_stay_in_fp32():
    assert run_ranks(2, formats) == [({torch.float32}, {torch.bfloat16})] * 2
