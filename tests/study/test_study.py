"""A tiny study as a user runs it: skipped where it is done, resumed where it was killed, one node again where an output
is lost, and one message for what cannot work."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from tiny.studies import write_study

from prism_mcore.exit_codes import BAD_SETTINGS, DONE, FAILED

ROOT = Path(__file__).parents[2]


def command(recipe: Path, *words: str) -> list[str]:
    return [sys.executable, "launch/study.py", "--recipe", str(recipe), *words]


def study(recipe: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(recipe, *words), cwd=ROOT, capture_output=True, text=True, check=False)


def numbers(recipe: Path) -> dict:
    return json.loads((recipe.parent / "studies/tiny/nodes/report/out/report.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that ran from start to end."""
    recipe = write_study(tmp_path_factory.mktemp("study"))
    done = study(recipe)
    assert done.returncode == DONE, done.stdout + done.stderr
    return recipe


def test_it_leaves_every_number_in_the_report(finished):
    found = numbers(finished)
    assert set(found["scores"]["quiz of m.hybrid.s0"]) == {"held-out"}
    first, last = found["rewards"]["m-rl.hybrid.s0"]["validation/reward/mean"]
    assert isinstance(first, float) and isinstance(last, float)
    (losses,) = found["losses"].values()
    assert len(losses) == 1 and all(0 < value < 100 for pair in losses.values() for value in pair)


def test_what_is_done_is_skipped_and_a_lost_output_redoes_its_node_alone(finished):
    nodes = finished.parent / "studies/tiny/nodes"
    before = numbers(finished)
    (nodes / "quiz.m.hybrid.s0/out/results.json").unlink()
    why = study(finished, "why", "quiz.m.hybrid.s0")
    assert "results.json is lost" in why.stdout
    assert "1 to do again" in study(finished, "status").stdout
    done = study(finished)
    assert done.returncode == DONE, done.stderr
    # the report reads the same result again: it has nothing to do either
    assert [line for line in done.stdout.splitlines() if ": done" in line] == [
        line for line in done.stdout.splitlines() if "quiz" in line
    ]
    assert done.stdout.count("was done") == 3 and numbers(finished) == before


def test_a_changed_recipe_is_a_reason_for_its_node_and_those_behind_it(finished):
    overrides = ["rl_mixes.math.settings=[sampling.temperature=0.5]"]
    assert "recipe or command has changed" in study(finished, "why", "m-rl.hybrid.s0", *overrides).stdout
    assert "it is done" in study(finished, "why", "m.hybrid.s0", *overrides).stdout


def test_killed_at_random_moments_it_ends_with_the_same_numbers(finished, tmp_path):
    recipe = write_study(tmp_path)
    without_rl = yaml.safe_load(recipe.read_text())
    del without_rl["arms"]["m-rl"]
    recipe.write_text(yaml.safe_dump(without_rl))
    chance = random.Random(3)
    for kind in ("node", "driver", "term"):
        driver = subprocess.Popen(command(recipe), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        time.sleep(chance.uniform(2, 7))
        processes = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
        if kind == "node" and processes:
            processes[-1].kill()
            assert driver.wait(60) in (FAILED, DONE)  # done where that process had nothing left to do
        else:
            driver.send_signal(signal.SIGKILL if kind == "driver" else signal.SIGTERM)
            driver.wait(60)
        _, alive = psutil.wait_procs(processes, timeout=20)
        assert not alive, "something of the killed study runs on"
    done = study(recipe)
    assert done.returncode == DONE, done.stdout + done.stderr
    found, whole = numbers(recipe), numbers(finished)
    assert found["losses"] == whole["losses"] and found["scores"] == whole["scores"] and found["scores"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {"m": {"program": "midtrain", "mixture": "mcx"}}}, "arms.m.mixture=mcx: there is none of that name"),
        (
            {"arms": {n: {"program": "rl", "from": m, "rl_mix": "math"} for n, m in (("a", "b"), ("b", "a"))}},
            "arms start from each other: a -> b -> a",
        ),
        (
            {"arms": {"m": {"program": "midtrain", "mixture": "m", "settings": ["train.step=5"]}}},
            "nearest: train.steps",
        ),
        ({"arms": {"m": {"program": "midtrain", "mixture": "m", "seeds": [7]}}}, "7 is not among seeds"),
        ({"modles": {}}, "nearest: models"),
        ({"claims": {"base": "bass"}}, "claims.base=bass: there is none of that name"),
    ],
)
def test_a_study_that_cannot_work_is_one_message(tmp_path, change, message):
    recipe = write_study(tmp_path)
    settings = yaml.safe_load(recipe.read_text()) | {"evaluate": {}} | change
    recipe.write_text(yaml.safe_dump(settings))
    done = study(recipe, "--dry-run")
    assert done.returncode == BAD_SETTINGS
    assert message in done.stderr and "Traceback" not in done.stderr


def test_the_folder_of_another_study_is_refused(finished, tmp_path):
    other = tmp_path / "other.yaml"
    settings = yaml.safe_load(finished.read_text())
    settings["mixtures"]["m"]["recipe"] = str(finished.parent / "midtrain.yaml")
    settings["rl_mixes"]["math"]["recipe"] = str(finished.parent / "rl.yaml")
    other.write_text(yaml.safe_dump(settings))
    done = study(other)
    assert done.returncode == BAD_SETTINGS and "is the folder of another study, study.yaml" in done.stderr


def test_a_second_driver_is_refused(tmp_path):
    recipe = write_study(tmp_path)
    first = subprocess.Popen(command(recipe), cwd=ROOT, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (lock := tmp_path / "studies/tiny/study.lock").is_file() or not lock.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    second = study(recipe)
    first.kill()
    first.wait()
    assert second.returncode == BAD_SETTINGS and f"pid {first.pid}" in second.stderr.replace("process", "pid")
