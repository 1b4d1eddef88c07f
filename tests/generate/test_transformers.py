"""Greedy tokens and sampled tokens' log-probs are transformers', for every family."""

import copy

import pytest
import torch
from ranks import run_ranks
from tiny.engines import by_sample, engine_on
from tiny.hf_models import FAMILIES, save_hf

from prism_mcore.generate import Request, Sampling

PROMPTS = (tuple(range(1, 18)), (5,), tuple(range(60, 20, -1)))  # longer than the window, one token, several chunks
NEW = 20


def generate(groups, folder, temperature, slots):
    engine = engine_on(groups, folder, slots=slots)
    requests = [Request(prompt, tuple((0, 0, i, s) for s in range(2))) for i, prompt in enumerate(PROMPTS)]
    return by_sample(engine.stream(requests, Sampling(temperature=temperature, max_tokens=NEW)))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    model = save_hf(request.param, folder, max_position_embeddings=128)
    return folder, model


def their_logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def their_greedy(model, prompt):
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(int(their_logits(model, tokens)[-1].argmax()))
    return tuple(tokens[len(prompt) :])


def test_greedy_tokens_are_those_of_transformers(case):
    folder, model = case
    completions = run_ranks(1, generate, folder, 0.0, 4)[0]
    assert len(completions) == 2 * len(PROMPTS)
    for (request, sample), completion in completions.items():
        assert completion.tokens == their_greedy(model, PROMPTS[request]), (request, sample)
        assert (completion.finish, completion.stop_token) == ("length", False)


def test_sampled_logprobs_are_those_of_transformers(case):
    """in fp64: its own rounding in fp32 would count as ours"""
    folder, model = case
    model, temperature = copy.deepcopy(model).double(), 0.7
    for (request, _), completion in run_ranks(1, generate, folder, temperature, 5)[0].items():
        prompt = PROMPTS[request]
        logits = their_logits(model, prompt + completion.tokens)[len(prompt) - 1 : -1]
        want = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert (torch.from_numpy(completion.logprobs) - want).abs().max() <= 1e-5
