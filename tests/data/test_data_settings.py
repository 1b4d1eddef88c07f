import pytest
from pydantic import ValidationError

from prism_mcore.data.settings import DataSettings, normalised_shares


def settings(*weights: float) -> DataSettings:
    return DataSettings.model_validate({"sources": [{"path": f"s{i}", "weight": w} for i, w in enumerate(weights)]})


def test_weights_that_do_not_sum_to_one_are_normalised_and_said_so():
    shares, message = normalised_shares(settings(1, 3).sources)
    assert shares == [0.25, 0.75]
    assert message == "data.sources: weights sum to 4, not 1; normalised to s0 0.25, s1 0.75"


def test_weights_that_sum_to_one_pass_silently():
    assert normalised_shares(settings(*[0.1] * 10).sources)[1] is None  # 0.1 * 10 is not exactly 1 in floats


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
def test_a_negative_or_infinite_weight_names_its_field(weight):
    with pytest.raises(ValidationError, match=r"sources\.0\.weight"):
        settings(weight)


def test_no_source_and_no_weight_are_errors():
    with pytest.raises(ValueError, match=r"data\.sources is empty"):
        normalised_shares([])
    with pytest.raises(ValueError, match="all 2 weights are 0"):
        normalised_shares(settings(0, 0).sources)


def test_an_unknown_key_is_an_error():
    with pytest.raises(ValidationError, match="extra"):
        DataSettings.model_validate({"sequence_length": 3})
