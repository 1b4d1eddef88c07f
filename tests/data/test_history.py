"""A changed mixture resumes source by source: no sample is read twice, none is left out, the shares are exact."""

import json

import numpy as np
import pytest

from prism_mcore.data.history import History

SEED = 0


def history(**weights):
    """Sources whose content is called as they are."""
    return History.new(list(weights), list(weights), list(weights.values()))


def samples(of, first, stop):
    """(source, its how-manieth sample) of a stretch of the run."""
    sources, ordinals = of.mixture.locate(np.arange(first, stop))
    return [(of.sources[s].name, int(o)) for s, o in zip(sources, ordinals, strict=True)]


def after(of, num_samples):
    return json.loads(json.dumps(of.record(num_samples)))


CHANGES = {
    "other shares": {"math": 0.2, "code": 0.8},
    "another order": {"code": 0.3, "math": 0.7},
    "one more, in front": {"new": 0.5, "math": 0.3, "code": 0.2},
    "one less": {"code": 1.0},
    "one for validation only": {"math": 0.0, "code": 1.0},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("stop", [1, 777, 5000])
def test_after_a_change_each_source_resumes_after_its_last_sample(change, stop):
    was, now = history(math=0.7, code=0.3), history(**CHANGES[change])
    changed = now.changed(after(was, stop), stop)
    read = samples(was, 0, stop) + samples(changed, stop, stop + 3000)
    for name in {name for name, _ in read}:
        ordinals = [ordinal for source, ordinal in read if source == name]
        assert ordinals == list(range(len(ordinals)))
    total = sum(CHANGES[change].values())
    for name, weight in CHANGES[change].items():
        for count in (1, 10, 1999):
            since = sum(source == name for source, _ in samples(changed, stop, stop + count))
            assert abs(since - count * weight / total) < 1


def test_a_source_keeps_its_order_and_a_new_one_gets_one_of_its_own():
    changed = history(new=1.0, code=1.0, math=1.0).changed(after(history(math=1.0, code=1.0), 10), 10)
    assert [source.key for source in changed.sources] == [2, 1, 0]


def test_a_source_that_was_away_resumes_where_it_was_left():
    first = history(math=1.0, code=1.0)
    second = history(code=1.0).changed(after(first, 10), 10)
    third = history(math=1.0, code=1.0).changed(after(second, 20), 20)
    assert [(source.key, source.read) for source in third.sources] == [(0, 5), (1, 15)]


def test_the_same_content_twice_is_two_sources():
    def twice():
        return History.new(["a", "b"], ["same", "same"], [0.9, 0.1])

    changed = twice().changed(after(twice(), 100), 100)
    assert [(source.key, source.read) for source in changed.sources] == [(0, 90), (1, 10)]


@pytest.mark.parametrize("stop", [5, 600])
def test_without_a_change_the_run_goes_on_as_if_it_had_not_stopped(stop):
    was = history(math=1.0, code=1.0).changed(after(history(code=0.3, math=0.7), 300), 300)
    resumed = history(math=1.0, code=1.0).resumed(after(was, 300 + stop))
    assert samples(resumed, 300 + stop, 2000) == samples(was, 300 + stop, 2000)
    assert after(resumed, 1500) == after(was, 1500)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (history(math=7, code=3), []),  # the same shares on another scale
        (history(code=0.3, math=0.7), ["it was math, which is in another place now", "it was code"]),
        (history(math=0.7, prose=0.3), ["data.sources[1] (prose): code held other content"]),
        (history(math=0.7, code=0.3, prose=1), ["data.sources[2] (prose) is new"]),
        (history(math=0.7), ["data.sources[1] (code) is gone"]),
        (history(math=0.5, code=0.5), ["(math): its share was 7/10, it is 1/2", "(code): its share was 3/10"]),
    ],
)
def test_differences_name_the_source_and_what_is_another(now, said):
    found = now.differences(after(history(math=0.7, code=0.3), 10), "data.sources")
    assert len(found) == len(said) and all(part in text for part, text in zip(said, found, strict=True))


def test_moved_files_are_the_same_data():
    moved = History.new(["/elsewhere/math", "/elsewhere/code"], ["math", "code"], [0.7, 0.3])
    assert moved.differences(after(history(math=0.7, code=0.3), 10), "data.sources") == []
