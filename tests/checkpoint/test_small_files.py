"""Damage of the small files of a run: told by name, and the newest checkpoint that is whole is taken."""

import json
import logging
import shutil

import pytest
import torch
from ranks import run_ranks
from tiny.hf_models import save_hf

from prism_mcore.checkpoint.durable import damage, read_manifest, write_manifest
from prism_mcore.checkpoint.folder import CheckpointError, checkpoint_in, latest, read_state
from prism_mcore.convert.offline import import_hf, plan_export, plan_import

NO_TEXT = b"\xff\xfe\x00\x81step_00000002"
NO_OBJECTS = {
    "no text": NO_TEXT,
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "too deep": b"[" * 100_000,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run's folder of two checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    save_hf("llama-3.1", folder / "hf", dtype=torch.bfloat16)
    import_hf(plan_import(folder / "hf"), folder / "run")
    for step in (1, 2):
        shutil.copytree(folder / "run" / "step_00000000", folder / "run" / f"step_{step:08d}")
    (folder / "run" / "latest").write_text("step_00000002")
    return folder / "run"


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.mark.parametrize(
    "content", [NO_TEXT, b"", b"step_00000009", b"../elsewhere", b"step_00000002\x00", b"x" * 10_000, b"step_0000000"]
)
def test_a_latest_that_names_nothing_is_warned_of_and_the_newest_taken(run, caplog, content):
    (run / "latest").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert latest(run) == run / "step_00000002"
    assert str(run / "latest") in caplog.text and len(caplog.text) < 1000
    assert checkpoint_in(run) == run / "step_00000002"


def test_a_latest_that_cannot_be_read_is_warned_of(run, caplog):
    (run / "latest").unlink()
    (run / "latest").mkdir()
    assert latest(run) == run / "step_00000002"
    assert "latest cannot be read" in caplog.text


def test_a_latest_that_names_an_older_one_is_followed_and_a_missing_one_is_nothing_to_say(run, caplog):
    (run / "latest").write_text("step_00000001\n")
    assert latest(run) == run / "step_00000001"
    (run / "latest").unlink()
    assert latest(run) == run / "step_00000002"
    assert not caplog.text


def newest(groups, folder):
    from prism_mcore.checkpoint.folder import newest_undamaged

    return newest_undamaged(folder).name


@pytest.mark.parametrize("content", NO_OBJECTS)
def test_a_manifest_that_is_none_is_damage_and_the_checkpoint_before_is_taken(run, content):
    (run / "step_00000002" / "manifest.json").write_bytes(NO_OBJECTS[content])
    (run / "latest").write_bytes(NO_TEXT)
    (problem,) = damage(run / "step_00000002")
    assert problem.startswith(f"{run}/step_00000002/manifest.json cannot be read")
    assert run_ranks(2, newest, run) == ["step_00000001"] * 2


@pytest.mark.parametrize(
    "files", [None, [], {"a": None}, {"a": {}}, {"a": {"size": 1}}, {"../a": {"size": 1, "sha256": ""}}]
)
def test_a_manifest_of_other_records_is_damage(run, files):
    manifest = run / "step_00000002" / "manifest.json"
    manifest.write_text(json.dumps({"version": 1, "files": files}))
    assert str(manifest) in damage(run / "step_00000002")[-1]
    manifest.write_text(json.dumps({"version": [], "files": files}))
    assert "has version []" in damage(run / "step_00000002")[0]


@pytest.mark.parametrize("content", NO_OBJECTS)
@pytest.mark.parametrize("name", ["state.json", "tensors.json"])
def test_a_small_file_that_is_none_is_one_message(run, tmp_path, name, content):
    """Though its manifest fits: written by another program."""
    step = run / "step_00000002"
    (step / name).write_bytes(NO_OBJECTS[content])
    write_manifest(step, {})
    assert damage(step) == []
    (message,) = run_ranks(1, load_imported, step, run.parent)
    assert str(step / name) in message
    if name == "state.json":
        with pytest.raises(ValueError, match=r"state\.json cannot be read"):
            plan_export(run)


def load_imported(groups, step, folder):
    from prism_mcore.checkpoint.load import load_weights
    from prism_mcore.model.build import build_chunks
    from prism_mcore.model.ops import Ops
    from prism_mcore.model.spec import read_spec
    from prism_mcore.model.split import split_layers

    spec, cpu = read_spec(folder / "run" / "source"), torch.device("cpu")
    split = split_layers(spec, 1, 1, seq_len=16)
    chunks = build_chunks(spec, split, groups, Ops({}, cpu), dtype=torch.bfloat16, device=cpu)
    try:
        return load_weights(step, chunks, groups)
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize(
    ("key", "value"), [("step", "2"), ("step", True), ("layout", []), ("optimizer_step", None), ("state", [1])]
)
def test_a_state_of_other_types_is_refused(run, key, value):
    state = run / "step_00000002" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=rf"{state} is damaged: its {key} is"):
        read_state(run / "step_00000002")


LAYOUTS = {
    **NO_OBJECTS,
    "no version": b'{"headers": {}}',
    "no headers": b'{"version": 1}',
    "headers of numbers": b'{"version": 1, "headers": {"model.safetensors": 3}}',
    "a list of headers": b'{"version": 1, "headers": ["a"]}',
    "another folder": b'{"version": 1, "headers": {"../model.safetensors": "{}"}}',
    "no header": b'{"version": 1, "headers": {"model.safetensors": "{"}}',
}


@pytest.mark.parametrize("content", LAYOUTS)
def test_a_kept_layout_that_is_none_is_one_message(run, content):
    (run / "source" / "layout.json").write_bytes(LAYOUTS[content])
    with pytest.raises(ValueError, match=r"source/(layout.json|model.safetensors)"):
        plan_export(run)


def test_the_manifest_that_is_whole_is_read(run):
    assert "state.json" in read_manifest(run / "step_00000002")["files"]
