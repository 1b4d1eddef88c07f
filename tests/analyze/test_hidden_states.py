"""Pooled hidden states: transformers' own of every layer, in any pass and under tensor and sequence parallelism."""

import pytest
import torch
from ranks import run_ranks
from tiny.engines import engine_on
from tiny.gradients import close
from tiny.hf_models import save_hf

from prism_mcore.analyze.hidden_states import pooled_states


def prompts():
    random = torch.Generator().manual_seed(0)
    return [torch.randint(61, (n,), generator=random).tolist() for n in (3, 30, 1, 9, 9, 17)]


def theirs(model):
    rows = []
    for tokens in prompts():
        with torch.no_grad():
            states = model(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True).hidden_states
        rows.append(torch.stack([state[0].mean(0) for state in states]))
    return torch.stack(rows)


def on_rank(groups, hf, sequence_parallel, sizes):
    model = engine_on(groups, hf, sequence_parallel=sequence_parallel).model
    return [pooled_states(model, prompts(), pass_tokens=size) for size in sizes]


@pytest.mark.parametrize("family", ["llama-3.1", "granite-4.0-h-micro", "nemotron-h"])
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, True)])
def test_they_are_the_means_of_transformers_hidden_states(tmp_path, family, tp, sequence_parallel):
    want = theirs(save_hf(family, tmp_path / "hf"))
    for ranks in run_ranks(tp, on_rank, tmp_path / "hf", sequence_parallel, [4096, 20, 1], tp=tp):
        for found in ranks:
            assert found.shape == want.shape and found.dtype == torch.float32
            for layer in range(want.shape[1]):
                assert close(found[:, layer], want[:, layer]), layer
