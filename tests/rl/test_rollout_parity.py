"""rl.parity=exact: sampler and training give every sampled token the same bits; a fault of one bit stops the run."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks
from tiny.engines import engine_on, random_requests
from tiny.models import SPECS
from tiny.rollouts import group_of, rollout

from prism_mcore.generate import Engine, EngineSettings, Request, Sampling
from prism_mcore.model.build import build_chunks
from prism_mcore.model.ops import Ops
from prism_mcore.rl.packing import pack, samples_of
from prism_mcore.rl.parity import check, decoded_trace, op_set, trained_trace
from prism_mcore.rl.settings import PolicySettings
from prism_mcore.rl.step import policy_backward
from prism_mcore.train.optimizer import build_optimizer, wrap
from prism_mcore.train.settings import OptimizerSettings

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXACT = PolicySettings(parity="exact", kl_coefficient=0.0)
# Prompts that end within a block of 64, at its end and in the next one; responses cross a border of blocks.
PROMPT_LENS, SAMPLES, RESPONSE = (3, 64, 70), 2, 66


def open_policy(groups, spec, dtype, recompute=""):
    device = CPU
    (model,) = build_chunks(
        replace(SPECS[spec], max_positions=192),
        [list(range(len(SPECS[spec].pattern)))],
        groups,
        Ops(op_set("exact", {}, device), device),
        dtype=DTYPES[dtype],
        device=device,
        sequence_parallel=groups.tp_size > 1,
        recompute=frozenset(recompute),
    )
    model.initialise(3)
    return model


def sample(model, groups, temperature=0.8):
    """This replica's groups of rollouts: fewer slots than samples, so that places are refilled."""
    generator = torch.Generator().manual_seed(groups.dp_rank)
    prompts = [tuple(torch.randint(61, (n,), generator=generator).tolist()) for n in PROMPT_LENS]
    engine = Engine(model, settings=EngineSettings(slots=4))
    requests = [Request(prompt, tuple((0, 1, i, j) for j in range(SAMPLES))) for i, prompt in enumerate(prompts)]
    made = [[None] * SAMPLES for _ in prompts]
    for c in engine.stream(requests, Sampling(temperature=temperature, max_tokens=RESPONSE, stop_ids=[7])):
        one = rollout(c.tokens, float(c.sample), prompt=prompts[c.request], logprobs=c.logprobs, sample=c.sample)
        made[c.request][c.sample] = replace(one, temperature=temperature, prompt=c.request)
    return [group_of(*group, index=i) for i, group in enumerate(made)]


def one_step(groups, spec, dtype, recompute="", fault=None):
    """Sample, hand the rollouts to the other replica, update on them in one packed batch, check; the update's stats."""
    model = open_policy(groups, spec, dtype, recompute)
    sampled = sample(model, groups)
    replicas = [None] * groups.dp_size
    dist.all_gather_object(replicas, sampled, group=groups.dp)
    everyone = [group for replica in replicas for group in replica]
    others = samples_of(everyone, EXACT)[::-1][groups.dp_rank :: groups.dp_size]
    batch = pack(others, version=0, temperature=0.8, multiple=groups.tp_size)
    if fault is not None:
        plant(model, fault)
    chunks = wrap([model], groups)
    optimizer = build_optimizer(chunks, OptimizerSettings(), groups)
    stats = policy_backward(chunks, optimizer, [batch], EXACT, groups)
    check(stats, [r for group in everyone for r in group.rollouts], model, EXACT, step=1)
    return stats


def plant(model, place):
    """One unit in the last place of one number of each token's hidden state, in training's forward passes alone."""
    training = []

    def nudge(_module, _inputs, out):
        if not training:
            return None
        kept, x = (out[0], out[1]) if place != "final_norm" else (out[1], out[0])
        x = x + torch.where(torch.arange(x.shape[-1]) == x.detach().abs().argmax(-1, keepdim=True), ulp(x), 0)
        return (kept, x) if place != "final_norm" else (x, kept)

    model.register_forward_pre_hook(lambda *_: training.append(1))
    model.register_forward_hook(lambda *_: training.clear())
    (model.final_norm if place == "final_norm" else model.layers[place]).register_forward_hook(nudge)


def ulp(x):
    return (x.detach().abs() * torch.finfo(x.dtype).eps).to(x.dtype)


LAYOUTS = {"alone": (1, {}), "dp2": (2, {}), "tp2+sp": (2, {"tp": 2, "sequence_parallel": True})}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["dense", "qwen", "granite hybrid"])
def test_every_sampled_token_has_the_samplers_bits_in_training(spec, dtype, layout):
    ranks, degrees = LAYOUTS[layout]
    for stats in run_ranks(ranks, one_step, spec, dtype, **degrees):
        assert stats.tokens > 100
        assert stats.gap.size == 0 and stats.gap_mean == 0
        assert stats.ratio_max == 1


def test_several_groups_of_states_and_recomputed_layers_too():
    (stats,) = run_ranks(1, one_step, "hybrid", "bf16", "M*-")
    assert stats.tokens > 100 and stats.gap.size == 0


def both_paths(groups, spec, temperature):
    """With the ops of rl.parity=tolerance: largest differences of log-probs to the sampler's, and between states."""
    engine = engine_on(groups, spec, slots=3)
    requests = random_requests(2, longest=20)
    differences = []
    for c in engine.stream(requests, Sampling(temperature=temperature, max_tokens=12)):
        prompt = requests[c.request].tokens
        sampled = replace(rollout(c.tokens, prompt=prompt, logprobs=c.logprobs), temperature=temperature)
        trained, decoded = trained_trace(engine.model, sampled), decoded_trace(engine.model, sampled)
        assert list(trained.states) == list(decoded.states)
        states = [torch.cat(trained.states[place]) - torch.cat(decoded.states[place]) for place in trained.states]
        wanted = torch.from_numpy(c.logprobs)
        logprobs = [torch.cat(path.logprobs)[len(prompt) - 1 :] - wanted for path in (trained, decoded)]
        differences.append(tuple(max(float(x.abs().max()) for x in xs) for xs in (logprobs, states)))
    return differences


@pytest.mark.parametrize(
    ("spec", "temperature"), [("dense", 0.8), ("qwen", 0.8), ("hybrid", 1.0), ("granite hybrid", 0.0)]
)
def test_the_replayed_paths_are_those_of_sampler_and_training(spec, temperature):
    for logprob, state in run_ranks(1, both_paths, spec, temperature)[0]:
        assert logprob <= 1e-5 and state <= 1e-4


@pytest.mark.parametrize(
    "spec, dtype, place, named",
    [
        ("dense", "bf16", "final_norm", "final norm"),
        ("granite hybrid", "fp32", "final_norm", "final norm"),
        ("granite hybrid", "bf16", "2", "sub-layer 2 (attention)"),
    ],
)
def test_a_fault_of_one_bit_stops_the_run_and_is_found(spec, dtype, place, named):
    with pytest.raises(RankError, match=r"rl\.parity=exact: rollout [0-9]+ .*differ by") as error:
        run_ranks(1, one_step, spec, dtype, "", place)
    assert f"the paths part first in the {named}, at token 0 of prompt and response" in str(error.value)


def test_exact_is_one_op_set_and_refuses_another():
    assert op_set("tolerance", {"swiglu": "reference"}, CPU) == {"swiglu": "reference"}
    exact = op_set("exact", {"swiglu": "auto"}, CPU)
    assert {exact[op] for op in ("linear", "swiglu", "attention", "attention_decode", "ssd_step")} == {"exact"}
    with pytest.raises(ValueError, match=r"kernels\.swiglu=reference rounds a token by the batch it is in"):
        op_set("exact", {"swiglu": "reference"}, CPU)


def test_exact_on_a_gpu_needs_ops_that_do_not_depend_on_the_batch():
    with pytest.raises(ValueError, match=r"on a GPU every op has to give a row the same bits.*linear"):
        op_set("exact", {}, "cuda")
