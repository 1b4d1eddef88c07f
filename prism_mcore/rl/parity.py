"""Do sampler and training give a token the same log-probability? `rl.parity`: the op set, the gate, the explanation.

Under `exact` both use one op set (prism_kernels/*/exact.py) and one differing bit stops the run; the rollout is then
replayed on both paths with the hidden states of every sub-layer kept, to name the first place where they part.
"""

# t tokens of a rollout, d hidden

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from prism_kernels.attention.exact import BLOCK
from prism_kernels.backends import select
from prism_kernels.boundaries import Boundaries
from prism_kernels.loss.exact import token_logprobs
from prism_kernels.table import OPS
from prism_mcore.batch import Rollout
from prism_mcore.evaluate.scoring import one_document_each
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.model.spec import LAYER_NAMES
from prism_mcore.model.state import Decode, PackedTokens, Prefill
from prism_mcore.rl.settings import PolicySettings
from prism_mcore.rl.step import PolicyStats
from prism_mcore.train.guards import GuardStop
from prism_mcore.train.step import to_device


def op_set(parity: str, kernels: Mapping[str, str], device: torch.device | str) -> dict[str, str]:
    """`kernels.*` as `rl.parity` needs them. A ValueError where exact cannot be had: see its message."""
    if parity != "exact":
        return dict(kernels)
    # FP8 is refused beside exact.
    ops = [name for name, op in OPS.items() if "exact" in op.backends and name != "fp8_linear"]
    if torch.device(device).type == "cuda":
        selected = select(kernels, device)
        varying = [f"{op} ({selected[op].name})" for op in ops if not selected[op].batch_invariant]
        if varying:
            raise ValueError(
                "rl.parity=exact: on a GPU every op has to give a row the same bits in any batch; these do not:"
                f" {', '.join(varying)}. Choose rl.parity=tolerance, which measures the gap and corrects for it"
            )
        return dict(kernels)
    for op in ops:
        if kernels.get(op, "auto") not in ("auto", "exact"):
            raise ValueError(
                f"rl.parity=exact: kernels.{op}={kernels[op]} rounds a token by the batch it is in; leave it out, or"
                " choose rl.parity=tolerance"
            )
    return {**kernels, **dict.fromkeys(ops, "exact")}


def check(
    stats: PolicyStats, rollouts: Sequence[Rollout], model: HybridModel, settings: PolicySettings, step: int
) -> None:
    """Stop the run where sampler and training differ by more than `rl.parity` allows; every rank calls it.

    rollouts: the step's, of all ranks. model: with the weights that sampled them. Raises GuardStop.
    """
    gap = stats.gap
    if settings.parity == "exact" and gap.size != 0:
        rollout = rollouts[gap.rollout]
        raise GuardStop(
            f"step {step}, rl.parity=exact: {_name(gap.rollout, rollout)}, token {gap.position}: log-probs of sampler"
            f" and training differ by {gap.size:.3g}; {explain(model, rollout, gap.position)}"
        )
    if settings.parity == "tolerance" and not stats.gap_mean <= settings.parity_tolerance:
        raise GuardStop(
            f"step {step}, rl.parity=tolerance: log-probs of sampler and training differ by {stats.gap_mean:.3g} nats"
            f" on average, above rl.parity_tolerance={settings.parity_tolerance}; the largest, {gap.size:.3g}, is that"
            f" of token {gap.position} of {_name(gap.rollout, rollouts[gap.rollout])}"
        )


def _name(place: int, rollout: Rollout) -> str:
    return f"rollout {place} (prompt {rollout.prompt}, sample {rollout.sample})"


@dataclass
class Trace:
    """A rollout's way through the model: what each place gave each token, and each token's log-probability."""

    states: dict[str, list[Tensor]] = field(default_factory=dict)  # place -> [., d] pieces of [t, d], in order
    logprobs: list[Tensor] = field(default_factory=list)  # pieces of [t]: of the next token


def explain(model: HybridModel, rollout: Rollout, position: int) -> str:
    """Where the two paths of a rollout part first: the place in the model and the token; position: in the response."""
    trained, decoded = trained_trace(model, rollout), decoded_trace(model, rollout)
    last = len(rollout.prompt_tokens) + position  # tokens that the log-prob depends on
    for place, pieces in trained.states.items():
        differs = (torch.cat(pieces)[:last] != torch.cat(decoded.states[place])[:last]).any(-1)
        if differs.any():
            token = int(differs.int().argmax())
            return f"replayed, the paths part first in the {place}, at token {token} of prompt and response"
    if not torch.equal(torch.cat(trained.logprobs)[:last], torch.cat(decoded.logprobs)[:last]):
        return "replayed, the paths part first in the logits and their softmax"
    replayed, sampled = float(torch.cat(decoded.logprobs)[last - 1]), float(rollout.logprobs[position])
    if replayed != sampled:
        return (
            f"replayed alone, both paths give {replayed:.9g}; the sampler had {sampled:.9g}: its batch or its caches"
            " made the difference, or the weights have changed since"
        )
    return f"replayed alone, both paths and the sampler give {sampled:.9g}: the packed batch made the difference"


@torch.no_grad()
def trained_trace(model: HybridModel, rollout: Rollout) -> Trace:
    """One packed forward pass over the rollout alone."""
    text = torch.tensor([rollout.prompt_tokens + rollout.tokens])
    tokens = text.shape[1] - 1
    ranks = model.context.groups.tp_size if model.config.sequence_parallel else 1
    with _watched(model) as trace:
        batch = to_device(one_document_each(text, -text.shape[1] % ranks), next(model.parameters()).device)
        logprobs, _ = model(batch, temperature=rollout.temperature or 1.0)
    return Trace({place: [torch.cat(x)[:tokens]] for place, x in trace.states.items()}, [logprobs[:tokens]])


@torch.no_grad()
def decoded_trace(model: HybridModel, rollout: Rollout) -> Trace:
    """The prompt prefilled, then the response token by token through fresh caches."""
    groups, temperature = model.context.groups, rollout.temperature or 1.0
    text = torch.tensor(rollout.prompt_tokens + rollout.tokens, device=next(model.parameters()).device)
    blocks, prompt = -(-len(text) // BLOCK), len(rollout.prompt_tokens)
    caches, device = model.caches(1, blocks, BLOCK), text.device
    slot, table = torch.zeros(1, dtype=torch.int64, device=device), torch.arange(blocks, device=device).int()[None]
    with model.whole_sequences(), _watched(model) as trace:
        for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, len(text) - 1))]:
            places = torch.arange(start, end, device=device)
            ends = torch.tensor([0, end - start], dtype=torch.int32)
            seq = PackedTokens(Boundaries.on(device, ends), end - start, model.rope(places))
            lengths = torch.tensor([end], dtype=torch.int32, device=device)
            pass_ = Prefill(slot, places) if start == 0 else Decode(slot, places, places, table, lengths)
            x = model.advance(text[start:end], seq, pass_, caches)
            logits = model.next_logits(x, temperature)
            first = groups.tp_rank * (model.embedding.weight.shape[0])
            tp = groups.tp if groups.tp_size > 1 else None
            trace.logprobs.append(token_logprobs(logits, text[start + 1 : end + 1], first, tp))
    return trace


@contextmanager
def _watched(model: HybridModel) -> Iterator[Trace]:
    """Inside, what every part of the model gives goes into the trace."""
    trace = Trace()

    def keep(place: str, x: Tensor) -> None:
        if model.config.sequence_parallel:
            parts = [torch.empty_like(x) for _ in range(model.context.groups.tp_size)]
            dist.all_gather(parts, x.contiguous(), group=model.context.groups.tp)
            x = torch.cat(parts)
        trace.states.setdefault(place, []).append(x.squeeze(1).clone())

    hooks = [model.embedding.register_forward_hook(lambda _module, _inputs, x: keep("embedding", x))]
    for name, layer in model.layers.items():
        place = f"sub-layer {name} ({LAYER_NAMES[model.spec.pattern[int(name)]]})"
        hooks.append(layer.register_forward_hook(lambda _module, _inputs, out, place=place: keep(place, out[1])))
    hooks.append(
        model.final_norm.register_forward_hook(
            lambda _module, _inputs, out: keep("final norm", out[0] if isinstance(out, tuple) else out)
        )
    )
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()
