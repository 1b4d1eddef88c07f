"""The paper's study as it is planned."""

from pathlib import Path

import pytest

from prism_mcore.config import load
from prism_mcore.model.settings import resolve_spec
from prism_mcore.plan.hardware import H100
from prism_mcore.plan.rollouts import decode_seconds, rl_step_seconds
from prism_mcore.plan.throughput import TUNED, TYPICAL, Layout, step_time
from prism_mcore.rl.settings import RLSettings
from prism_mcore.study.checks import check
from prism_mcore.study.graph import build
from prism_mcore.study.plan import print_plan, work_of
from prism_mcore.study.settings import StudyProgram
from prism_mcore.train.plan import layout_of
from prism_mcore.train.settings import MidtrainSettings

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "study-paper.yaml"


@pytest.fixture(scope="module")
def paper():
    study = load(StudyProgram, RECIPE)
    check(study)
    return study, build(study, RECIPE)


def test_its_tokens_and_rollouts_are_the_papers(paper):
    study, nodes = paper
    for node in nodes.values():
        work = work_of(node, study.study.response_tokens)
        if node.label in ("m", "mc", "mcs", "mcs-16k", "mcs-32k"):
            assert work.tokens == 26_214_400_000
        elif node.kind == "rl":
            assert work.rollouts == 1000 * 1024
    budget = [work_of(nodes[f"{arm}.granite-3.3-8b.s0"], 1).tokens for arm in ("mc-10.5b", "mc-15.7b", "mc-31.5b")]
    assert [round(tokens / 1e9, 2) for tokens in budget] == [10.49, 15.73, 31.46]
    assert sum(node.label in ("m", "mc", "mcs") and "phase" not in node.model for node in nodes.values()) == 21


def test_its_hours_are_the_planners(paper):
    study, nodes = paper
    node = nodes["mcs.nemotron-h-8b.s0"]
    assert isinstance(node.settings, MidtrainSettings)
    rate = step_time(resolve_spec(node.settings.model), layout_of(node.settings, 128), H100).rate
    hours = work_of(node, study.study.response_tokens).hours
    assert hours == pytest.approx((26_214_400_000 / 3600 / rate / TUNED, 26_214_400_000 / 3600 / rate / TYPICAL))


def test_rl_starts_from_what_was_midtrained_with_the_papers_settings(paper):
    _, nodes = paper
    for node in nodes.values():
        if isinstance(node.settings, RLSettings):
            settings = node.settings
            assert settings.optimizer.lr == 5e-7 and settings.guards.spike_threshold == 0.0
            start = node.label.split("-rl-")[0]
            if start != "base":
                assert settings.model.init == str(nodes[f"{start}.{node.model}.s0"].folder / "hf")
                assert nodes[f"{start}.{node.model}.s0"].name in node.needs


def test_the_plan_is_printed(paper, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    print_plan(*paper)
    out = capsys.readouterr().out
    assert "26.21 B tokens" in out and "1,024,000 rollouts" in out and "H100 hours" in out and "e+" not in out


def test_an_rl_step_by_formula():
    """Decoding few sequences is bound by reading weights, many by products; twice the rollouts take twice as long."""
    spec = resolve_spec(load(MidtrainSettings, None, ["run.name=x", "model.spec=llama-3.1-8b"]).model)
    one, many = (decode_seconds(spec, 2, H100, running, 0) for running in (1, 4096))
    assert one == pytest.approx(2 * 8.03e9 / 2 / H100.bandwidth, rel=0.01)
    assert many == pytest.approx(2 * 8.03e9 / 2 * 4096 / H100.bf16, rel=0.01)
    layout = Layout(gpus=64, seq_len=16384, global_batch=0, tp=2)
    once, twice = (
        rl_step_seconds(spec, layout, H100, rollouts=rollouts, response_tokens=2048, reference=False)
        for rollouts in (2048, 4096)
    )
    assert twice["score"] == pytest.approx(twice["update"] / 3)
    assert 1.8 < twice["update"] / once["update"] <= 2.0


def test_the_miniature_holds_together():
    recipe = RECIPE.with_name("study-mini.yaml")
    study = load(StudyProgram, recipe)
    check(study)
    nodes = build(study, recipe)
    trained = [node for node in nodes.values() if node.settings is not None]
    assert len(trained) == 2 * 3 * 14
    base, control = nodes["mcs-rl.dense.s2"].settings, nodes["mcs-control.dense.s2"].settings
    assert base is not None and control is not None
    assert (base.optimizer, base.train.steps) == (control.optimizer, control.train.steps)  # the same schedule
