"""Micro-batches through this rank's pipeline chunks: the one place that calls megatron-core's schedules."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.nn import Module


def run_pipeline(
    forward: Callable[[Iterator[Any], Any], tuple[Any, Callable[..., Any]]],
    chunks: Sequence[Module],
    data: Callable[[], Iterator[Any]],
    *,
    num_micro_batches: int,
    num_tokens: int,
    forward_only: bool = False,
    collect: bool = False,
) -> list[Any]:
    """Forward, and backward unless `forward_only`, over this rank's micro-batches.

    forward: (data, chunk) -> (output, function of the output); the last stage calls that function, for megatron-core's
    triple of loss, token count and what to return, or with `collect` for the latter alone. data: a new iterator, one
    for each chunk. num_tokens: t of a micro-batch, one packed sequence, of all context-parallel ranks together. Returns
    the last stage's, by micro-batch; nothing on the stages before it.
    """
    interleaved = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[data() for _ in chunks] if interleaved else data(),
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=num_micro_batches,
        seq_length=num_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )
