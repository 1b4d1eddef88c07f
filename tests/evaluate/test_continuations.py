"""Log-probabilities of continuations: transformers' own, whatever shares a pass, and the same under TP."""

import pytest
import torch
from ranks import run_ranks
from tiny.engines import engine_on
from tiny.hf_models import FAMILIES, save_hf

from prism_mcore.evaluate.continuations import Score, score_continuations

VOCABULARY = 61


def pairs_of(seed):
    """Contexts of many lengths, some with several continuations, some with one token of context."""
    random = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(VOCABULARY, (n,), generator=random).tolist()

    pairs = [(draw(length), draw(1 + length % 4)) for length in (1, 2, 5, 5, 9, 17, 30)]
    for length in (1, 2, 12, 25):
        context = draw(length)
        pairs += [(context, draw(n)) for n in (1, 3, 1, 6)]
    return [pairs[i] for i in torch.randperm(len(pairs), generator=random)]


def theirs(model, context, continuation):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + continuation]), use_cache=False).logits[0]
    rows = logits[len(context) - 1 : -1]
    logprobs = rows.double().log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
    return Score(float(logprobs.sum()), rows.argmax(-1).tolist() == continuation)


def greedy_one(model, context, count):
    tokens = list(context)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(context) :]


def score_on(groups, hf, pairs, sizes):
    model = engine_on(groups, hf).model
    passes = []
    return [score_continuations(model, pairs, pass_tokens=size, before_pass=passes.append) for size in sizes], passes


@pytest.mark.parametrize("family", ["llama-3.1", "mistral-v0.1", "granite-4.0-h-micro", "nemotron-h"])
@pytest.mark.parametrize("tp", [1, 2])
def test_scores_are_transformers_in_any_pass(tmp_path, family, tp):
    assert family in FAMILIES
    model = save_hf(family, tmp_path / "hf")
    pairs = pairs_of(0)
    pairs += [(context, greedy_one(model, context, 3)) for context, _ in pairs[:4]]
    want = [theirs(model, *pair) for pair in pairs]
    assert sum(score.greedy for score in want) >= 4
    for scores, passes in run_ranks(tp, score_on, tmp_path / "hf", pairs, [8192, 40, 1], tp=tp):
        for found in scores:
            assert [score.greedy for score in found] == [score.greedy for score in want]
            assert [score.logprob for score in found] == pytest.approx([s.logprob for s in want], rel=1e-4, abs=1e-4)
        assert sum(passes) == 3 * len(pairs)
