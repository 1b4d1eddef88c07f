"""What both loops are made of: a changed schedule is named, a folder is one run's alone."""

import gc
import os
import weakref
from dataclasses import replace

import pytest
from ranks import RankError, run_ranks

from prism_mcore.checkpoint.lock import exclusive
from prism_mcore.config import dump
from prism_mcore.model.spec import read_spec
from prism_mcore.train.settings import MidtrainSettings


def scheduled(steps, **optimizer):
    return MidtrainSettings(train={"steps": steps}, optimizer={"lr": 1e-3, "min_lr_ratio": 0.1, **optimizer})


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (scheduled(100), scheduled(100), ""),
        (scheduled(100), scheduled(400), "train.steps=400 (100 before)"),
        (scheduled(200), scheduled(200, lr=2e-3), "optimizer.lr=0.002 (0.001 before)"),
        (scheduled(200, schedule="constant"), scheduled(400, schedule="constant"), ""),  # lr is the same
        (scheduled(100), scheduled(100, clip_grad=2.0), ""),
    ],
)
def test_a_schedule_that_moves_the_learning_rate_is_named(before, now, said):
    from prism_mcore.train.run import lr_change

    note = lr_change(100 if now.train.steps > 100 else 50, dump(before), now)
    assert note.endswith(said) and bool(note) == bool(said)


def test_the_note_says_what_lr_was_and_is():
    from prism_mcore.train.run import lr_change

    note = lr_change(100, dump(scheduled(100, schedule="linear")), scheduled(400, schedule="linear"))
    assert note.startswith(
        "note: lr was 0.0001 at step 100 and is 0.0007728 at step 101, where it would have been 0.0001:"
    )


def test_settings_of_another_version_are_no_error():
    from prism_mcore.train.run import lr_change

    assert lr_change(5, "optimizer: {lr: 1.0, of_old: 3}", scheduled(10)) == lr_change(5, "", scheduled(10)) == ""


def test_a_spec_that_an_earlier_version_recorded_is_the_same_model():
    from prism_mcore.train.run import is_record_of, spec_record

    spec = read_spec("llama-3.1-8b")
    earlier = {name: value for name, value in spec_record(spec).items() if name not in ("qkv_bias", "qk_norm")}
    assert is_record_of(earlier, spec) and is_record_of(spec_record(spec), spec)
    assert not is_record_of(earlier, replace(spec, qkv_bias=True))
    assert not is_record_of(earlier | {"num_heads": "16"}, spec)


def hold(groups, settings):
    from contextlib import ExitStack

    from prism_mcore.train.run import hold_folder

    with ExitStack() as opened:
        hold_folder(settings, groups, opened)


def test_a_folder_that_another_run_is_in_is_refused_on_every_rank(tmp_path, monkeypatch):
    wanted = MidtrainSettings(run={"dir": str(tmp_path), "name": "run"})
    (tmp_path / "run").mkdir()
    with (
        exclusive(tmp_path / "run" / "run.lock"),
        pytest.raises(
            RankError, match=rf"SettingsError: .*run is in use by process {os.getpid()} on .* since 20"
        ) as error,
    ):
        run_ranks(2, hold, wanted)
    assert set(error.value.reports) == {0, 1}
    run_ranks(2, hold, wanted)


def test_a_folder_that_cannot_be_made_is_refused_on_every_rank(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(
        RankError, match=r"SettingsError: run.dir: cannot write into .*taken/run .Not a directory"
    ) as error:
        run_ranks(2, hold, MidtrainSettings(run={"dir": str(tmp_path / "taken"), "name": "run"}))
    assert set(error.value.reports) == {0, 1}


class Cycle:
    def __init__(self):
        self.itself = self


def test_garbage_is_collected_between_steps_and_nowhere_else():
    from prism_mcore.train.run import COLLECT_EVERY, collection_between_steps

    alive = []
    with pytest.raises(KeyError), collection_between_steps() as collect:
        collect()
        frozen = gc.get_freeze_count()
        cycle = weakref.ref(Cycle())
        for _ in range(2, COLLECT_EVERY + 1):
            [[] for _ in range(10_000)]  # would start a collection
            alive.append(cycle() is not None)
            collect()
        raise KeyError
    assert all(alive) and cycle() is None
    assert frozen > 0 and gc.get_freeze_count() == 0 and gc.isenabled()
