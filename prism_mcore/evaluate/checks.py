"""Can these settings work? The checks of scoring and evaluation; pure, before any process group."""

from prism_mcore.config import Findings
from prism_mcore.evaluate.settings import EvaluateSettings, ScoreSettings
from prism_mcore.generate.checks import check_fp8_of_tokens
from prism_mcore.model.checks import (
    check_build,
    check_one_stage,
    check_pipeline,
    check_positions,
    check_whole_sequences,
)
from prism_mcore.model.spec import ModelSpec


def check(settings: ScoreSettings, spec: ModelSpec, world_size: int, seq_len: int) -> list[str]:
    """Notes; raises one SettingsError that lists every problem, as train/checks.py does.

    seq_len: tokens of a sequence.
    """
    found = Findings()
    check_build(settings, spec, world_size, found)
    check_whole_sequences(settings.parallel, found)
    check_pipeline(settings.parallel, spec, found)
    check_positions("the sequences' length", seq_len, spec, found)
    return found.conclude()


def check_evaluation(settings: EvaluateSettings, spec: ModelSpec, world_size: int) -> list[str]:
    """Notes on an evaluation; raises as `check`."""
    found = Findings()
    check_build(settings, spec, world_size, found)
    check_one_stage(settings.parallel, spec, found)
    check_fp8_of_tokens(settings.precision, found)
    if settings.gpqa.options == "evalchemy":
        found.notes.append(
            "gpqa.options=evalchemy: of four options the right one is D in every question; a score is then the share"
            " of questions that the model answers with D"
        )
    return found.conclude()
