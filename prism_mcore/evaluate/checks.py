"""Can these settings work? The check of a scoring run; pure, before any process group."""

from prism_mcore.config import Findings
from prism_mcore.evaluate.settings import ScoreSettings
from prism_mcore.model.checks import check_build, check_pipeline, check_positions
from prism_mcore.model.spec import ModelSpec


def check(settings: ScoreSettings, spec: ModelSpec, world_size: int, seq_len: int) -> list[str]:
    """Notes; raises one SettingsError that lists every problem, as train/checks.py does.

    seq_len: tokens of a sequence.
    """
    found = Findings()
    check_build(settings, spec, world_size, found)
    check_pipeline(settings.parallel, spec, found)
    check_positions("the sequences' length", seq_len, spec, found)
    return found.conclude()
