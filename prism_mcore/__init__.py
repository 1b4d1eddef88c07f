"""Mid-training, reinforcement learning, evaluation and analysis of open 3-24B language models on megatron-core."""

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prism_mcore.loading import load_model

__all__ = ["load_model"]

# megatron-core warns, at import and a dozen times per rank, about Apex and about names that newer torch deprecates;
# tools/doctor.py says what is installed. Here, because it must come before megatron-core is imported.
warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed|torch\.jit")


def __getattr__(name: str) -> Any:
    """Imported when asked for: it takes the seconds that torch and megatron-core take."""
    if name == "load_model":
        from prism_mcore.loading import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
