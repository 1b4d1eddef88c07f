"""A given response, generated again token by token: its log-probabilities and the hidden states on the way."""

# P prompt tokens, n response tokens, d hidden

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism_kernels.boundaries import Boundaries
from prism_mcore.generate.cache import BLOCK_LEN, Capacity
from prism_mcore.generate.engine import Engine
from prism_mcore.generate.requests import Request
from prism_mcore.generate.schedule import Schedule
from prism_mcore.generate.settings import Sampling
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.model.sequence import Sequence as Tokens
from prism_mcore.model.state import Decode, Prefill


@dataclass(frozen=True)
class Replay:
    logprobs: Tensor  # [n] fp32: what sampling these tokens would have reported
    hidden: dict[str, Tensor]  # "layers.3" -> what sub-layer 3 adds, "final_norm" -> its result; [P + n - 1, d]


@contextmanager
def recorded(model: HybridModel) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, every forward pass appends what each sub-layer adds to the residual stream, and the final norm's result.

    The same names for the training forward and for `replay`: where they first differ is where the two paths part.
    """
    seen: dict[str, list[Tensor]] = {}
    watched = {f"layers.{name}": layer.mixer for name, layer in model.layers.items()} | {"final_norm": model.final_norm}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            whole = output if isinstance(output, Tensor) else output[0]
            seen.setdefault(name, []).append(whole.detach().squeeze(1).clone())

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def replay(engine: Engine, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0) -> Replay:
    """Prefill the prompt, then decode the response with each of its tokens given instead of sampled.

    temperature: as at sampling, 0 included. Every tensor-parallel rank calls it; the engine's caches are not touched.
    """
    model, device = engine.model, engine.device
    schedule, caches = _alone(engine, prompt, len(response))
    sampler = engine.sampler(Sampling(temperature=temperature))
    logprobs: list[Tensor] = []

    def advance(tokens: Sequence[int], positions: Tensor, boundaries: Boundaries, step: Prefill | Decode) -> None:
        seq = Tokens(boundaries, len(tokens), model.rope(positions))
        hidden = model.advance(torch.tensor(tokens, device=device), seq, step, caches)
        logits = model.next_logits(hidden[-1:], temperature or 1.0)
        target = torch.tensor([response[len(logprobs)]], device=device)
        logprobs.append(sampler.logprobs(logits, target))

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(device)

    with model.whole_sequences(), recorded(model) as seen:
        admission = schedule.admit()
        assert admission is not None, "the caches are made for this one sample"
        ends = torch.tensor([0, len(prompt)], dtype=torch.int32)
        whole = Prefill(tensor(admission.prompt_slots), tensor(admission.prompt_rows))
        advance(prompt, torch.arange(len(prompt), device=device), Boundaries.on(device, ends), whole)
        for token in response[:-1]:
            step = schedule.decode()
            positions = tensor(step.positions)
            decode = Decode(
                tensor(step.slots), positions, tensor(step.rows), tensor(step.block_table), (positions + 1).int()
            )
            advance([token], positions, Boundaries(torch.tensor([0, 1], dtype=torch.int32)), decode)
    return Replay(torch.cat(logprobs), {name: torch.cat(parts) for name, parts in seen.items()})


def _alone(engine: Engine, prompt: Sequence[int], length: int) -> tuple[Schedule, dict]:
    """A schedule of one sample, and caches for it."""
    request = Request(tuple(prompt), ((0, 0, 0, 0),))
    room = Capacity(1, -(-(len(prompt) + length) // BLOCK_LEN))
    schedule = Schedule([request], np.array([length]), room, len(prompt))
    return schedule, engine.model.caches(len(schedule.active) + 1, len(schedule.blocks.owners), BLOCK_LEN)
