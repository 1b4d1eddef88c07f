"""What measure_kernels.py does between the timings, without a GPU: fair sides, results that survive the end."""

import argparse
import importlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def measuring(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("measure_kernels")


def test_torch_computes_what_ours_does_with_a_multiplier_and_a_divisor(measuring):
    shape = {"d": 16, "v": 40, "divisor": 8.0, "alpha": 0.22}
    for name in ("linear_cross_entropy", "add_rms_norm"):
        row = next(row for row in measuring.ROWS if row.name == name)
        case = measuring.Case(row, "train", shape, 8)
        work = case.build("cpu")
        outputs, grads = measuring.run_once(*measuring.prepare(case, work, "torch"), [])
        exact = measuring.exact_results(case, "cpu", 8)
        assert measuring.largest_error(measuring.comparable(outputs, grads), exact) < 0.02


def test_a_peer_that_works_in_place_leaves_the_others_their_inputs(measuring, monkeypatch):
    class InPlace:
        @staticmethod
        def apply(q, k, cos, sin):
            with torch.no_grad():
                return q.zero_(), k.zero_()

    rope = types.SimpleNamespace(LigerRopeFunction=InPlace)
    for name, module in (("liger_kernel", rope), ("liger_kernel.ops", rope), ("liger_kernel.ops.rope", rope)):
        monkeypatch.setitem(sys.modules, name, module)
    row = next(row for row in measuring.ROWS if row.name == "rope")
    work = measuring.Case(row, "train", {"h": 4, "hk": 2, "p": 8}, 4).build("cpu")
    call, _ = measuring.PEERS["rope"]["liger"](work)
    call()
    assert work.args[0].any() and work.args[1].any()


def test_a_peer_gets_the_state_that_ours_started_from(measuring, monkeypatch):
    state = torch.zeros(3)
    work = types.SimpleNamespace(args=(state,), kwargs={}, returns=True)
    case = types.SimpleNamespace(name="step", tokens=1, build=lambda device: work)

    def side(case, work, name):
        mine = state if name == "ours" else state.clone()
        return (lambda: mine.add_(1)), ()

    monkeypatch.setattr(measuring, "exact_results", lambda *a: [torch.ones(3)])
    monkeypatch.setattr(measuring, "prepare_side", side)
    monkeypatch.setattr(measuring, "peak_memory", lambda call, leaves, upstream: call() and 0)
    monkeypatch.setattr(measuring, "summarise", lambda *a: None)
    found = measuring.measure_case(case, ["ours", "peer"], 1, lambda *a: (1.0, 1.0), {})
    assert [m.error for m in found] == [0.0, 0.0]


def test_what_was_measured_before_the_end_is_on_disk(measuring, monkeypatch, tmp_path):
    cases = [types.SimpleNamespace(name=name, phase="decode") for name in ("first", "second")]

    def measured(case, *rest):
        if case.name == "second":
            raise KeyboardInterrupt
        return [measuring.Measurement(case.name, "ours", 1e-6, 1e-6)]

    monkeypatch.setattr(measuring, "measure_case", measured)
    monkeypatch.setattr(measuring, "sides_of", lambda *a: ["ours"])
    monkeypatch.setattr(measuring, "Timer", lambda: None)
    monkeypatch.setattr(measuring, "measured_ceilings", lambda *a: {"copy_bytes_s": 1e12, "matmul_flop_s": 1e12})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    args = argparse.Namespace(quick=True, rounds=1, tests=[], out=tmp_path / "report")
    with pytest.raises(KeyboardInterrupt):
        measuring.measure(args, cases, Console(quiet=True))
    assert [m["case"] for m in json.loads((tmp_path / "report.json").read_text())["measurements"]] == ["first"]
    assert "| first | ours | 1.0 us |" in (tmp_path / "report.md").read_text()
