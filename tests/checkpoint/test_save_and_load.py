"""Checkpoints: exact resume, any layout, damage noticed, failures on one rank told to all."""

import json
import os
import resource
import shutil
import signal
import time
from contextlib import contextmanager, nullcontext

import pytest
import torch
from ranks import RankError, run_ranks

from prism_mcore.checkpoint.durable import damage
from prism_mcore.checkpoint.folder import best_of
from prism_mcore.train.settings import CheckpointSettings

STEPS = 3


def open_toy(groups, folder, bf16=False, **settings):
    from tiny.toy import Toy

    from prism_mcore.checkpoint.save import Checkpoints

    toy = Toy(groups, bf16=bf16)
    return toy, Checkpoints(folder, CheckpointSettings(**settings), groups)


def train_and_save(groups, folder, bf16=False, async_save=False, steps=STEPS):
    """`steps` steps, a checkpoint, `steps` more; losses and gradient norms of the later ones, and the last weights."""
    toy, checkpoints = open_toy(groups, folder, bf16, async_save=async_save)
    for step in range(steps):
        toy.step(step)
    with writing_is_slow() if async_save else nullcontext():
        checkpoints.save(steps, toy.chunks, toy.optimizer, {"cursor": 17, "lr": 0.05})
        draws = random_numbers()
        log = []
        for step in range(steps, 2 * steps):
            log.append(toy.step(step))
            checkpoints.poll()
        assert not async_save or latest_step(folder) is None
        checkpoints.wait()
    assert latest_step(folder) == f"step_{steps:08d}"
    return log, draws, toy.full()


@contextmanager
def writing_is_slow():
    """Long enough for the steps after the save to change the weights before they are written."""
    from prism_mcore.checkpoint.save import _Writer

    write = _Writer.write
    _Writer.write = lambda self: (time.sleep(1), write(self))
    try:
        yield
    finally:
        _Writer.write = write


def latest_step(folder):
    return (folder / "latest").read_text() if (folder / "latest").exists() else None


def load_newest(groups, toy, folder):
    from prism_mcore.checkpoint.folder import newest_undamaged
    from prism_mcore.checkpoint.load import load

    path = newest_undamaged(folder)
    return None if path is None else load(path, toy.chunks, toy.optimizer, groups)


def resume(groups, folder, bf16=False, steps=STEPS):
    toy, _ = open_toy(groups, folder, bf16)
    toy.step(99)  # away from the initial state in every respect
    random_numbers()
    loaded = load_newest(groups, toy, folder)
    assert (loaded.step, loaded.state) == (steps, {"cursor": 17, "lr": 0.05})
    draws = random_numbers()
    return [toy.step(step) for step in range(steps, 2 * steps)], draws, toy.full()


def random_numbers():
    import random

    import numpy
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return [
        random.gauss(0, 1),
        random.random(),
        numpy.random.randn(),
        numpy.random.rand(),
        torch.rand(1).item(),
        tracked,
    ]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(1, {}), (2, {"tp": 2}), (2, {}), (2, {"pp": 2, "vpp": 2}), (4, {"optimizer_instances": 2})],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_n_and_n_steps_are_2n_steps_bit_for_bit(tmp_path, world_size, layout, bf16):
    straight = run_ranks(world_size, train_and_save, tmp_path, bf16, **layout)
    resumed = run_ranks(world_size, resume, tmp_path, bf16, **layout)
    for (log, draws, weights), (log_2, draws_2, weights_2) in zip(straight, resumed, strict=True):
        assert log == log_2
        assert draws == draws_2
        assert equal(weights, weights_2)


@pytest.mark.parametrize(
    ("world_size", "layout"), [(1, {}), (2, {"pp": 2}), (2, {}), (4, {"tp": 2, "pp": 2}), (2, {"pp": 2, "vpp": 2})]
)
def test_tp2_resumes_in_another_layout(tmp_path_factory, world_size, layout):
    folder = tmp_path_factory.getbasetemp() / "saved_by_tp2"
    if not folder.exists():
        run_ranks(2, train_and_save, folder, tp=2)
    _, _, expected = run_ranks(2, resume, folder, tp=2)[0]
    for _, _, weights in run_ranks(world_size, resume, folder, **layout):
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


def test_an_asynchronous_save_holds_the_weights_of_its_step(tmp_path):
    straight = run_ranks(2, train_and_save, tmp_path, True, True, tp=2)  # bf16: masters do not mend wrong weights
    resumed = run_ranks(2, resume, tmp_path, True, tp=2)
    assert [log for log, _, _ in straight] == [log for log, _, _ in resumed]


def save_steps(groups, folder, steps, keep=3, keep_best=""):
    toy, checkpoints = open_toy(groups, folder, keep=keep, keep_best=keep_best)
    for step in steps:
        toy.step(step)
        checkpoints.save(step, toy.chunks, toy.optimizer, {"loss_so_far": step})
    return toy.full()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_latest_names_the_last(tmp_path):
    run_ranks(1, save_steps, tmp_path, [1, 2, 3, 4], 2)
    assert names(tmp_path) == ["latest", "step_00000003", "step_00000004"]
    assert (tmp_path / "latest").read_text() == "step_00000004"
    run_ranks(1, save_steps, tmp_path, [2], 0)  # back to an earlier step: replaced, nothing else removed
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000003", "step_00000004"]
    assert (tmp_path / "latest").read_text() == "step_00000002"


def load_step(groups, folder):
    toy, _ = open_toy(groups, folder)
    loaded = load_newest(groups, toy, folder)
    return (loaded.step, toy.full()) if loaded else None


def test_a_run_without_a_checkpoint_has_none_to_load(tmp_path):
    assert run_ranks(1, load_step, tmp_path) == [None]


def load_on_another_device(groups, folder):
    """The states of its generators have another size."""
    from prism_mcore.checkpoint import random_state

    plain = random_state.get_random_state
    random_state.get_random_state = lambda: {name: state[:16] for name, state in plain().items()}
    try:
        return load_step(groups, folder)[0]
    finally:
        random_state.get_random_state = plain


def test_generators_of_another_device_start_anew(tmp_path):
    run_ranks(1, save_steps, tmp_path, [1])
    assert run_ranks(1, load_on_another_device, tmp_path) == [1]


def change_one_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "byte": ("__0_0.safetensors", change_one_byte, "SHA-256"),
    "truncated": ("__1_0.safetensors", truncate, "bytes, the manifest says"),
    "missing": ("tensors.json", os.unlink, "is missing"),
    "state": ("state.json", change_one_byte, "SHA-256"),
    "manifest": ("manifest.json", truncate, "cannot be read"),
    "added": ("more.safetensors", lambda path: path.write_bytes(b"x"), "not in the manifest"),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_ranks(2, save_steps, folder, [1, 2], tp=2)
    return folder


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_loaded(two_checkpoints, tmp_path, kind):
    name, harm, complaint = DAMAGE[kind]
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    newest = folder / "step_00000002"
    assert damage(newest) == []
    harm(newest / name)
    (problem,) = damage(newest)
    assert str(newest / name) in problem
    assert complaint in problem
    assert [step for step, _ in run_ranks(2, load_step, folder, tp=2)] == [1, 1]


def test_a_file_of_another_node_is_in_the_manifest_though_not_listed_yet(tmp_path):
    from prism_mcore.checkpoint.durable import describe, write_manifest

    ours, theirs = tmp_path / "__0_0.safetensors", tmp_path / "__9_0.safetensors"
    ours.write_bytes(b"ours")
    theirs.write_bytes(b"theirs")
    known = {path.name: describe(path) for path in (ours, theirs)}
    content = theirs.read_bytes()
    theirs.unlink()
    write_manifest(tmp_path, known)
    theirs.write_bytes(content)
    assert damage(tmp_path) == []


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    for step in folder.glob("step_*"):
        truncate(step / "__0_0.safetensors")
    with pytest.raises(RankError, match=r"every checkpoint in .*run is damaged") as error:
        run_ranks(2, load_step, folder, tp=2)
    assert set(error.value.reports) == {0, 1}


def reseal(checkpoint):
    """Give a changed checkpoint a manifest that fits it, as an attacker would."""
    from prism_mcore.checkpoint.durable import write_manifest

    write_manifest(checkpoint, {})


def test_an_unknown_format_version_is_refused(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    state = folder / "step_00000002" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format_version": 3}))
    reseal(folder / "step_00000002")
    with pytest.raises(RankError, match="step_00000002 has format version 3; this program reads versions 1 and 2"):
        run_ranks(2, load_step, folder, tp=2)


def index_names(groups, path):
    from prism_mcore.checkpoint.index import read_index

    return sorted(read_index(path))


def test_tensors_go_by_global_names(two_checkpoints):
    (found,) = run_ranks(1, index_names, two_checkpoints / "step_00000002")
    assert "layers.3.up.weight" in found
    assert "optimizer.state.exp_avg_sq.layers.3.up.weight" in found
    assert {name for name in found if name.startswith("random.1.")} >= {"random.1.torch", "random.1.python"}


def limit_file_size(groups, folder, full_rank):
    """Rank `full_rank` cannot write more than 2000 bytes into a file, as on a full disk."""
    toy, checkpoints = open_toy(groups, folder)
    if groups.rank == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        checkpoints.save(2, toy.chunks, toy.optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_full_disk_on_one_rank_is_told_on_all_and_leaves_the_previous_checkpoint(tmp_path, full_rank):
    run_ranks(2, save_steps, tmp_path, [1], tp=2)
    with pytest.raises(RankError) as error:
        run_ranks(2, limit_file_size, tmp_path, full_rank, tp=2)
    for rank in range(2):
        assert f"cannot write {tmp_path}/step_00000002 (rank {full_rank}: OSError" in error.value.reports[rank]
        assert "File too large" in error.value.reports[rank]
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert [step for step, _ in run_ranks(2, load_step, tmp_path, tp=2)] == [1, 1]


def hang_in_save(groups, folder):
    from prism_mcore.checkpoint import save

    toy, checkpoints = open_toy(groups, folder, save_deadline_s=2.0)
    if groups.rank == 1:
        save._Writer.write = lambda self: time.sleep(600)
    checkpoints.save(2, toy.chunks, toy.optimizer, {})


def test_a_save_that_hangs_ends_the_run(tmp_path):
    run_ranks(2, save_steps, tmp_path, [1])
    with pytest.raises(RankError) as error:
        run_ranks(2, hang_in_save, tmp_path)
    assert any("step_00000002 was not done after 2 s" in report for report in error.value.reports.values())
    assert all("exit code 1" in report or "Connection" in report for report in error.value.reports.values())
    assert [step for step, _ in run_ranks(2, load_step, tmp_path)] == [1, 1]


def die_in_save(groups, folder):
    from prism_mcore.checkpoint import save

    toy, checkpoints = open_toy(groups, folder)
    if groups.rank == 1:
        save._Writer.write = lambda self: os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.save(2, toy.chunks, toy.optimizer, {})


def test_a_rank_killed_in_a_save_leaves_nothing_that_looks_whole(tmp_path):
    run_ranks(2, save_steps, tmp_path, [1])
    with pytest.raises(RankError):
        run_ranks(2, die_in_save, tmp_path)
    assert not (tmp_path / "step_00000002").exists()
    assert [step for step, _ in run_ranks(2, load_step, tmp_path)] == [1, 1]


def start_from_weights(groups, path):
    from prism_mcore.checkpoint.load import load_weights

    toy, _ = open_toy(groups, path.parent)
    load_weights(path, toy.chunks, groups)
    return toy.full()


def test_weights_alone_start_a_new_run(two_checkpoints, tmp_path):
    _, saved = run_ranks(2, load_step, two_checkpoints, tp=2)[0]
    (weights,) = run_ranks(1, start_from_weights, two_checkpoints / "step_00000002")
    assert equal(weights, saved)
    broken = shutil.copytree(two_checkpoints / "step_00000002", tmp_path / "step_00000002")
    truncate(broken / "__0_0.safetensors")
    with pytest.raises(RankError, match=r"cannot start from .*__0_0.safetensors has"):
        run_ranks(1, start_from_weights, broken)


def test_the_best_by_a_validation_is_kept_beside_the_newest(tmp_path):
    values = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5}
    lines = [json.dumps({"step": step, "validation/loss/math": value}) for step, value in values.items()]
    (tmp_path / "validation.jsonl").write_text("\n".join(lines) + "\n")
    folder = tmp_path / "checkpoints"
    run_ranks(1, save_steps, folder, [1, 2, 3, 4, 5], 2, "min:validation/loss/math")
    assert names(folder) == ["best", "latest", "step_00000002", "step_00000004", "step_00000005"]
    assert (folder / "best").read_text() == "step_00000002" and (folder / "latest").read_text() == "step_00000005"
    run_ranks(1, save_steps, tmp_path / "most" / "checkpoints", [1, 2], 1, "max:validation/loss/math")
    assert names(tmp_path / "most" / "checkpoints") == ["latest", "step_00000002"]  # no validation, no best
    steps = [folder / f"step_0000000{step}" for step in (2, 4, 5)]
    assert best_of(steps, tmp_path / "validation.jsonl", "max:validation/loss/math") == steps[2]
    (tmp_path / "validation.jsonl").write_text("{")
    assert best_of(steps, tmp_path / "validation.jsonl", "max:validation/loss/math") is None
