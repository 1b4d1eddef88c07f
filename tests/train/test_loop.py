"""The whole loop on real ranks: exact resume, other layouts, signals, guards, killed ranks, full disks."""

import functools
import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import RankError, run_ranks
from tiny.models import CONFIGS, SPECS
from tiny.runs import assert_same_state, records, settings_of, state_of

from prism_mcore import platform
from prism_mcore.checkpoint.durable import write_manifest
from prism_mcore.checkpoint.index import read_index
from prism_mcore.checkpoint.optimizer_state import own_state
from prism_mcore.checkpoint.save import _Writer
from prism_mcore.data.token_file import TokenFileWriter
from prism_mcore.exit_codes import DONE, STOPPED_BY_GUARD, STOPPED_BY_SIGNAL
from prism_mcore.model.parameters import names_matching
from prism_mcore.model.rope import RopeSettings
from prism_mcore.model.settings import SOURCE
from prism_mcore.model.spec import read_spec
from prism_mcore.train import loop, optimizer
from prism_mcore.train import run as run_module
from prism_mcore.train.loop import train as train_loop
from prism_mcore.train.settings import MidtrainSettings

SOURCES = [("text", 0.7), ("code", 0.3)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two sources of documents that count upwards, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    for name, _ in SOURCES:
        lengths = random.integers(3, 30, 300)
        starts = random.integers(0, 61, 300)
        tokens = np.concatenate([(s + np.arange(n)) % 61 for s, n in zip(starts, lengths, strict=True)])
        with TokenFileWriter(folder / name, np.uint16) as writer:
            writer.add(tokens, lengths)
    return folder


def settings(corpus, runs, spec="hybrid", **sections):
    defaults = {
        "data": {
            "sources": [{"path": f"{corpus}/{n}", "weight": w, "domain": n} for n, w in SOURCES],
            "seq_len": 16,
            "document_mask": True,
            "validation_fraction": 0.1,
        },
        "train": {"steps": 6, "global_batch": 4, "micro_batch": 1, "validate_batches": 2},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
    }
    return settings_of(MidtrainSettings, runs, spec, defaults, sections)


def train(groups, settings, until=None):
    """Run the loop, stopping by a signal after `until` steps; exit code, and weights and moments of this rank."""
    run = loop.build(settings, groups, torch.device("cpu"))
    if until is not None:
        stop_after(run, until)
    return loop.train(run), *state_of(run)


def stop_after(run, steps):
    """A real SIGTERM to rank 0 while it fetches that step."""
    fetch = run.loader.steps

    def signalled(start):
        for step, batch in enumerate(fetch(start), start + 1):
            if step == steps and run.groups.rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    run.loader.steps = signalled


def curve(runs):
    return [(m["step"], m["loss"], m["grad_norm"], m["lr"], m["tokens"]) for m in records(runs)]


LAYOUTS = {
    "tp2+sp": (2, {"tp": 2, "sequence_parallel": True}),
    "dp2": (2, {}),
    "pp2": (2, {"pp": 2}),
    "cp2": (2, {"cp": 2}),
}


def assert_halves_equal_the_whole(corpus, tmp_path, function, world_size, spec="hybrid", **sections):
    """Three steps, a stop and three more leave the curve, weights and moments of six steps, bit for bit."""
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    results = []
    for runs, stops in ((through, [None]), (stopped, [3, None])):
        runs.mkdir()
        wanted = settings(corpus, runs, spec, **sections)
        for stop in stops:
            ranks = run_ranks(world_size, function, wanted, stop, **sections.get("parallel", {}))
            assert {code for code, _, _ in ranks} == {DONE if stop is None else STOPPED_BY_SIGNAL}
        results.append(ranks)
    assert curve(stopped) == curve(through) and len(curve(through)) == 6
    for (_, *want), (_, *got) in zip(*results, strict=True):
        assert_same_state(want, got)


FP8 = {"kernels": {"fp8_linear": "reference"}}


@pytest.mark.parametrize("fp8", ["tensorwise", "blockwise"])
def test_fp8_resumes_bit_for_bit_and_leaves_no_trace_in_a_checkpoint(corpus, tmp_path, fp8):
    precision = {"precision": {"dtype": "bf16", "fp8": fp8}, **FP8}
    assert_halves_equal_the_whole(corpus, tmp_path, train, 1, **precision)
    (tmp_path / "without").mkdir()
    run_ranks(1, train, settings(corpus, tmp_path / "without", precision={"dtype": "bf16"}), None)
    keys = [read_index(tmp_path / f"{runs}/run/checkpoints/step_00000006") for runs in ("through", "without")]
    assert keys[0].keys() == keys[1].keys()
    run_ranks(1, train, settings(corpus, tmp_path / "without", train={"steps": 7}, **precision), None)
    assert [r["step"] for r in records(tmp_path / "without")] == list(range(1, 8))  # goes on with or without
    losses = records(tmp_path / "through", "validation.jsonl")[-1]
    assert losses["validation/loss/text"] != losses["validation/loss_without_fp8/text"]
    assert losses["validation/loss/text"] == pytest.approx(losses["validation/loss_without_fp8/text"], rel=0.05)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_and_three_steps_equal_six_bit_for_bit(corpus, tmp_path, layout, dtype):
    world_size, degrees = LAYOUTS[layout]
    precision = {"dtype": dtype}
    assert_halves_equal_the_whole(corpus, tmp_path, train, world_size, parallel=degrees, precision=precision)


def many_buckets(groups, settings, until=None):
    """The same run with overlapped communication in small buckets: those of a large model on GPUs, each padded."""
    config = optimizer.DistributedDataParallelConfig
    optimizer.DistributedDataParallelConfig = functools.partial(config, bucket_size=3000)
    try:
        return overlapped(groups, settings, until)
    finally:
        optimizer.DistributedDataParallelConfig = config


def test_padded_buckets_are_saved_as_they_are(corpus, tmp_path):
    assert_halves_equal_the_whole(corpus, tmp_path, many_buckets, 2)


def test_a_tied_embedding_on_two_stages_is_saved_as_it_is(corpus, tmp_path):
    assert_halves_equal_the_whole(corpus, tmp_path, train, 4, "granite hybrid", parallel={"pp": 2})


def beside_transformer_engine(groups, settings, until=None):
    """The same run where megatron-core has found Transformer Engine, but torch's AdamW is used."""
    from megatron.core.optimizer import distrib_optimizer

    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    try:
        return train(groups, settings, until)
    finally:
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = False


def test_steps_of_torchs_adamw_are_saved_beside_transformer_engine(corpus, tmp_path):
    assert_halves_equal_the_whole(corpus, tmp_path, beside_transformer_engine, 2)


def test_an_interleaved_pipeline_updates_bf16_and_fp32_weights_as_a_plain_one(corpus, tmp_path):
    curves = []
    for name, degrees in (("plain", {"pp": 2}), ("interleaved", {"pp": 2, "vpp": 2})):
        (runs := tmp_path / name).mkdir()
        run_ranks(2, train, settings(corpus, runs, parallel=degrees, precision={"dtype": "bf16"}), **degrees)
        curves.append(curve(runs))
    assert curves[1] == [pytest.approx(step, rel=1e-3) for step in curves[0]]


def masters_after(groups, settings, until=None):
    """Weights, and every fp32 master and moment that this rank updates, however they are kept."""
    run = loop.build(settings, groups, torch.device("cpu"))
    if until is not None:
        stop_after(run, until)
    loop.train(run)
    owned = [[tensor.clone() for tensor in state.values()] for _, _, state in own_state(run.optimizer)]
    kept = {str(tensor.dtype) for state in kept_state(run) for tensor in state.values() if tensor.dim()}
    return [*state_of(run)[0].values(), *(tensor for each in owned for tensor in each)], kept


def kept_state(run):
    return run.optimizer.chained_optimizers[0].optimizer.state.values()


@pytest.mark.parametrize("layout", [None, "dp2", "tp2+sp"])
def test_masters_as_remainders_train_and_resume_as_fp32_masters_to_the_bit(corpus, tmp_path, layout):
    """Three steps with either, and three more with the other, from the same kind of checkpoint."""
    world_size, degrees = LAYOUTS.get(layout, (1, {}))
    results = []
    for name, halves in (("fp32", ["fp32"]), ("halved", ["remainder", "remainder"]), ("both", ["fp32", "remainder"])):
        (runs := tmp_path / name).mkdir()
        for number, masters in enumerate(halves, start=1):
            optimizer_settings = {"lr": 3e-3, "warmup_steps": 2, "masters": masters}
            wanted = settings(corpus, runs, parallel=degrees, precision={"dtype": "bf16"}, optimizer=optimizer_settings)
            stop = 3 if number < len(halves) else None
            ranks = run_ranks(world_size, masters_after, wanted, stop, **degrees)
        results.append((ranks, curve(runs), read_index(runs / "run/checkpoints/step_00000006")))
    (want, want_curve, want_index), *others = results
    for got, got_curve, got_index in others:
        assert got_curve == want_curve and got_index == want_index
        for (mine, kept), (theirs, _) in zip(got, want, strict=True):
            assert "torch.int16" in kept and len(mine) == len(theirs)
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("spec", ["hybrid", "granite hybrid"])
def test_a_run_resumes_in_another_layout(corpus, tmp_path, spec):
    through, moved = tmp_path / "through", tmp_path / "moved"
    for runs in (through, moved):
        runs.mkdir()
    run_ranks(2, train, settings(corpus, through, spec, parallel={"tp": 2}), None, tp=2)
    run_ranks(2, train, settings(corpus, moved, spec, parallel={"tp": 2}), 2, tp=2)
    run_ranks(2, train, settings(corpus, moved, spec, parallel={"pp": 2}), 4, pp=2)
    run_ranks(1, train, settings(corpus, moved, spec))
    for want, got in zip(curve(through), curve(moved), strict=True):
        assert got == pytest.approx(want, rel=1e-6 if want[0] <= 2 else 1e-5)
    assert [loss for _, loss, *_ in curve(moved)] == pytest.approx([loss for _, loss, *_ in curve(through)], rel=1e-6)


def test_context_parallel_ranks_go_on_as_one_and_as_four(corpus, tmp_path):
    through, moved = tmp_path / "through", tmp_path / "moved"
    for runs in (through, moved):
        runs.mkdir()
    longer = {"data": {"seq_len": 64}}  # of documents of up to 29 tokens: chunks of 32 and of 8, validation included
    run_ranks(1, train, settings(corpus, through, **longer))
    run_ranks(2, train, settings(corpus, moved, parallel={"cp": 2}, **longer), 2, cp=2)
    run_ranks(1, train, settings(corpus, moved, **longer), 4)
    run_ranks(4, train, settings(corpus, moved, parallel={"cp": 4}, **longer), cp=4)
    for want, got in zip(curve(through), curve(moved), strict=True):
        assert got == pytest.approx(want, rel=1e-6 if want[0] <= 2 else 1e-5)
    assert [loss for _, loss, *_ in curve(moved)] == pytest.approx([loss for _, loss, *_ in curve(through)], rel=1e-6)
    want, got = (records(runs, "validation.jsonl")[-1] for runs in (through, moved))
    assert got == pytest.approx(want, rel=1e-6)


def overlapped(groups, settings, until=None):
    """The same run with gradients and parameters travelling while the model computes."""
    plain = run_module.wrap
    run_module.wrap = lambda chunks, groups, **options: plain(chunks, groups, **(options | {"overlap": True}))
    try:
        return train(groups, settings, until)
    finally:
        run_module.wrap = plain


@pytest.mark.parametrize("ranks", [1, 2])
def test_overlapped_communication_changes_no_bit(corpus, tmp_path, ranks):
    results = []
    for name, function in (("plain", train), ("overlapped", overlapped)):
        runs = tmp_path / name
        runs.mkdir()
        wanted = settings(corpus, runs, checkpoint={"every": 2}, train={"steps": 6, "global_batch": 4})
        results.append(run_ranks(ranks, function, wanted))
    assert curve(tmp_path / "plain") == curve(tmp_path / "overlapped")
    (_, want, _), (_, got, _) = results[0][0], results[1][0]
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_the_record_of_a_run(corpus, tmp_path):
    wanted = settings(corpus, tmp_path, train={"steps": 30, "global_batch": 8, "validate_every": 10})
    run_ranks(2, train, wanted)
    written = records(tmp_path)
    assert [m["tokens"] for m in written] == [128 * step for step in range(1, 31)]
    assert {"loss/text", "loss/code", "time/step_s", "time/data_s", "throughput/tokens_per_s"} <= written[-1].keys()
    validations = [json.loads(v) for v in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [v["step"] for v in validations] == [0, 10, 20, 30]
    for domain, _ in SOURCES:
        losses = [v[f"validation/loss/{domain}"] for v in validations]
        assert losses[0] == pytest.approx(math.log(61), rel=0.2) and losses[-1] < 0.8 * losses[0]


def poisoned(groups, settings, steps):
    """One weight becomes NaN for the given steps, on one rank."""
    run = loop.build(settings, groups, torch.device("cpu"))
    fetch = run.loader.steps

    def steps_with_poison(start):
        weight = run.chunks[0].module.final_norm.weight
        for step, batch in enumerate(fetch(start), start + 1):
            good = weight.data[0].clone()
            if step in steps and groups.rank == 1:
                weight.data[0] = float("nan")
            yield batch
            weight.data[0] = good if step in steps and groups.rank == 1 else weight.data[0]

    run.loader.steps = steps_with_poison
    return loop.train(run)


def test_a_bad_step_is_skipped_within_the_budget_and_dumped(corpus, tmp_path):
    wanted = settings(corpus, tmp_path, guards={"skip_budget": 1})
    assert run_ranks(2, poisoned, wanted, [3]) == [DONE, DONE]
    assert [m["loss"] is None for m in records(tmp_path)] == [False, False, True, False, False, False]
    assert (tmp_path / "run" / "bad_steps" / "step_00000003" / "rank_1.safetensors").is_file()


def test_bad_steps_beyond_the_budget_stop_the_run_and_name_the_sample(corpus, tmp_path):
    wanted = settings(corpus, tmp_path, guards={"skip_budget": 1})
    with pytest.raises(RankError, match=r"step 4: the loss is nan.*rank 1: sample 1[0-9] of data.sources"):
        run_ranks(2, poisoned, wanted, [3, 4])


def test_a_run_of_another_model_or_batch_is_not_continued(corpus, tmp_path):
    run_ranks(1, train, settings(corpus, tmp_path), 2)
    with pytest.raises(RankError, match="is of another model"):
        run_ranks(1, train, settings(corpus, tmp_path, spec="dense"))
    with pytest.raises(RankError, match=r"train.global_batch=4, not 8; resume with 4"):
        run_ranks(1, train, settings(corpus, tmp_path, train={"steps": 6, "global_batch": 8}))
    with pytest.raises(RankError, match=r"data.validation_fraction=0.1, not 0.2"):
        run_ranks(1, train, settings(corpus, tmp_path, data={"validation_fraction": 0.2}))


def with_a_source_missing_on_rank_1(groups, settings):
    source = settings.data.sources[0].model_copy(update={"path": "/nowhere"})
    data = settings.data.model_copy(update={"sources": [source]})
    loop.build(
        settings.model_copy(update={"data": data}) if groups.rank == 1 else settings, groups, torch.device("cpu")
    )


def test_a_source_that_one_node_lacks_is_named_on_every_rank(corpus, tmp_path):
    with pytest.raises(RankError) as error:
        run_ranks(2, with_a_source_missing_on_rank_1, settings(corpus, tmp_path))
    for rank in range(2):
        assert "SettingsError: /nowhere.idx: no such file" in error.value.reports[rank]


def with_a_folder_of_its_own_on_rank_1(groups, settings):
    own = settings.run.model_copy(update={"dir": settings.run.dir + "/node1"})
    loop.build(settings.model_copy(update={"run": own}) if groups.rank == 1 else settings, groups, torch.device("cpu"))


def test_a_folder_that_nodes_do_not_share_is_refused_before_the_first_step(corpus, tmp_path):
    with pytest.raises(RankError) as error:
        run_ranks(2, with_a_folder_of_its_own_on_rank_1, settings(corpus, tmp_path))
    for rank in range(2):
        assert "SettingsError: run.dir: rank 1 does not see" in error.value.reports[rank]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def whole_process(groups, settings, replaced):
    """`loop.run` in ranks that go on to live; was their process group to be ended? The exit code, or the error."""
    from prism_mcore.parallel import destroy_groups

    ended, originals = [], (platform.shutdown, loop.train)
    platform.shutdown = lambda: ended.append(True)
    loop.train = replaced or loop.train
    destroy_groups()
    try:
        return loop.run(settings), bool(ended)
    except RuntimeError as error:
        return str(error), bool(ended)
    finally:
        platform.shutdown, loop.train = originals


def failing(run):
    raise RuntimeError("out of memory")


def test_an_error_of_one_rank_does_not_wait_for_collectives_to_end(corpus, tmp_path):
    assert run_ranks(1, whole_process, settings(corpus, tmp_path), failing) == [("out of memory", False)]
    assert run_ranks(1, whole_process, settings(corpus, tmp_path), None) == [(DONE, True)]


def saved_then_stopped(run):
    """A guard stops the run while a save is still being written."""
    admits = run.guard.admits

    def stopping(step, stats, batches):
        return admits(step, replace(stats, loss=math.nan) if step == 3 else stats, batches)

    run.guard.admits = stopping
    write = _Writer.write
    _Writer.write = lambda self: (time.sleep(1), write(self))
    try:
        return train_loop(run)
    finally:
        _Writer.write = write


def test_a_guard_that_stops_the_run_leaves_the_save_before_complete(corpus, tmp_path):
    wanted = settings(corpus, tmp_path, checkpoint={"every": 2, "async_save": True})
    assert run_ranks(1, whole_process, wanted, saved_then_stopped) == [(STOPPED_BY_GUARD, True)]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000002"


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(corpus, tmp_path):
    wanted = settings(corpus, tmp_path, checkpoint={"every": 2})
    run_ranks(2, train, wanted, 4)
    newest = tmp_path / "run" / "checkpoints" / "step_00000004"
    damaged = next(newest.glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    run_ranks(2, train, wanted)
    assert [m["step"] for m in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def killed(groups, settings):
    """Rank 1 is killed while it takes step 4, as by the kernel when memory is short."""
    run = loop.build(settings, groups, torch.device("cpu"))
    admits = run.guard.admits

    def last(step, *rest):
        if step == 4 and groups.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return admits(step, *rest)

    run.guard.admits = last
    return loop.train(run)


def test_a_killed_rank_ends_the_run_and_the_last_checkpoint_is_good(corpus, tmp_path):
    wanted = settings(corpus, tmp_path, checkpoint={"every": 2})
    with pytest.raises(RankError, match="killed by SIGKILL") as error:
        run_ranks(2, killed, wanted, timeout_s=60)
    assert set(error.value.reports) == {0, 1}  # the other rank noticed
    assert run_ranks(2, train, wanted)[0][0] == DONE
    assert [m["step"] for m in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def states_before_and_after(groups, settings):
    run = loop.build(settings, groups, torch.device("cpu"))
    before, _ = state_of(run)
    loop.train(run)
    return before, state_of(run)[0]


@pytest.mark.parametrize("degrees", [{}, {"pp": 2}, {"tp": 2}], ids=["dp2", "pp2", "tp2"])
def test_only_what_is_named_is_trained(corpus, tmp_path, degrees):
    """The rest stays as it is to the last bit, without weight decay; a tied embedding on two stages, too."""
    train = {"steps": 3, "only": ["attention", "layers.*.mixer.A_log"]}
    wanted = settings(corpus, tmp_path, "granite hybrid", train=train, parallel=degrees)
    moved, stayed = set(), set()
    for before, after in run_ranks(2, states_before_and_after, wanted, **degrees):
        for name, tensor in before.items():
            (stayed if torch.equal(tensor, after[name]) else moved).add(name)
    assert moved == names_matching(SPECS["granite hybrid"], train["only"]) and len(stayed) > len(moved)


def test_what_is_trained_does_not_change_in_the_middle(corpus, tmp_path):
    run_ranks(1, train, settings(corpus, tmp_path), 2)
    with pytest.raises(RankError, match=r"train.only"):
        run_ranks(1, train, settings(corpus, tmp_path, train={"steps": 6, "only": ["mlp"]}))


def test_what_a_run_keeps_for_exports_says_its_positions(corpus, tmp_path):
    rope = {"positions": 256, "scaling": "yarn", "original": 16}
    wanted = settings(corpus, tmp_path, "dense", train={"steps": 1})
    wanted = wanted.model_copy(update={"model": wanted.model.model_copy(update={"rope": RopeSettings(**rope)})})
    run_ranks(1, train, wanted)
    kept = read_spec(tmp_path / "run" / SOURCE)
    assert (kept.max_positions, kept.rope_scaling.factor) == (256, 16.0)


def test_starting_from_the_weights_of_another_run(corpus, tmp_path):
    run_ranks(2, train, settings(corpus, tmp_path, parallel={"tp": 2}), tp=2)
    model = {"spec": str(tmp_path / "hybrid.json"), "init": str(tmp_path / "run")}
    second = tmp_path / "second"
    second.mkdir()
    run_ranks(1, train, settings(corpus, second, model=model))
    first_losses, second_losses = ([m["loss"] for m in records(runs)] for runs in (tmp_path, second))
    assert second_losses[0] < first_losses[0] - 0.02


OTHERS = {
    "another family": (CONFIGS["dense"], "it has no "),
    "wider": (CONFIGS["hybrid"] | {"intermediate_size": 96}, r"up.weight is \[80, 48\] there, \[96, 48\] here"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_another_model_are_no_start(corpus, tmp_path, name):
    config, message = OTHERS[name]
    run_ranks(1, train, settings(corpus, tmp_path), 1)
    (other := tmp_path / "other.json").write_text(json.dumps(config))
    (second := tmp_path / "second").mkdir()
    wanted = settings(corpus, second, model={"spec": str(other), "init": str(tmp_path / "run")})
    with pytest.raises(RankError, match=f"SettingsError: model.init=.*of another model: .*{message}") as error:
        run_ranks(2, train, wanted, pp=2)
    assert set(error.value.reports) == {0, 1}


def below_a_file(folder):
    (folder / "taken").write_text("a file")
    return folder / "taken" / "runs"


UNUSABLE = {
    "below a file": (below_a_file, "Not a directory"),
    "a name too long": (lambda folder: folder / ("n" * 300), "File name too long"),
    "a file": (lambda folder: below_a_file(folder).parent, "Not a directory"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_folder_that_cannot_be_made_is_a_mistake_in_the_settings(corpus, tmp_path, kind):
    where, complaint = UNUSABLE[kind]
    wanted = settings(corpus, tmp_path, run={"name": "run", "dir": str(where(tmp_path))})
    with pytest.raises(
        RankError, match=f"SettingsError: run.dir: cannot write into .*{complaint}.*give run.dir"
    ) as error:
        run_ranks(2, train, wanted)
    assert set(error.value.reports) == {0, 1}


@pytest.fixture(scope="module")
def half_masked(tmp_path_factory):
    """Sixteen-token documents; the first half of the corpus and its end, which validation reads, have no label."""
    folder = tmp_path_factory.mktemp("half_masked")
    counts = np.repeat((np.arange(100) >= 50) & (np.arange(100) < 90), 16).astype(np.uint8)
    with TokenFileWriter(folder / "prompts", np.uint16, with_mask=True) as writer:
        writer.add(np.arange(1600) % 61, np.full(100, 16), counts)
    return {"sources": [{"path": str(folder / "prompts"), "domain": "text"}]}


@pytest.mark.parametrize("degrees", [{}, {"pp": 2}], ids=["dp2", "pp2"])
def test_a_step_without_a_label_that_counts_changes_nothing_and_is_not_charged(half_masked, tmp_path, degrees):
    sections = {"parallel": degrees, "train": {"steps": 12, "global_batch": 2 // degrees.get("pp", 1)}}
    wanted = settings(None, tmp_path, data=half_masked, **sections)
    assert {code for code, *_ in run_ranks(2, train, wanted, **degrees)} == {DONE}
    written = records(tmp_path)
    empty = [m["loss"] is None for m in written]
    assert any(empty) and not all(empty)
    assert all(
        (m["grad_norm"] is None) == nothing == ("loss/text" not in m) for m, nothing in zip(written, empty, strict=True)
    )
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000012" / "state.json").read_text())
    assert state["state"]["guard"]["skipped"] == 0 and len(state["state"]["guard"]["good_losses"]) == empty.count(False)
    assert not (tmp_path / "run" / "bad_steps").exists()
    (validation,) = [json.loads(v) for v in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()][-1:]
    assert validation["validation/loss/text"] is None


def rewritten(corpus, folder, name, seed):
    """A source's documents in another order: as long as before, tokenized with another seed."""
    from prism_mcore.data.token_file import TokenFile

    file = TokenFile(corpus / name)
    starts = file.document_starts(0, file.num_documents + 1)
    tokens = np.empty(file.num_tokens, file.dtype)
    file.read(0, tokens)
    documents = np.split(tokens, starts[1:-1])
    np.random.default_rng(seed).shuffle(documents)
    with TokenFileWriter(folder / name, file.dtype) as writer:
        writer.add(np.concatenate(documents), np.array([len(document) for document in documents]))
    return str(folder / name)


def sources(*listed):
    return {"data": {"sources": [{"path": str(path), "weight": weight, "domain": "all"} for path, weight in listed]}}


def test_other_data_is_not_read_silently(corpus, tmp_path):
    text, code = corpus / "text", corpus / "code"
    run_ranks(1, train, settings(corpus, tmp_path, **sources((text, 0.7), (code, 0.3))), 2)
    changes = {
        rf"data.sources\[0\] \({tmp_path}/text\): {text} held other content": [
            (rewritten(corpus, tmp_path, "text", 1), 0.7),
            (code, 0.3),
        ],
        r"data.sources\[0\] .*: it was .*text, which is in another place now": [(code, 0.3), (text, 0.7)],
        r"data.sources\[1\] \(.*code\): its share was 3/10, it is 1/2": [(text, 0.5), (code, 0.5)],
    }
    for message, changed in changes.items():
        with pytest.raises(
            RankError, match=rf"step_00000002 was trained on other data: .*{message}.*data.on_change=cont"
        ):
            run_ranks(2, train, settings(corpus, tmp_path, **sources(*changed)))
    (moved := tmp_path / "moved").mkdir()
    for file in corpus.iterdir():
        shutil.copy(file, moved)
    run_ranks(1, train, settings(corpus, tmp_path, **sources((moved / "text", 7), (moved / "code", 3))))
    assert [m["step"] for m in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def rows_read(groups, settings, until=None):
    """(source's path, first token's place) of every row that this rank reads, as the run goes."""
    run, seen = loop.build(settings, groups, torch.device("cpu")), []
    plan = run.loader._plan

    def noted(samples):
        source_ids, spans = plan(samples)
        starts = spans.start[np.searchsorted(spans.row, np.arange(len(samples)))]
        seen.extend(
            (int(n), run.loader.sources[s].name, int(p)) for n, s, p in zip(samples, source_ids, starts, strict=True)
        )
        return source_ids, spans

    run.loader._plan = noted
    if until:
        stop_after(run, until)
    loop.train(run)
    last = (until or settings.train.steps) * settings.train.global_batch
    return [(name, place) for sample, name, place in seen if sample < last]


def test_a_changed_mixture_reads_no_sample_twice(corpus, tmp_path):
    text, code = corpus / "text", corpus / "code"
    third = tmp_path / "third"
    with TokenFileWriter(third, np.uint16) as writer:
        writer.add(np.arange(3000) % 61, np.full(100, 30))
    steps = {"train": {"steps": 24, "global_batch": 8, "validate_batches": 1}}
    read = run_ranks(1, rows_read, settings(corpus, tmp_path, **steps, **sources((text, 0.7), (code, 0.3))), 8)[0]
    changed = sources((third, 0.5), (code, 0.25), (text, 0.25))
    changed["data"]["on_change"] = "continue"
    for until in (16, None):  # the second time nothing has changed any more
        read += run_ranks(1, rows_read, settings(corpus, tmp_path, **steps, **changed), until)[0]
    assert len(read) == 24 * 8
    assert len(set(read)) == len(read)
    assert {name: sum(n == name for n, _ in read[64:]) for name, _ in read} == {
        str(third): 64,
        str(code): 32,
        str(text): 32,
    }


def test_a_checkpoint_without_a_record_of_its_data_is_resumed(corpus, tmp_path):
    run_ranks(1, train, settings(corpus, tmp_path), 2)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    state = json.loads((checkpoint / "state.json").read_text())
    del state["state"]["data"]
    state["state"]["kept"] = state["state"].pop("fixed")
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, {})
    run_ranks(1, train, settings(corpus, tmp_path))
    assert [m["step"] for m in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_replicas_of_the_optimizer_count_the_gradient_once(corpus, tmp_path):
    curves = []
    for instances in (1, 2):
        (runs := tmp_path / str(instances)).mkdir()
        wanted = settings(
            corpus, runs, parallel={"optimizer_instances": instances}, train={"steps": 3, "global_batch": 4}
        )
        run_ranks(4, train, wanted, optimizer_instances=instances)
        curves.append(curve(runs))
    assert curves[1] == [pytest.approx(step, rel=1e-6) for step in curves[0]]
