"""log.wandb and log.trackio: the records of a run as their own packages keep them; refused where they are not there."""

import importlib.util
import json

import pytest
from tiny.runs import settings_of

from prism_mcore.config import SettingsError
from prism_mcore.model.settings import resolve_spec
from prism_mcore.train import sinks
from prism_mcore.train.checks import check
from prism_mcore.train.metrics import STEPS_FILE, Records
from prism_mcore.train.settings import MidtrainSettings

SECTIONS = {"data": {"sources": [{"path": "corpus"}], "seq_len": 16}, "train": {"steps": 4}}


def settings(folder, **log):
    return settings_of(MidtrainSettings, folder, "dense", SECTIONS, {"log": {"tensorboard": False, **log}})


@pytest.mark.parametrize("name", sinks.SINKS)
def test_a_package_that_is_not_there_is_refused_by_name(name, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted, *rest: None if wanted == name else find(wanted, *rest)
    )
    wanted = settings(tmp_path, **{name: "project"})
    with pytest.raises(SettingsError, match=rf"log\.{name}=project: {name} is not installed; pip install {name}"):
        check(wanted, resolve_spec(wanted.model), 1)


def test_nothing_is_opened_that_was_not_asked_for(tmp_path):
    assert sinks.open_sinks(settings(tmp_path)) == [] and sinks.missing(settings(tmp_path).log) == []


def test_wandb_gets_the_records_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    wanted = settings(tmp_path, wandb="project")
    for start, steps in ((0, (1, 2)), (2, (3,))):
        records = Records(wanted, [STEPS_FILE], start, rank=0)
        (run,) = records._sinks
        for step in steps:
            records.write(STEPS_FILE, {"step": step, "loss": 1.0 / step, "grad_norm": float("nan")})
        assert (run.name, run.id, run.config["train"]["steps"]) == ("run", "run", 4)
        records.close()
    written = [path.read_bytes() for path in wanted.run_dir.glob("wandb/offline-run-*/run-*.wandb")]
    assert len(written) == 2 and all(b"loss" in content for content in written)
    assert {b"0.5" in content for content in written} == {True, False}
    assert {str(1 / 3).encode() in content for content in written} == {True, False}
    assert [json.loads(line)["step"] for line in (wanted.run_dir / STEPS_FILE).read_text().splitlines()] == [1, 2, 3]


def test_trackio_gets_the_records(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed")
    records = Records(settings(tmp_path, trackio="project"), [STEPS_FILE], 0, rank=0)
    records.write(STEPS_FILE, {"step": 1, "loss": 0.5})
    records.close()
    from trackio.sqlite_storage import SQLiteStorage

    (logged,) = SQLiteStorage.get_logs("project", "run")
    assert (logged["loss"], logged["step"]) == (0.5, 1)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"checkpoint": {"keep_best": "loss"}}, "checkpoint.keep_best=loss: needed: min: or max: and a key"),
        ({"checkpoint": {"keep_best": "min:validation/loss/x"}}, "needs validations; set train.validate_every"),
    ],
)
def test_a_best_that_nothing_measures_is_refused(sections, message, tmp_path):
    wanted = settings_of(MidtrainSettings, tmp_path, "dense", SECTIONS, {**sections, "log": {"tensorboard": False}})
    with pytest.raises(SettingsError) as error:
        check(wanted, resolve_spec(wanted.model), 1)
    assert message in str(error.value)
