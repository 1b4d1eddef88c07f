"""The report's verdicts on results whose answer is known."""

import json
from typing import Any

import pytest

from prism_mcore.study.results import Results, idle_share, totals
from prism_mcore.study.settings import Claims
from prism_mcore.study.verdicts import verdicts

CLAIMS = Claims(
    base="base",
    general="general",
    midtrained=["mc", "mcs"],
    task="math",
    rl={"base": "base-rl", "mc": "mc-rl", "mcs": "mcs-rl"},
    science_task="science",
    with_science="mcs-rl-s",
    without_science="mc-rl-s",
    with_science_rl="mcs-rl",
    changes={"midtraining": "mt", "rl": "rl", "control": "ct"},
)
CELLS = [("hybrid", 0), ("dense", 1)]


def task(value: float, half: float = 0.02) -> dict[str, Any]:
    score = {"value": value, "low": value - half, "high": value + half}
    return {"score": score, "pass": {"1": value, "64": min(1.0, 8 * value)}}


def results(**changed: float) -> Results:
    """All that the paper claims, but for what is changed: `mcs_rl=0.1` is a score of math, `rl=0.5` a share."""
    math = {"base": 0.01, "base_rl": 0.01, "mc": 0.2, "mc_rl": 0.5, "mcs": 0.2, "mcs_rl": 0.5} | changed
    science = {"mc_rl_s": 0.05, "mcs_rl_s": 0.8, "mcs_rl": 0.7} | {
        name.removeprefix("science_"): value for name, value in changed.items() if name.startswith("science_")
    }
    shares = {"mt": 0.97, "rl": 0.05, "ct": 0.04} | {k: v for k, v in changed.items() if k in ("mt", "rl", "ct")}
    found = Results()
    for model, seed in CELLS:
        for kind, scores in (("math", math), ("science", science)):
            for arm, value in scores.items():
                if kind == "science" or arm in ("base", "mc", "mcs") or arm in ("base_rl", "mc_rl", "mcs_rl"):
                    run = (f"all of {arm.replace('_', '-')}", model, seed)
                    found.scores.setdefault(run, {})[kind] = task(value)
        for arm in ("mc", "mcs"):
            found.losses[(arm, model, seed)] = {
                "validation/loss/math": (6.0, changed.get("math_after", 0.5)),
                "validation/loss/general": (3.5, changed.get("general_after", 3.52)),
            }
        for name, share in shares.items():
            found.weights[(name, model, seed)] = {"changed_1pct": share}
        found.idle_steps[("base-rl", model, seed)] = changed.get("idle", 1.0)
    return found


def outcomes(found: Results) -> list[str]:
    return [verdict.outcome for verdict in verdicts(CLAIMS, found)]


def test_what_the_paper_claims_is_shown_where_it_is_so():
    assert outcomes(results()) == ["shown"] * 4 + ["not measured", "shown"]
    lines = verdicts(CLAIMS, results())[1].numbers
    assert "mc: 20 [20, 20]% -> 50 [50, 50]% (pass@64 before: 100 [100, 100]%)" in lines


@pytest.mark.parametrize(
    ("place", "changed"),
    [
        (0, {"general_after": 3.6}),  # general text is lost: more than 1%
        (0, {"math_after": 6.1}),
        (1, {"mcs_rl": 0.23}),  # a gain within both intervals
        (1, {"base_rl": 0.3}),  # the base gains, too
        (2, {"science_mc_rl_s": 0.79}),  # as good without science at mid-training
        (2, {"science_mcs_rl": 0.01}),  # RL's mixture matters more
        (3, {"rl": 0.59}),  # not few
        (3, {"mt": 0.3}),
        (5, {"idle": 0.0}),
    ],
)
def test_what_does_not_hold_is_not_shown(place, changed):
    found = outcomes(results(**changed))
    assert found[place] == "not shown"
    assert found[:place] + found[place + 1 :] == [o for i, o in enumerate(outcomes(results())) if i != place]


def test_one_seed_that_fails_is_enough():
    found = results()
    found.scores[("all of mc-rl", "dense", 1)]["math"] = task(0.2)
    verdict = verdicts(CLAIMS, found)[1]
    assert verdict.outcome == "not shown" and verdict.note == "no gain from mc"


def test_the_control_says_whether_a_share_is_rls_own():
    assert "the schedule's, not RL's" in verdicts(CLAIMS, results())[3].note
    assert "not the schedule's alone" in verdicts(CLAIMS, results(ct=0.4))[3].note


def test_what_is_not_there_is_not_measured():
    assert outcomes(Results()) == ["not measured"] * 6


def test_numbers_of_runs_and_analyses(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"grad_norm": n}) + "\n" for n in (None, 0.0, 1.5, 2.0)))
    assert idle_share(tmp_path / "metrics.jsonl") == 0.5
    rows = "name,numel,relative_l2,changed_1pct\na,300,0.1,1.0\nb,100,0.5,0.0\n"
    (tmp_path / "weights.csv").write_text(rows)
    assert totals(tmp_path / "weights.csv") == {"relative_l2": pytest.approx(0.2), "changed_1pct": 0.75}
