"""A policy with its optimizer, and its share of random rollouts, on a rank: `from policies import open_policy`."""

import torch
from tiny.models import SPECS
from tiny.rollouts import random_groups

from prism_mcore.rl.packing import micro_batches, pack, samples_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_policy(groups, spec, dtype="fp32", overlap=False, **optimizer):
    """Chunks with their optimizer, all from one seed."""
    from prism_mcore.model.build import build_chunks
    from prism_mcore.model.ops import Ops
    from prism_mcore.train.optimizer import build_optimizer, wrap
    from prism_mcore.train.settings import OptimizerSettings

    device = torch.device("cpu")
    split = [list(range(len(SPECS[spec].pattern)))]
    chunks = build_chunks(
        SPECS[spec],
        split,
        groups,
        Ops({}, device),
        dtype=DTYPES[dtype],
        device=device,
        sequence_parallel=groups.tp_size > 1,
    )
    chunks[0].initialise(0)
    instances = groups.dp_cp.size() // groups.collection.intra_dp_cp.size()
    wrapped = wrap(chunks, groups, optimizer_instances=instances, overlap=overlap)
    return wrapped, build_optimizer(
        wrapped, OptimizerSettings(**{"lr": 1e-2, "weight_decay": 0.0, **optimizer}), groups
    )


def batches_of(groups, spec, settings, *, budget=24, seed=0, first=0):
    made = random_groups(SPECS[spec].vocab_size, seed=seed)
    samples = samples_of(made, settings)
    mine = micro_batches([s.length for s in samples], groups.dp_size, budget)[groups.dp_rank] or [[]]
    return [
        pack([samples[i] for i in batch], version=first, temperature=1.0, multiple=groups.tp_size) for batch in mine
    ]
