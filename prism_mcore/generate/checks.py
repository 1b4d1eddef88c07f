"""Can these settings work? The check of a run that only generates; pure, before any process group."""

from prism_mcore.config import Findings
from prism_mcore.generate.settings import TENSORWISE_GENERATION, GenerateSettings, Sampling
from prism_mcore.model.checks import check_build, check_one_stage
from prism_mcore.model.settings import PrecisionSettings
from prism_mcore.model.spec import ModelSpec


def check(settings: GenerateSettings, spec: ModelSpec, world_size: int) -> list[str]:
    """Notes; raises one SettingsError that lists every problem, as train/checks.py does."""
    found = Findings()
    check_build(settings, spec, world_size, found)
    check_one_stage(settings.parallel, spec, found)
    check_fp8_of_tokens(settings.precision, found)
    check_stop_ids(settings.sampling, spec, found)
    return found.conclude()


def check_fp8_of_tokens(precision: PrecisionSettings, found: Findings) -> None:
    """A token that is generated must not depend on who else is in the batch."""
    if precision.fp8 == "tensorwise":
        found.problems.append(f"precision.fp8=tensorwise: {TENSORWISE_GENERATION}")


def check_stop_ids(sampling: Sampling, spec: ModelSpec, found: Findings) -> None:
    """Are the tokens that end a response tokens of the model?"""
    unknown = [token for token in sampling.stop_ids if not 0 <= token < spec.vocab_size]
    if unknown:
        found.problems.append(
            f"sampling.stop_ids holds {unknown[0]}; needed: ids from 0 to {spec.vocab_size - 1}, the model's vocabulary"
        )
