"""Text from a model, in process and on the weights that are trained: `Engine(model, tokenizer).generate(prompts)`."""

import importlib
from typing import Any

_PLACES = {
    "Completion": "requests",
    "Engine": "engine",
    "EngineSettings": "settings",
    "Request": "requests",
    "Response": "engine",
    "Sampling": "settings",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    """Imported when asked for: reading settings must not cost the seconds that torch takes."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
