"""Twenty training steps equal a plain transformers model with torch AdamW, from the same weights and tokens."""

import pytest
import torch
from ranks import run_ranks
from tiny import oracle
from tiny.models import CONFIGS, SPECS, packed_batch

from prism_mcore.model.build import build_chunks
from prism_mcore.model.ops import Ops
from prism_mcore.model.parameters import parameters
from prism_mcore.model.tensors import shard
from prism_mcore.train.optimizer import build_optimizer, update, wrap
from prism_mcore.train.schedule import learning_rate
from prism_mcore.train.settings import OptimizerSettings
from prism_mcore.train.step import backward

STEPS = 20
SETTINGS = OptimizerSettings(lr=1e-2, schedule="cosine", warmup_steps=5, weight_decay=0.1, eps=1e-8, clip_grad=0.5)


def step_batches(spec, step):
    """Two micro-batches of two rows of 16 sorted tokens (there is something to learn), each row one document."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(spec.vocab_size, (4, 16), generator=generator).sort(-1).values
    return [packed_batch(list(pair), 16) for pair in rows.split(2)]


def our_curve(groups, spec_name, weights):
    spec = SPECS[spec_name]
    chunks = build_chunks(
        spec,
        [list(range(len(spec.pattern)))],
        groups,
        Ops({}, torch.device("cpu")),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        for name, tensor, parameter in chunks[0].table():
            tensor.copy_(shard(weights[name], parameter, groups.tp_rank, groups.tp_size))
    wrapped = wrap(chunks, groups)
    optimizer = build_optimizer(wrapped, SETTINGS, groups)
    curve = []
    for step in range(1, STEPS + 1):
        batches = step_batches(spec, step)[groups.dp_rank :: groups.dp_size]
        stats = backward(wrapped, optimizer, batches, groups, num_sources=2)
        update(optimizer, stats.grad_norm, learning_rate(step, SETTINGS, STEPS))
        curve.append((stats.loss, stats.grad_norm))
    return curve


def transformers_curve(model, spec):
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": SETTINGS.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=SETTINGS.betas, eps=SETTINGS.eps)
    curve = []
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss = oracle.hf_loss(model, step_batches(spec, step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, SETTINGS, STEPS)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve


@pytest.mark.parametrize("layout", [{}, {"tp": 2}], ids=["dp2", "tp2"])
@pytest.mark.parametrize("spec_name", CONFIGS)
def test_twenty_steps_equal_transformers(spec_name, layout):
    model, spec = oracle.hf_model(CONFIGS[spec_name]), SPECS[spec_name]
    weights = {name: tensor.detach().clone() for name, tensor in oracle.our_weights(model, spec).items()}
    assert {n: tuple(w.shape) for n, w in weights.items()} == {n: p.shape for n, p in parameters(spec).items()}
    theirs = transformers_curve(model, spec)
    ours = run_ranks(2, our_curve, spec_name, weights, **layout)[0]
    assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in theirs], rel=1e-4)
    assert [norm for _, norm in ours] == pytest.approx([norm for _, norm in theirs], rel=1e-3)
    assert ours[-1][0] < ours[0][0] - 0.1  # it learns, so that equality says something
