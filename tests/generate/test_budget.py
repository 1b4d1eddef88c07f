"""Responses in parts: a stream that stops each sample after some tokens, and later ones that continue them."""

from dataclasses import replace

import numpy as np
import pytest
from ranks import run_ranks
from tiny.engines import by_sample, engine_on, random_requests

from prism_mcore.generate import Request, Sampling
from prism_mcore.rl.parity import op_set

SAMPLING = {"temperature": 0.9, "max_tokens": 41, "stop_ids": [7, 8]}


def in_parts(groups, budget):
    """Every sample in one stream, and in parts of `budget` tokens; the exact op set, in which no pass changes a bit."""
    engine = engine_on(groups, "granite hybrid", ops=op_set("exact", {}, "cpu"), slots=3)
    requests, sampling = random_requests(3, samples=2, longest=20), Sampling(**SAMPLING)
    whole = by_sample(engine.stream(requests, sampling))
    parts, streams = {}, 0
    waiting = {(i, j): Request(r.tokens, (key,)) for i, r in enumerate(requests) for j, key in enumerate(r.keys)}
    while waiting:
        streams += 1
        places = list(waiting)
        for c in engine.stream([waiting[place] for place in places], sampling, budget=budget):
            place = places[c.request]
            assert len(c.tokens) <= budget and (c.finish != "budget" or len(c.tokens) == budget)
            before = parts.get(place)
            parts[place] = c if before is None else joined(before, c)
            request = waiting.pop(place)
            if c.finish == "budget":
                waiting[place] = replace(request, tokens=request.tokens + c.tokens, begun=request.begun + len(c.tokens))
    return whole, parts, streams


def joined(first, rest):
    return replace(rest, tokens=first.tokens + rest.tokens, logprobs=np.concatenate([first.logprobs, rest.logprobs]))


@pytest.mark.parametrize("layout", [(1, {}), (2, {"tp": 2})])
def test_a_response_in_parts_is_the_response(layout):
    ranks, degrees = layout
    for whole, parts, streams in run_ranks(ranks, in_parts, 6, **degrees):
        assert streams > 2 and {c.finish for c in whole.values()} == {"stop", "length"}
        for place, want in whole.items():
            got = parts[place]
            assert (got.tokens, got.finish, got.stop_token) == (want.tokens, want.finish, want.stop_token)
            assert np.array_equal(got.logprobs, want.logprobs)


def refused(groups, request):
    engine = engine_on(groups, "dense")
    with pytest.raises(ValueError) as error:
        list(engine.stream([request], Sampling(max_tokens=4)))
    return str(error.value)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((1, 2, 3), ((0, 1, 0, 0), (0, 1, 0, 1)), begun=1), "continues one response, and has 2 keys"),
        (Request((1, 2), ((0, 1, 0, 0),), begun=2), "has begun=2 of 2 tokens; needed: a prompt before"),
        (Request((1, 2, 3, 4, 5), ((0, 1, 0, 0),), begun=4), "sampling.max_tokens=4 leaves none"),
    ],
)
def test_a_response_that_cannot_be_continued_is_refused(request_, message):
    assert message in run_ranks(1, refused, request_)[0]
