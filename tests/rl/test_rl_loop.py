"""The RL loop on real ranks: it learns, it resumes to the bit, in any layout; what cannot work is refused."""

import itertools
import json
import math
import os
import shutil
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import RankError, run_ranks
from tiny.prompt_files import write_prompts
from tiny.rollouts import group_of, rollout
from tiny.runs import assert_same_state, records, settings_of, state_of

from prism_mcore.config import SettingsError
from prism_mcore.exit_codes import DONE, STOPPED_BY_GUARD, STOPPED_BY_SIGNAL
from prism_mcore.model.settings import resolve_spec
from prism_mcore.plan.memory import num_parameters
from prism_mcore.rl.checks import check
from prism_mcore.rl.prompts import open_prompts
from prism_mcore.rl.settings import RLSettings


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts"))


def settings(files, runs, spec="hybrid", **sections):
    defaults = {
        "rl": {
            "prompts": [{"path": str(files / "prompts.jsonl")}],
            "held_out": [{"path": str(files / "held-out.jsonl")}],
            "tokenizer": str(files),
            "context": 24,
            "prompts_per_step": 4,
            "kl_coefficient": 0.02,
            "reference_every": 2,
            "show": 0,
        },
        "rewards": {"require_think": False, "workers": 1},
        "sampling": {"samples": 4, "max_tokens": 10},
        "train": {"steps": 4},
        "optimizer": {"lr": 1e-2, "schedule": "linear", "weight_decay": 0.0},
    }
    return settings_of(RLSettings, runs, spec, defaults, sections)


def train(groups, settings, until=None):
    """Run the loop, stopping by a signal after `until` steps; exit code, and weights and moments of this rank."""
    from prism_mcore.rl import loop

    prompts = open_prompts(settings, resolve_spec(settings.model))
    with ExitStack() as opened:
        run = loop.build(settings, prompts, groups, torch.device("cpu"), opened)
        if until is not None:
            stop_after(run, until)
        return loop.train(run), *state_of(run)


def stop_after(run, steps):
    """A real SIGTERM to rank 0 while it takes that step."""
    admits = run.guard.admits

    def signalled(step, *rest):
        if step == steps and run.groups.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return admits(step, *rest)

    run.guard.admits = signalled


def untimed(runs):
    """Every step's metrics but for those of clocks and memory."""
    return [
        {key: value for key, value in record.items() if not key.startswith(("time/", "memory/", "generation/"))}
        for record in records(runs)
    ]


def rollouts(runs, step):
    return (Path(runs) / "run" / "rollouts" / f"step_{step:08d}.jsonl").read_text()


def both(files, tmp_path, first, second, ranks=1, stops=((None,), (None,)), **layout):
    """Two runs, each with its settings and stops; the results of the last call of each."""
    results = []
    for name, sections, of_run in (("first", first, stops[0]), ("second", second, stops[1])):
        wanted = settings(files, tmp_path / name, **sections)
        for stop in of_run:
            last = run_ranks(ranks, train, wanted, stop, **layout)
            assert {code for code, _, _ in last} == {DONE if stop is None else STOPPED_BY_SIGNAL}
        results.append(last)
    return results


LAYOUTS = {"dp2": (2, {}), "tp2+sp": (2, {"tp": 2, "sequence_parallel": True})}


@pytest.mark.parametrize(
    ("layout", "dtype", "parity"),
    [("dp2", "fp32", "tolerance"), ("dp2", "bf16", "exact"), ("tp2+sp", "bf16", "tolerance")],
)
def test_two_and_two_steps_equal_four_bit_for_bit(files, tmp_path, layout, dtype, parity):
    ranks, degrees = LAYOUTS[layout]
    sections = {
        "parallel": degrees,
        "precision": {"dtype": dtype},
        "rl": {"parity": parity, "updates": 2, "parity_tolerance": 1.0},
        "train": {"steps": 4, "validate_every": 2},
    }
    want, got = both(files, tmp_path, sections, sections, ranks, ((None,), (2, None)), **degrees)
    first, second = tmp_path / "first", tmp_path / "second"
    assert untimed(first) == untimed(second) and [r["step"] for r in records(first)] == [1, 2, 3, 4]
    assert records(first, "validation.jsonl") == records(second, "validation.jsonl")
    assert [r["step"] for r in records(first, "validation.jsonl")] == [0, 2, 4]
    assert all(rollouts(first, step) == rollouts(second, step) for step in (1, 2, 3, 4))
    for (_, *before), (_, *after) in zip(want, got, strict=True):
        assert_same_state(before, after)
    if parity == "exact":
        assert all(r["rl/logprob_gap_max"] == 0 and r["importance/mean"] == 1 for r in records(first))


def test_rl_in_fp8_blocks_resumes_to_the_bit_and_decodes_as_it_trains(files, tmp_path):
    """Its micro-batches are filled up to multiples of 16 tokens; the gate measures what products' rounding leaves."""
    sections = {
        "precision": {"dtype": "fp32", "fp8": "blockwise"},
        "kernels": {"fp8_linear": "reference"},
        "rl": {"parity": "tolerance", "parity_tolerance": 1e-6},
        "train": {"steps": 2},
    }
    want, got = both(files, tmp_path, sections, sections, stops=((None,), (1, None)))
    assert untimed(tmp_path / "first") == untimed(tmp_path / "second")
    assert_same_state(want[0][1:], got[0][1:])
    run_ranks(1, train, settings(files, tmp_path / "off", train={"steps": 1}))
    without, within = (records(tmp_path / name)[0]["loss"] for name in ("off", "first"))
    assert within != pytest.approx(without, rel=1e-2)


def test_layouts_take_the_same_steps(files, tmp_path):
    runs = {}
    for name, (ranks, degrees) in {"alone": (1, {}), **LAYOUTS}.items():
        wanted = settings(files, tmp_path / name, "granite hybrid", parallel=degrees, train={"steps": 2})
        run_ranks(ranks, train, wanted, **degrees)
        runs[name] = tmp_path / name
    for name in LAYOUTS:
        for step in (1, 2):
            want, got = ([json.loads(line) for line in rollouts(runs[n], step).splitlines()] for n in ("alone", name))
            assert [r["response"] for r in want] == [r["response"] for r in got]
        for want, got in zip(untimed(runs["alone"]), untimed(runs[name]), strict=True):
            for key in ("loss", "grad_norm", "kl", "entropy"):
                # The loss is a sum of terms of size 1 that cancel to 4e-4: one rounding of them is 1e-7.
                assert got[key] == pytest.approx(want[key], rel=1e-4, abs=1e-7), key


def test_a_run_resumes_in_another_layout(files, tmp_path):
    wanted = settings(files, tmp_path, train={"steps": 3})
    run_ranks(2, train, wanted, 1)
    run_ranks(1, train, wanted, 2)
    run_ranks(2, train, settings(files, tmp_path, train={"steps": 3}, parallel={"tp": 2}), tp=2)
    run_ranks(2, train, settings(files, tmp_path / "through", train={"steps": 3}))
    for want, got in zip(untimed(tmp_path / "through"), untimed(tmp_path), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)
        assert got["reward/mean"] == want["reward/mean"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rl": {"parity": "off"}}, "trained with rl.parity=tolerance, not off; resume with tolerance"),
        ({"rl": {"prompts_per_step": 2}}, "rl.prompts_per_step=4, not 2"),
        ({"rl": {"kl_coefficient": 0.0}}, "rl.kl_coefficient > 0=True, not False"),
        ({"spec": "dense"}, "is of another model"),
    ],
)
def test_another_run_is_not_continued(files, tmp_path_factory, change, message):
    runs = tmp_path_factory.getbasetemp() / "to_be_continued"
    if not runs.exists():
        run_ranks(1, train, settings(files, runs, train={"steps": 1}))
    with pytest.raises(RankError, match=message):
        run_ranks(1, train, settings(files, runs, **{"train": {"steps": 2}, **change}))


def midtrained(groups, settings):
    """A checkpoint as mid-training leaves it."""
    from prism_mcore.rl import loop
    from prism_mcore.train.run import spec_record

    with ExitStack() as opened:
        run = loop.build(
            settings, open_prompts(settings, resolve_spec(settings.model)), groups, torch.device("cpu"), opened
        )
        state = {"samples": 8, "spec": spec_record(run.spec), "kept": {}}
        run.checkpoints.save(1, run.models, run.optimizer, state)


def test_rl_does_not_take_a_mid_training_run_for_its_own(files, tmp_path):
    wanted = settings(files, tmp_path)
    run_ranks(1, midtrained, wanted)
    with pytest.raises(
        RankError, match=r"step_00000001 is of another kind of run; to start from its weights give run\.name"
    ):
        run_ranks(1, train, wanted)


def test_a_model_without_positions_is_sampled_as_far_as_the_context(files, tmp_path):
    """Nemotron-H names 8,192 positions and has no position embedding; the paper's context is 16,384."""
    sections = {
        "rl": {"context": 100, "kl_coefficient": 0.0},
        "sampling": {"samples": 2, "max_tokens": 80, "ignore_eos": True},
        "train": {"steps": 1},
    }
    wanted = settings(files, tmp_path, **sections)
    assert resolve_spec(wanted.model).max_positions == 64
    run_ranks(1, train, wanted)
    lines = [json.loads(line) for line in rollouts(tmp_path, 1).splitlines()]
    assert {(line["tokens"], line["finish"]) for line in lines} == {(80, "length")}


def test_a_response_ends_with_any_token_that_the_models_folder_names(files, tmp_path):
    folder = shutil.copytree(files, tmp_path / "tokenizer")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(61))}))
    run_ranks(1, train, settings(folder, tmp_path, train={"steps": 1}))
    assert {json.loads(line)["tokens"] for line in rollouts(tmp_path, 1).splitlines()} == {1}


def test_a_prompt_that_comes_twice_in_a_step_is_answered_anew(files, tmp_path):
    """Seven prompts, fourteen groups."""
    run_ranks(2, train, settings(files, tmp_path, rl={"prompts_per_step": 14}, train={"steps": 1}))
    answers = {}
    for line in map(json.loads, rollouts(tmp_path, 1).splitlines()):
        answers.setdefault(line["prompt_index"], []).append(line["response"])
    assert len(answers) == 7 and all(len(of_prompt) == 8 for of_prompt in answers.values())
    assert all(of_prompt[:4] != of_prompt[4:] for of_prompt in answers.values())


def timed(groups, settings):
    """What each rank says of the time of generation where the second one's clock runs five times as fast."""
    from prism_mcore.rl import loop
    from prism_mcore.train.metrics import StepClock

    with ExitStack() as opened:
        run = loop.build(
            settings, open_prompts(settings, resolve_spec(settings.model)), groups, torch.device("cpu"), opened
        )
        ticks = itertools.count(0.0, 1.0 + 4.0 * groups.rank)
        run.rollouts.clock = StepClock(lambda: next(ticks))
        loop.training_rollouts(run, 1)
        return run.rollouts.clock.parts["time/generation_s"], run.rollouts.generation_s


def test_tokens_per_second_are_those_until_the_slowest_replica_is_done(files, tmp_path):
    assert run_ranks(2, timed, settings(files, tmp_path)) == [(1.0, 5.0), (5.0, 5.0)]


def test_where_the_first_part_of_a_step_has_no_samples_the_second_is_on_policy(files, tmp_path):
    from prism_mcore.rl.update import updates_of

    wanted = settings(files, tmp_path, rl={"updates": 2, "drop_zero_spread": True, "kl_coefficient": 0.0})
    equal, unequal = (group_of(rollout([9], 1.0), rollout([8], reward)) for reward in (1.0, 0.0))
    run = SimpleNamespace(settings=wanted, groups=SimpleNamespace(tp_size=1, dp_size=1, dp_rank=0))
    ((batch,),) = updates_of(run, 1, [equal, unequal])
    assert batch.on_policy.all()
    _, (second,) = updates_of(run, 1, [unequal, unequal])
    assert not second.on_policy[second.loss_mask].any()


def overlapped(groups, settings):
    """The same run with gradients and parameters travelling while the model computes."""
    from prism_mcore.train import run as run_module

    plain = run_module.wrap
    run_module.wrap = lambda chunks, groups, **options: plain(chunks, groups, **(options | {"overlap": True}))
    try:
        return train(groups, settings)
    finally:
        run_module.wrap = plain


def test_generation_waits_for_overlapped_parameters(files, tmp_path):
    results = []
    for name, function in (("plain", train), ("overlapped", overlapped)):
        results.append(run_ranks(2, function, settings(files, tmp_path / name, train={"steps": 3})))
    assert untimed(tmp_path / "plain") == untimed(tmp_path / "overlapped")
    (_, want, _), (_, got, _) = results[0][0], results[1][0]
    assert all(torch.equal(want[name], got[name]) for name in want)


def faulty_reward(groups, settings, folder):
    """The choice reward hangs on one word and ends its process on another: the worker imports `folder`'s own."""
    os.environ["PYTHONPATH"] = str(folder)
    try:
        return train(groups, settings)
    finally:
        del os.environ["PYTHONPATH"]


def test_hanging_and_crashing_verifiers_cost_their_samples(files, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if 'prism_mcore.rewards.worker' in ' '.join(sys.orig_argv):\n"
        "    from prism_mcore.rewards import registry\n"
        "    good = registry.choice.choice\n"
        "    def choice(record, response):\n"
        "        if 'w1' in response: time.sleep(60)\n"
        "        if 'w2' in response: os._exit(9)\n"
        "        return good(record, response)\n"
        "    registry.REWARDS['choice'] = registry.Reward(choice, ('answer',))\n"
    )
    sections = {"rewards": {"require_think": False, "workers": 2, "timeout_s": 0.5}, "train": {"steps": 1}}
    run_ranks(2, faulty_reward, settings(files, tmp_path, **sections), tmp_path)
    (record,) = records(tmp_path)
    lost = record["verifier/timeout"] + record["verifier/crash"]
    assert record["verifier/timeout"] > 0 and record["verifier/crash"] > 0 and lost < 16
    lines = [json.loads(line) for line in rollouts(tmp_path, 1).splitlines()]
    masked = [line for line in lines if line["verifier"] != "ok"]
    assert len(masked) == lost and all(line["advantage"] == 0 and not line["rewards"] for line in masked)
    assert record["tokens"] == sum(line["tokens"] for line in lines if line["verifier"] == "ok")


def test_a_step_without_anything_to_learn_changes_nothing(files, tmp_path):
    sections = {
        "rl": {"drop_zero_spread": True, "kl_coefficient": 0.0},
        # no response has a <think>
        "rewards": {"require_think": True, "stop_token_penalty": 0.0, "repetition_penalty": 0.0},
        "train": {"steps": 2},
    }
    ((_, weights, _),) = run_ranks(1, train, settings(files, tmp_path, **sections))
    assert [(r["loss"], r["grad_norm"], r["tokens"], r["groups/no_spread"]) for r in records(tmp_path)] == [
        (None, None, 0, 1.0)
    ] * 2
    ((_, start, _),) = run_ranks(1, untouched, settings(files, tmp_path / "start", **sections))
    assert all(torch.equal(weights[name], start[name]) for name in start)


def moments(groups, settings):
    from prism_mcore.rl import loop

    with ExitStack() as opened:
        run = loop.build(
            settings, open_prompts(settings, resolve_spec(settings.model)), groups, torch.device("cpu"), opened
        )
        states = run.optimizer.chained_optimizers[0].optimizer.state.values()
        return sum(state["exp_avg"].numel() + state["exp_avg_sq"].numel() for state in states)


def test_the_optimizers_memory_is_taken_before_caches_take_half_of_what_is_free(files, tmp_path):
    """Of 24 billion parameters on eight GPUs of 80 GB, moments are 24 GB, and half of what was free without them 19."""
    wanted = settings(files, tmp_path)
    assert sum(run_ranks(2, moments, wanted)) >= 2 * num_parameters(resolve_spec(wanted.model))


def untouched(groups, settings):
    from prism_mcore.rl import loop

    prompts = open_prompts(settings, resolve_spec(settings.model))
    with ExitStack() as opened:
        run = loop.build(settings, prompts, groups, torch.device("cpu"), opened)
    return 0, {name: t.detach().clone() for chunk in run.chunks for name, t, _ in chunk.module.table()}, None


def poisoned(groups, settings):
    """One weight becomes NaN for the update of step 2, after its rollouts, on one rank."""
    from prism_mcore.rl import loop

    plain = loop.update_policy

    def with_poison(run, step, *rest):
        weight = run.chunks[0].module.final_norm.weight
        good = weight.data[0].clone()
        if step == 2 and groups.rank == 1:
            weight.data[0] = float("nan")
        try:
            return plain(run, step, *rest)
        finally:
            if step == 2 and groups.rank == 1:
                weight.data[0] = good

    loop.update_policy = with_poison
    try:
        return train(groups, settings)
    finally:
        loop.update_policy = plain


@pytest.mark.parametrize("parity", ["off", "exact"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_rollouts(files, tmp_path, parity):
    wanted = settings(files, tmp_path, rl={"parity": parity, "kl_coefficient": 0.0})
    with pytest.raises(RankError, match=r"step 2: the loss is nan. Suspects: rank 1: rollout \d+ of the step"):
        run_ranks(2, poisoned, wanted)
    assert len(rollouts(tmp_path, 2).splitlines()) == 16


def whole_process(groups, settings, replaced):
    """`loop.run` in ranks that go on to live; was their process group to be ended? The exit code, or the error."""
    from prism_mcore import platform
    from prism_mcore.parallel import destroy_groups
    from prism_mcore.rl import loop

    ended, originals = [], (platform.shutdown, loop.train)
    platform.shutdown = lambda: ended.append(True)
    loop.train = partial(replaced, loop.train)
    destroy_groups()
    try:
        return loop.run(settings, open_prompts(settings, resolve_spec(settings.model))), bool(ended)
    except RuntimeError as error:
        return str(error), bool(ended)
    finally:
        platform.shutdown, loop.train = originals


def failing(train, run):
    raise RuntimeError("out of memory")


def generating_nan(train, run):
    with torch.no_grad():
        run.chunks[0].module.final_norm.weight[0] = torch.nan
    return train(run)


def saved_then_stopped(train, run):
    """A guard stops the run while a save is still being written."""
    from prism_mcore.checkpoint.save import _Writer

    admits, write = run.guard.admits, _Writer.write

    def stopping(step, stats, batches):
        return admits(step, replace(stats, loss=math.nan) if step == 3 else stats, batches)

    run.guard.admits = stopping
    _Writer.write = lambda self: (time.sleep(1), write(self))
    try:
        return train(run)
    finally:
        _Writer.write = write


def test_how_a_run_ends_that_cannot_go_on(files, tmp_path):
    """After an error of one rank nothing is waited for; a guard's stop leaves the save before complete."""
    wanted = settings(files, tmp_path, checkpoint={"every": 2, "async_save": True})
    assert run_ranks(1, whole_process, wanted, failing) == [("out of memory", False)]
    assert run_ranks(1, whole_process, wanted, generating_nan) == [(STOPPED_BY_GUARD, True)]
    assert run_ranks(1, whole_process, wanted, saved_then_stopped) == [(STOPPED_BY_GUARD, True)]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000002"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"pp": 2}}, "parallel.pp=2, vpp=1: rollouts are generated on one stage"),
        ({"sampling": {"max_tokens": 24}}, "sampling.max_tokens=24 leaves no room for a prompt in rl.context=24"),
        ({"rl": {"context": 100}, "spec": "dense"}, "rl.context=100 is longer than the model's 64 positions"),
        ({"rl": {"updates": 3}}, "rl.prompts_per_step=4 cannot be dealt over rl.updates=3; try 3 or 6"),
        ({"rl": {"prompts": []}}, "rl.prompts is empty"),
        (
            {"precision": {"dtype": "bf16"}, "rl": {"kl_coefficient": 0.1}, "optimizer": {"masters": "remainder"}},
            "rl.kl_coefficient=0.1 and optimizer.masters=remainder: the reference is scored in the model's own",
        ),
        ({"sampling": {"samples": 1}}, "needs at least 2"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature=0 gives a group of equal rollouts"),
        ({"sampling": {"stop_ids": [3, 999]}}, "sampling.stop_ids holds 999; needed: ids from 0 to"),
        ({"guards": {"spike_threshold": 2.0}}, "guards.spike_threshold=2.0"),
        ({"rl": {"share_prompts": True, "parity": "exact"}}, "rl.share_prompts and rl.parity=exact: a scan that"),
        (
            {"precision": {"fp8": "tensorwise"}, "spec": "dense"},
            "with one scale for all tokens of a batch each changes",
        ),
        (
            {"precision": {"fp8": "blockwise"}, "rl": {"parity": "exact"}, "spec": "dense"},
            "rl.parity=exact and precision.fp8=blockwise: exact promises the bits of the model's own precision",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_starts(files, tmp_path, sections, message):
    wanted = settings(files, tmp_path, **sections)
    with pytest.raises(SettingsError) as error:
        check(wanted, resolve_spec(wanted.model), 2)
    assert message in str(error.value)


def signalled_while_generating(groups, settings, step, rank):
    """The signal comes to one rank in the middle of its replica's step; what was generated of it, and the exit code."""
    from prism_mcore.rl import loop

    with ExitStack() as opened:
        run = loop.build(
            settings, open_prompts(settings, resolve_spec(settings.model)), groups, torch.device("cpu"), opened
        )
        generate, check, passes = run.rollouts.generate, run.rollouts._before_pass, []

        def counted(prompts, sampling, **of_step):
            passes.clear()
            return generate(prompts, sampling, **of_step)

        def checked():
            passes.append(run.rollouts.passes)
            if len(passes) == 20 and len(run_steps) == step and groups.rank == rank:
                os.kill(os.getpid(), signal.SIGUSR1)
            check()

        run_steps, rolled = [], loop.training_rollouts

        def training_rollouts(run, number):
            run_steps.append(number)
            return rolled(run, number)

        run.rollouts.generate, run.rollouts._before_pass, loop.training_rollouts = (
            counted,
            checked,
            training_rollouts,
        )
        try:
            return loop.train(run), len(passes)
        finally:
            loop.training_rollouts = rolled


LONG = {
    "rl": {"context": 420, "prompts_per_step": 2, "kl_coefficient": 0.0},
    "sampling": {"samples": 2, "max_tokens": 400, "ignore_eos": True},
    "train": {"steps": 3},
}


@pytest.mark.parametrize("layout", [{}, {"tp": 2}], ids=["dp2", "tp2"])
def test_a_signal_in_a_long_generation_drops_the_step_and_saves_what_was_before(files, tmp_path, layout):
    sections = LONG | {"parallel": layout, "run": {"name": "run", "dir": str(tmp_path), "seed": 3}}
    wanted = settings(files, tmp_path, **sections)
    results = run_ranks(2, signalled_while_generating, wanted, 3, 1, **layout)
    assert {code for code, _ in results} == {STOPPED_BY_SIGNAL}
    assert results[1][1] <= 30 and all(passes < 200 for _, passes in results)  # of 400: both replicas left early
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000002"
    assert [r["step"] for r in records(tmp_path)] == [1, 2]
    assert not (tmp_path / "run" / "rollouts" / "step_00000003.jsonl").exists()


class NeverDone:
    """A verifier whose verdicts do not come."""

    def results(self, block, on_wait):
        while True:
            on_wait()


def signalled_while_verifying(groups, settings):
    from prism_mcore.rl import loop

    with ExitStack() as opened:
        prompts = open_prompts(settings, resolve_spec(settings.model))
        run = loop.build(settings, prompts, groups, torch.device("cpu"), opened)
        verified = run.rollouts._verified

        def signalled(*of_step):
            if groups.rank == 1:
                run.rollouts.verifier = NeverDone()
                os.kill(os.getpid(), signal.SIGTERM)
            return verified(*of_step)

        run.rollouts._verified = signalled
        return loop.train(run)


def test_a_signal_while_rewards_are_computed_is_not_kept_waiting(files, tmp_path):
    wanted = settings(files, tmp_path, rl={"held_out": []}, train={"steps": 2})
    assert run_ranks(2, signalled_while_verifying, wanted, timeout_s=60) == [STOPPED_BY_SIGNAL] * 2


def blocked(groups):
    """Rank 0 is signalled while it waits in a collective for rank 1, which asks whether anybody was."""
    import torch.distributed as dist

    from prism_mcore.train.signals import SharedSignals

    with SharedSignals() as signals:
        seen = []
        if groups.rank == 1:
            while not signals.anywhere:
                time.sleep(0.01)
            seen.append(True)
        else:
            killer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
            killer.start()
        dist.barrier()  # rank 0 is here all the time
        return seen


def test_a_rank_that_waits_in_a_collective_tells_the_others_of_its_signal():
    assert run_ranks(2, blocked, timeout_s=30) == [[], [True]]


def test_other_prompts_are_not_asked_silently(files, tmp_path):
    run_ranks(1, train, settings(files, tmp_path, train={"steps": 1}))
    lines = (files / "prompts.jsonl").read_text().splitlines()
    (other := tmp_path / "others.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    changed = {"rl": {"prompts": [{"path": str(other)}]}, "train": {"steps": 2}}
    with pytest.raises(
        RankError, match=r"rl.prompts\[0\] .*others.jsonl.*: .*prompts.jsonl held other content.*rl.on_change=cont"
    ):
        run_ranks(2, train, settings(files, tmp_path, **changed))
    held_out = {"rl": {"held_out": [{"path": str(other)}]}, "train": {"steps": 2}}
    with pytest.raises(RankError, match=r"trained on other data: rl.held_out is another"):
        run_ranks(2, train, settings(files, tmp_path, **held_out))
    changed["rl"]["on_change"] = "continue"
    run_ranks(2, train, settings(files, tmp_path, **changed))
    assert [r["step"] for r in records(tmp_path)] == [1, 2]
