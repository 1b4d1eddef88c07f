"""The engine: what a sample gets depends on its prompt and key alone, and nothing outlives it."""

import gc
import weakref

import numpy as np
import pytest
import tokenizers
import torch
from ranks import RankError, run_ranks
from tiny.engines import by_sample, engine_on, random_requests
from tiny.models import SPECS, packed_batch
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prism_kernels.caches import PagedCache
from prism_mcore.generate import Engine, Request, Sampling
from prism_mcore.generate.prompts import text_tokens
from prism_mcore.model.hybrid import Head
from prism_mcore.text import Tokenizer

HOW = Sampling(temperature=0.9, max_tokens=70, stop_ids=[7])
ALL = [(request, sample) for request in range(5) for sample in range(3)]


def sampled(groups, spec_name, settings, how=HOW, **build):
    """Five prompts of up to 90 tokens x 3 samples on a model with 160 positions."""
    engine = engine_on(groups, spec_name, **build, **settings)
    engine.context = 160
    return by_sample(engine.stream(random_requests(5, samples=3), how))


def same(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for place, completion in got.items():
        assert completion.tokens == want[place].tokens, place
        assert completion.finish == want[place].finish and completion.stop_token == want[place].stop_token
        assert np.abs(completion.logprobs - want[place].logprobs).max() <= tolerance


@pytest.fixture(scope="module")
def alone():
    """Each model's samples with a slot for everyone and one prefill."""
    return {name: run_ranks(1, sampled, name, {"slots": 64})[0] for name in SPECS}


def test_the_case_has_what_it_should(alone):
    finishes = {c.finish for c in alone["dense"].values()} | {c.finish for c in alone["hybrid"].values()}
    assert finishes == {"stop", "length"} and list(sorted(alone["dense"])) == ALL
    assert len({c.tokens for c in alone["hybrid"].values()}) == len(ALL)


@pytest.mark.parametrize("settings", [{"slots": 1}, {"slots": 4}, {"slots": 7, "prefill_tokens": 64}], ids=str)
@pytest.mark.parametrize("spec_name", SPECS)
def test_slots_and_batches_change_nothing(alone, spec_name, settings):
    same(run_ranks(1, sampled, spec_name, settings)[0], alone[spec_name])


def one_by_one(groups, spec_name):
    """Every sample as a request of its own, backwards: separate prefills, other slots, other neighbours."""
    engine = engine_on(groups, spec_name, slots=5)
    engine.context = 160
    requests = random_requests(5, samples=3)
    places = [(r, s) for r in reversed(range(5)) for s in reversed(range(3))]
    single = [Request(requests[r].tokens, (requests[r].keys[s],)) for r, s in places]
    return {places[c.request]: c for c in engine.stream(single, HOW)}


@pytest.mark.parametrize("spec_name", SPECS)
def test_a_forked_group_equals_separate_prefills(alone, spec_name):
    same(run_ranks(1, one_by_one, spec_name)[0], alone[spec_name])


def dealt_out(groups, spec_name):
    engine = engine_on(groups, spec_name, slots=4)
    engine.context = 160
    mine = range(groups.dp_rank, 5, groups.dp_size)
    requests = random_requests(5, samples=3)
    return {(mine[c.request], c.sample): c for c in engine.stream([requests[i] for i in mine], HOW)}


def test_data_parallel_replicas_share_out_the_prompts(alone):
    first, second = run_ranks(2, dealt_out, "hybrid")
    assert not first.keys() & second.keys()
    same(first | second, alone["hybrid"])


def generate_and_train(groups, spec_name, sequence_parallel):
    """Samples, and the model's loss on one batch afterwards."""
    engine = engine_on(groups, spec_name, sequence_parallel=sequence_parallel, slots=6)
    engine.context = 160
    completions = by_sample(engine.stream(random_requests(5, samples=3), HOW))
    documents = [torch.arange(20), torch.arange(20, 32)]
    return completions, float(engine.model(packed_batch(documents, 32))[0])


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("spec_name", SPECS)
def test_tensor_parallel_ranks_draw_the_same_tokens(alone, spec_name, sequence_parallel):
    """Also where the model is trained sequence-parallel, which it still is afterwards."""
    (_, loss), *_ = run_ranks(1, generate_and_train, spec_name, False)
    for completions, loss_of_rank in run_ranks(2, generate_and_train, spec_name, sequence_parallel, tp=2):
        same(completions, alone[spec_name])
        assert loss_of_rank == pytest.approx(loss, rel=1e-5)


def tensors_of(cache):
    if isinstance(cache, PagedCache):
        return [cache.keys, cache.values]
    return [] if cache is None else cache.conv.tensors() + cache.scan.tensors()


def again(groups, spec_name):
    """The same stream after: another one, one that was left half-way, caches full of NaN and a reset, new weights."""
    engine = engine_on(groups, spec_name, slots=6)
    engine.context = 160
    requests = random_requests(5, samples=3)
    runs = [by_sample(engine.stream(requests, HOW))]
    list(engine.stream(random_requests(3, samples=4, seed=9), HOW))
    runs.append(by_sample(engine.stream(requests, HOW)))
    half = engine.stream(requests, HOW)
    for _ in range(4):
        next(half)
    runs.append(by_sample(engine.stream(requests, HOW)))
    with torch.inference_mode():
        for cache in engine.replica._caches[1].layers.values():
            for x in tensors_of(cache):
                x.fill_(torch.nan)
    engine.reset()
    runs.append(by_sample(engine.stream(requests, HOW)))
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(1.1)
    changed = by_sample(engine.stream(requests, HOW))
    return runs, changed


@pytest.mark.parametrize("spec_name", ["dense", "granite hybrid"])
def test_no_state_is_left_behind(alone, spec_name):
    runs, changed = run_ranks(1, again, spec_name)[0]
    for run in runs:
        same(run, alone[spec_name])
    assert any(changed[place].tokens != alone[spec_name][place].tokens for place in ALL)


def limited(groups, cache_kb):
    """Memory for a few samples only; what is in use at the end."""
    engine = engine_on(groups, "granite hybrid", slots=64, cache_gb=cache_kb / 1e6)
    engine.context = 160
    completions = by_sample(engine.stream(random_requests(5, samples=3), HOW))
    return completions, engine.statistics, engine.replica.costs


def test_memory_bounds_what_runs_at_once(alone):
    completions, statistics, costs = run_ranks(1, limited, 250)[0]
    same(completions, alone["granite hybrid"])
    assert statistics.cache_bytes <= 250_000
    slots = statistics.slot_steps // statistics.steps
    assert 1 < slots < len(ALL) and slots * (costs.slot + costs.block) < 250_000
    assert statistics.decoded_tokens == sum(len(c.tokens) for c in completions.values())
    assert statistics.slot_steps / 2 < statistics.running_steps <= statistics.slot_steps


def too_little(groups):
    with pytest.raises(ValueError, match=r"generate\.cache_gb: 5e-05 GB of caches; a sequence of up to 192 tokens"):
        limited(groups, 50)
    return True


def test_memory_for_less_than_one_sample_is_refused():
    assert run_ranks(1, too_little) == [True]


def ends(groups):
    """Greedy, so that what is drawn does not depend on where it ends."""
    engine = engine_on(groups, "dense")
    engine.context = 40
    prompt = Request(tuple(range(10)), ((0, 0, 0, 0),))

    def run(**how):
        (completion,) = engine.stream([prompt], Sampling(temperature=0, **how))
        return completion

    free = run(max_tokens=100)
    stop = free.tokens[4]
    return free, run(max_tokens=100, stop_ids=[stop]), run(max_tokens=3), run(max_tokens=1), stop


def test_a_response_ends_at_a_stop_token_the_limit_or_the_context():
    free, stopped, short, one, stop = run_ranks(1, ends)[0]
    assert (len(free.tokens), free.finish) == (30, "context")  # 10 + 30 fill 40 positions
    first = free.tokens.index(stop)
    assert (stopped.tokens, stopped.finish, stopped.stop_token) == (free.tokens[: first + 1], "stop", True)
    assert (short.tokens, short.finish, short.stop_token) == (free.tokens[:3], "length", False)
    assert (one.tokens, one.finish) == (free.tokens[:1], "length")


def freed(groups):
    """Are the caches gone when they are given up, without the garbage collector's help?"""
    engine = engine_on(groups, "hybrid", slots=6)
    gc.disable()
    try:
        list(engine.stream(random_requests(5, longest=20), HOW))
        caches = weakref.ref(engine.replica._caches[1])
        engine.reset()
        return caches() is None
    finally:
        gc.enable()


def test_nothing_of_a_stream_is_left_to_the_garbage_collector():
    """It could still hold the old caches, and graphs with memory of their own, when larger ones are made."""
    assert run_ranks(1, freed) == [True]


def broken(groups, temperature):
    engine = engine_on(groups, "dense")
    with torch.no_grad():
        engine.model.final_norm.weight[0] = torch.nan
    list(engine.stream(random_requests(1, longest=20), Sampling(temperature=temperature)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_and_not_a_text(temperature):
    with pytest.raises(RankError, match="FloatingPointError: the model's logits are not finite"):
        run_ranks(1, broken, temperature)


def test_a_prompt_of_text_does_not_end_with_the_end_of_a_sequence():
    """A tokenizer of transformers that puts its end-of-sequence token after every text."""
    words = tokenizers.Tokenizer(models.WordLevel({**{str(i): i for i in range(9)}, "</s>": 9}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 9)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    assert tokenizer("3 4").input_ids == [3, 4, 9]
    assert text_tokens("3 4", Tokenizer.of(tokenizer)) == (3, 4)


def after_a_step(groups, overlap):
    """Samples right after an optimizer step whose gather of the new weights may still be under way."""
    from tiny.policies import open_policy

    chunks, optimizer = open_policy(groups, "dense", overlap=overlap, lr=0.1)
    model = chunks[0].module
    for step in range(2):
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name) + step)
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step()
    return by_sample(Engine(model).stream(random_requests(2), HOW))


def test_sampling_waits_for_the_gather_of_new_weights():
    for got, want in zip(*(run_ranks(2, after_a_step, overlap) for overlap in (True, False)), strict=True):
        same(got, want)


NO_PROMPTS = {
    "['hello']": "prompt 0: the prompt is text, and there is no tokenizer",
    "'hello'": "prompts is one text; needed: a list of prompts",
    "[[3], [3.7, 4.2]]": r"prompt 1: tokens is \[3.7, 4.2\]; needed: a list of token ids",
    "[[3, True]]": r"prompt 0: tokens is \[3, true\]",
    "[[3, None]]": r"prompt 0: tokens is \[3, null\]",
    "[3, 4]": "prompt 0: tokens is 3; needed: a list",
    "[[[3, 4]]]": r"prompt 0: tokens is \[\[3, 4\]\]",
    "[np.array([3.0])]": r"prompt 0: tokens is \[3.0\]",
    "[[]]": "prompt 0 is empty",
    "[[3], [61]]": "prompt 1 holds token 61",
}


def with_words(count):
    words = tokenizers.Tokenizer(models.WordLevel({str(i): i for i in range(count)}, unk_token="0"))
    return Tokenizer(words)


def wrong_prompts(groups):
    engine = engine_on(groups, "dense")
    messages = []
    for tokens in ((), (1,) * 64, (61,), (-1, 2), (3.7, 4)):
        with pytest.raises(ValueError) as error:
            list(engine.stream([Request((1,), ((0, 0, 0, 0),)), Request(tokens, ((0, 0, 1, 0),))], HOW))
        messages.append(str(error.value))
    with pytest.raises(ValueError, match="prompt 0 has no keys"):
        list(engine.stream([Request((1,), ())], HOW))
    for prompts, message in NO_PROMPTS.items():
        with pytest.raises(ValueError, match=message):
            engine.generate(eval(prompts))
    with pytest.raises(ValueError, match="eos holds -1"):
        Engine(engine.model, eos=[-1])
    with pytest.raises(ValueError, match="tokenizer has 99 tokens, the model's vocabulary 61"):
        Engine(engine.model, with_words(99))
    with pytest.raises(ValueError, match=r"prompt 0: .*lone surrogate .ud83d"):
        engine_on(groups, "dense", tokenizer=with_words(61)).generate(["3 \ud83d"])
    assert [len(answers) for answers in engine.generate([torch.tensor([3, 4]), np.array([5])], max_tokens=2)] == [1, 1]
    engine.reset()
    assert engine.statistics.prefilled_tokens == 0
    return messages


def test_prompts_that_cannot_be_answered_are_refused_before_anything_runs():
    empty, long, unknown, negative, cut = run_ranks(1, wrong_prompts)[0]
    assert "prompt 1 is empty" in empty and "fewer than the model's 64 positions" in long
    assert "token 61; needed: ids from 0 to 60" in unknown and "token -1" in negative
    assert "prompt 1 holds 3.7; needed: token ids, whole numbers" in cut


def in_bf16(groups):
    """Largest |log-prob at sampling - that of the training forward|, bf16: the head's logits are not rounded."""
    engine = engine_on(groups, "hybrid", dtype=torch.bfloat16)
    (request,) = random_requests(1, longest=20)
    (completion,) = engine.stream([request], Sampling(max_tokens=20))
    tokens = torch.tensor(request.tokens + completion.tokens)
    with torch.no_grad():
        logprobs, _ = engine.model(packed_batch([tokens], len(tokens)), temperature=1.0)
    start = len(request.tokens) - 1
    hidden = torch.randn(4, 1, 48, dtype=torch.bfloat16)
    logits = engine.model.output(Head.local_logits, hidden, None, 1.0)
    want = hidden[:, 0].double() @ engine.model.output.weight.double().t()
    exact = float((logits - want).abs().max())
    return float((logprobs[start:-1] - torch.from_numpy(completion.logprobs)).abs().max()), exact, logits.dtype


def test_bf16_logits_are_fp32():
    gap, error, dtype = run_ranks(1, in_bf16)[0]
    assert dtype == torch.float32 and error <= 1e-5
    assert gap <= 0.2
