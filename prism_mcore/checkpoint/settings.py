"""When a run is saved, and what of it is kept."""

from pydantic import Field

from prism_mcore.config import Section


class CheckpointSettings(Section):
    """Saving and resuming."""

    every: int = Field(
        default=0, ge=0, description="Steps between checkpoints; one at the end in any case; 0 is only that one"
    )
    keep: int = Field(default=3, ge=0, description="Newest checkpoints to keep; 0 keeps all")
    keep_best: str = Field(
        default="",
        description="Keep the checkpoint with the best validation, too: min: or max: and a key of validation.jsonl,"
        " such as min:validation/loss/math; `checkpoints/best` names it",
    )
    resume: bool = Field(
        default=True, description="Go on from the newest undamaged checkpoint of the run, where there is one"
    )
    async_save: bool = Field(default=False, description="Write while training goes on; costs a copy in host memory")
    save_deadline_s: float = Field(
        default=1800.0, gt=0, description="A save that takes longer ends the run with an error"
    )
