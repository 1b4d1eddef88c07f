"""The search for a layout: what it returns fits, is accepted by the engine's own checks, and is sorted."""

import pytest

from prism_mcore.config import Findings
from prism_mcore.model.checks import check_build
from prism_mcore.model.spec import read_spec
from prism_mcore.plan.hardware import H100
from prism_mcore.plan.search import RESERVED, build_of, memory_of, search

OPTIONS = {"seq_len": 8192, "global_batch": 128, "best": 10}


@pytest.mark.parametrize("model", ["nemotron-h-8b", "mistral-small-24b-2501"])
@pytest.mark.parametrize("gpus", [8, 128])
def test_what_is_found_fits_and_is_sorted(model, gpus):
    spec = read_spec(model)
    plans = search(spec, H100, gpus=gpus, fp8=(False, True), **OPTIONS)
    rates = [plan.time.rate for plan in plans]
    assert rates == sorted(rates, reverse=True) and len(plans) == 10
    for plan in plans:
        assert plan.memory == memory_of(spec, plan.layout) <= H100.memory - RESERVED
        found = Findings()
        check_build(build_of(plan.layout), spec, gpus, found)
        assert not found.problems


def test_granite_hybrids_in_proj_keeps_fp8_from_tp_8():
    plans = search(read_spec("granite-4.0-h-micro"), H100, gpus=8, fp8=(True,), **OPTIONS | {"best": 1000})
    assert {plan.layout.tp for plan in plans} == {1, 2, 4}


def test_what_does_not_fit_is_said_with_what_comes_closest():
    with pytest.raises(ValueError, match=r"nothing fits into 1 x 72 GB; the closest is tp=1 pp=1 with \d+ GB"):
        search(read_spec("mistral-small-24b-2501"), H100, gpus=1, fp8=(False,), **OPTIONS)
    with pytest.raises(ValueError, match="divides 48 GPUs and a batch of 7"):
        search(read_spec("llama-3.1-8b"), H100, gpus=48, fp8=(False,), **OPTIONS | {"global_batch": 7})
