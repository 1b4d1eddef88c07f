"""What positions a model can be given; that transformers computes the same is in tests/convert/test_parity.py."""

import pytest

from prism_mcore.config import SettingsError
from prism_mcore.model.rope import RopeSettings, extended
from prism_mcore.model.spec import read_spec

REFUSED = {
    "YaRN without positions": (
        ("nemotron-h-8b", {"scaling": "yarn", "factor": 4}),
        "model.rope.* scales rotary positions, and this nemotron_h has none: nothing limits its length",
    ),
    "YaRN that reaches no further": (
        ("mistral-7b-v0.1", {"scaling": "yarn"}),
        "model.rope.scaling=yarn by 1 reaches no further than model.rope.original=32768; give model.rope.positions",
    ),
    "a factor of nothing": (("llama-3.1-8b", {"factor": 4}), "model.rope.scaling=keep has none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_positions_that_cannot_be(case):
    (name, rope), message = REFUSED[case]
    with pytest.raises(SettingsError) as error:
        extended(read_spec(name), RopeSettings(**rope))
    assert message in str(error.value)


def test_scaling_starts_from_what_the_model_was_trained_on():
    rope = RopeSettings(positions=131072, scaling="yarn")
    once = extended(read_spec("mistral-7b-v0.1"), rope)
    assert (once.rope_scaling.original_max_positions, once.rope_scaling.factor) == (32768, 4.0)
    assert once.max_positions == 131072 and extended(once, rope) == once  # as a resumed run reads it
    again = extended(read_spec("llama-3.1-8b"), RopeSettings(positions=262144, scaling="llama3"))
    assert (again.rope_scaling.original_max_positions, again.rope_scaling.factor) == (8192, 32.0)
    assert extended(read_spec("nemotron-h-8b"), RopeSettings(positions=131072)).max_positions == 131072
