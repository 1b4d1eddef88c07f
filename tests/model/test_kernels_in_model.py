"""The whole model on Triton's kernels, in their interpreter on a CPU, trains as the model on the reference ops does."""

import logging

import pytest
import torch
from ranks import run_ranks
from tiny.gradients import whole_gradients
from tiny.models import DENSE, GRANITE_HYBRID, HYBRID, packed_batches
from tiny.models import SPECS as TINY

from prism_kernels import backends
from prism_kernels.table import OPS
from prism_mcore.model.build import build_chunks
from prism_mcore.model.ops import Ops
from prism_mcore.model.spec import spec_from_config
from prism_mcore.train.optimizer import build_optimizer, update, wrap
from prism_mcore.train.settings import OptimizerSettings
from prism_mcore.train.step import backward

STEPS = 2
# The ops of a training step.
TRITON = {
    name: "triton"
    for name, op in OPS.items()
    if "triton" in op.backends and name not in ("conv_step", "ssd_step", "attention_decode")
}
# Shapes that every kernel covers (Granite heads in tests/tiny/models.py are 12 wide): none may fall back to torch.
GRANITE = {"hidden_size": 64, "mamba_d_head": 32, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2}
SPECS = {
    "dense": spec_from_config(DENSE),
    "qwen": TINY["qwen"],
    "hybrid": spec_from_config(HYBRID | {"hybrid_override_pattern": "M*-", "num_hidden_layers": 3}),
    "granite hybrid": spec_from_config(GRANITE_HYBRID | GRANITE),
}


class FellBack(logging.Handler):
    """Any word of the op table is a kernel that did not cover its inputs."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage())


def train(groups, name, overrides, dtype, seed=3):
    """(loss of every step, the first step's gradients, the weights after the last) of the whole model."""
    backends.log.handlers = [FellBack()]
    spec, device = SPECS[name], torch.device("cpu")
    ops = Ops(overrides, device)
    assert all(ops.backends[op].name == backend for op, backend in overrides.items())
    chunks = build_chunks(spec, [list(range(len(spec.pattern)))], groups, ops, dtype=dtype, device=device)
    chunks[0].initialise(seed)
    wrapped = wrap(chunks, groups)
    optimizer = build_optimizer(wrapped, OptimizerSettings(lr=3e-3), groups)
    losses, first = [], None
    for batch in packed_batches(spec, STEPS):
        stats = backward(wrapped, optimizer, [batch], groups, num_sources=2)
        first = first or {key: g.clone() for key, g in whole_gradients(chunks, wrapped, groups).items()}
        update(optimizer, stats.grad_norm, 3e-3)
        losses.append(stats.loss)
    weights = {key: tensor.detach().float() for key, tensor, _ in chunks[0].table()}
    return losses, first, weights


def distance(got, want):
    """Of two sets of tensors, relative to the second."""
    difference, whole = (
        torch.stack([x.norm() for x in xs]).norm() for xs in ([got[k] - want[k] for k in want], want.values())
    )
    return (difference / whole).item()


def mean_errors(name, tp, seeds=(3, 4, 5, 6)):
    """Of the reference ops in bf16, by step: how far a loss is from that of fp32."""
    errors = []
    for seed in seeds:
        exact, plain = (
            run_ranks(tp, train, name, {}, dtype, seed, tp=tp)[0][0] for dtype in (torch.float32, torch.bfloat16)
        )
        errors.append([abs(b - c) for b, c in zip(plain, exact, strict=True)])
    return [sum(step) / len(seeds) for step in zip(*errors, strict=True)]


@pytest.mark.parametrize(
    ("name", "tp"), [("dense", 1), ("dense", 2), ("hybrid", 1), ("hybrid", 2), ("granite hybrid", 2)]
)
def test_training_on_kernels_equals_training_on_the_reference(name, tp):
    """to bf16's accuracy: as far from training in fp32 as the reference ops in bf16 are, of losses on average

    Adam's first step moves every weight by lr, in the direction that rounding may choose: how far one loss of one model
    is off is luck.
    """
    exact = run_ranks(tp, train, name, {}, torch.float32, tp=tp)
    plain = run_ranks(tp, train, name, {}, torch.bfloat16, tp=tp)
    ours = run_ranks(tp, train, name, TRITON, torch.bfloat16, tp=tp)
    noise = mean_errors(name, tp)
    for rank in range(tp):
        (losses, gradients, weights), theirs, true = ours[rank], plain[rank], exact[rank]
        for a, c, off in zip(losses, true[0], noise, strict=True):
            assert abs(a - c) <= 2 * off + 1e-3 * c, (losses, true[0], noise)
        assert distance(gradients, true[1]) <= 1.1 * distance(theirs[1], true[1])
        assert distance(weights, true[2]) <= 1.1 * distance(theirs[2], true[2])
