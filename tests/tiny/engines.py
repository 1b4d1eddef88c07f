"""Engines on tiny models for tests of generation: `from tiny.engines import engine_on`."""

import torch
from tiny.models import SPECS

from prism_mcore.convert.online import load_hf
from prism_mcore.generate import Engine, EngineSettings, Request
from prism_mcore.model.build import build_chunks
from prism_mcore.model.ops import Ops
from prism_mcore.model.spec import read_spec

CPU = torch.device("cpu")


def engine_on(groups, source, *, dtype=torch.float32, sequence_parallel=False, ops=None, tokenizer=None, **settings):
    """source: a name in `models.SPECS`, drawn from seed 3, or a Hugging Face directory."""
    spec = SPECS[source] if source in SPECS else read_spec(source)
    (model,) = build_chunks(
        spec,
        [list(range(len(spec.pattern)))],
        groups,
        Ops(ops or {}, CPU),
        dtype=dtype,
        device=CPU,
        sequence_parallel=sequence_parallel,
    )
    if source in SPECS:
        model.initialise(3)
    else:
        load_hf(source, [model], groups)
    return Engine(model, tokenizer, settings=EngineSettings(**settings))


def random_requests(count, *, samples=1, longest=90, seed=0, vocabulary=61):
    """Prompts of random lengths from 1 to `longest`: some fill blocks of 64 tokens, most do not."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [
        Request(
            tuple(torch.randint(vocabulary, (n,), generator=generator).tolist()),
            tuple((seed, 5, i, sample) for sample in range(samples)),
        )
        for i, n in enumerate(lengths)
    ]


def by_sample(completions):
    return {(c.request, c.sample): c for c in completions}
