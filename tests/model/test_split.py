"""The automatic pipeline split is the best there is."""

from dataclasses import replace
from itertools import combinations

import pytest

from prism_mcore.model.flops import head_flops, sublayer_flops
from prism_mcore.model.spec import read_spec
from prism_mcore.model.split import split_layers


def slowest(spec, split):
    costs = [sum(sublayer_flops(spec, spec.pattern[i], 512) for i in chunk) for chunk in split]
    return max([*costs[:-1], costs[-1] + head_flops(spec)])


@pytest.mark.parametrize(("name", "pp", "vpp"), [("demo-hybrid", 2, 2), ("demo-dense", 3, 1), ("demo-hybrid", 5, 1)])
def test_no_other_cut_has_a_faster_slowest_chunk(name, pp, vpp):
    spec = read_spec(name)
    layers = len(spec.pattern)
    every = [
        [list(range(a, b)) for a, b in zip((0, *cuts), (*cuts, layers), strict=True)]
        for cuts in combinations(range(1, layers), pp * vpp - 1)
    ]
    assert slowest(spec, split_layers(spec, pp, vpp, 512)) == pytest.approx(min(slowest(spec, cut) for cut in every))


def test_the_head_takes_the_place_of_sub_layers():
    spec = read_spec("mistral-small-24b-2501")
    assert [len(chunk) for chunk in split_layers(replace(spec, vocab_size=1), 4, 1, 8192)] == [20, 20, 20, 20]
    assert len(split_layers(replace(spec, vocab_size=10**6), 4, 1, 8192)[-1]) < 10


def test_a_given_cut_is_kept_in_model_order_and_checked():
    spec = read_spec("demo-hybrid")
    assert split_layers(spec, 2, 2, 512, [1, 2, 2, 3]) == [[0], [1, 2], [3, 4], [5, 6, 7]]
    for wrong in ([4, 5], [8], [8, 0]):
        with pytest.raises(ValueError, match="sum to 8"):
            split_layers(spec, 2, 1, 512, wrong)
    with pytest.raises(ValueError, match="at most 8"):
        split_layers(spec, 9, 1, 512)
