"""Invariant 1: the same weights and tokens give the same loss and the same gradients in every parallel layout."""

import pytest
from ranks import run_ranks
from tiny.gradients import close, losses_and_gradients
from tiny.models import SPECS

from prism_mcore.model.parameters import parameters

LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    "tp2+sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "pp2 interleaved": (2, {"pp": 2, "vpp": 2}),
    "dp2": (2, {}),
    "tp2 x pp2": (4, {"tp": 2, "pp": 2}),
    "pp2 x dp2": (4, {"pp": 2}),
    "tp2+sp x dp2": (4, {"tp": 2, "sequence_parallel": True}),
    "dp2 x dp2 instances": (4, {"optimizer_instances": 2}),
}


@pytest.fixture(scope="module")
def alone():
    return {name: run_ranks(1, losses_and_gradients, name)[0] for name in SPECS}


def assert_same(result, reference):
    (stats, gradients), (want_stats, want_gradients) = result, reference
    assert stats.loss == pytest.approx(want_stats.loss, rel=1e-5)
    assert stats.source_loss == pytest.approx(want_stats.source_loss, rel=1e-5)
    assert stats.source_tokens == want_stats.source_tokens
    assert gradients.keys() == want_gradients.keys()
    wrong = [n for n in gradients if not close(gradients[n], want_gradients[n])]
    assert not wrong, wrong


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec_name", SPECS)
def test_same_loss_and_gradients_in_every_layout(alone, spec_name, layout):
    world_size, degrees = LAYOUTS[layout]
    sequence_parallel = degrees.get("sequence_parallel", False)
    for result in run_ranks(world_size, losses_and_gradients, spec_name, sequence_parallel, **degrees):
        assert_same(result, alone[spec_name])


@pytest.mark.parametrize("layout", ["dp2", "tp2 x pp2"])
def test_overlapped_reduction_changes_nothing(alone, layout):
    world_size, degrees = LAYOUTS[layout]
    for result in run_ranks(world_size, losses_and_gradients, "hybrid", False, "", 4, True, **degrees):
        assert_same(result, alone["hybrid"])


@pytest.mark.parametrize("spec_name", SPECS)
def test_every_parameter_of_the_table_gets_a_gradient(alone, spec_name):
    gradients = alone[spec_name][1]
    table = parameters(SPECS[spec_name])
    assert {name: tuple(g.shape) for name, g in gradients.items()} == {name: p.shape for name, p in table.items()}
    assert [name for name, g in gradients.items() if not g.abs().max() > 0] == []
