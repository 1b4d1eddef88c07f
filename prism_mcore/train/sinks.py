"""Where else a run's records go: services that draw them, each by its own package, which is imported here alone."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

from prism_mcore.train.settings import LogSettings, LoopSettings

SINKS = ("wandb", "trackio")  # settings of the section `log`, and packages


class Sink(Protocol):
    """What both packages call a run."""

    def log(self, record: dict[str, Any], step: int) -> object: ...

    def finish(self) -> object: ...


def missing(settings: LogSettings) -> list[str]:
    """Packages that the settings ask for and that are not installed."""
    wanted = [name for name in SINKS if getattr(settings, name)]
    return [name for name in wanted if importlib.util.find_spec(name) is None]


def open_sinks(settings: LoopSettings) -> list[Sink]:
    """The services of `log.wandb` and `log.trackio`, under the run's name: a run that resumes goes on there."""
    log, found = settings.log, list[Sink]()
    if not (log.wandb or log.trackio):
        return found
    run, shown = settings.run, settings.model_dump(mode="json")
    if log.wandb:
        wandb = importlib.import_module("wandb")
        where = Path(settings.run_dir)
        found.append(
            wandb.init(project=log.wandb, name=run.name, id=run.name, resume="allow", dir=str(where), config=shown)
        )
    if log.trackio:
        trackio = importlib.import_module("trackio")
        found.append(trackio.init(project=log.trackio, name=run.name, resume="allow", config=shown))
    return found
