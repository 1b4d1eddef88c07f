"""Mid-training, reinforcement learning, evaluation and analysis of open 3-24B language models on megatron-core."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prism_mcore.loading import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: it takes the seconds that torch and megatron-core take."""
    if name == "load_model":
        import warnings

        from prism_mcore.program import expect_warnings

        with warnings.catch_warnings():  # those of megatron-core's import, and no later ones of this process
            expect_warnings()
            from prism_mcore.loading import load_model
        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
