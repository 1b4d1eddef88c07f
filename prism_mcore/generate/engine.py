"""Text from the weights that are trained: continuous batching over cached sequences, in process.

One engine per model replica; under tensor parallelism every rank of it makes the same calls with the same arguments and
gets the same answers. Nothing is copied from the model: a pass after an optimizer step uses the new weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from prism_kernels.exact_loss import token_logprobs
from prism_mcore.generate.cache import Caches, Capacity, Costs
from prism_mcore.generate.requests import Completion, Request
from prism_mcore.generate.sampler import Sampler, Vocabulary
from prism_mcore.generate.settings import GenerateSettings, Sampling
from prism_mcore.generate.stream import Stream
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.model.parameters import padded_vocabulary
from prism_mcore.text import Tokenizer, response_text


@dataclass(frozen=True)
class Statistics:
    """What an engine has done since it was made or reset."""

    prefilled_tokens: int = 0
    decoded_tokens: int = 0  # sampled ones, a prompt's first included
    steps: int = 0  # decoding passes
    slot_steps: int = 0  # slots in them, running or not
    running_steps: int = 0  # slots that ran
    cache_bytes: int = 0  # of the last stream


@dataclass(frozen=True)
class Response:
    """One response to a prompt of `Engine.generate`."""

    text: str | None  # before a stop text; None without a tokenizer
    completion: Completion


class Engine:
    """Samples responses from a HybridModel that is whole on this rank or its tensor-parallel group.

    tokenizer: `text.load_tokenizer(DIR)` or a fast tokenizer of transformers, for texts and for its end-of-sequence
    token; eos: more such tokens. context: the most tokens of prompt and response together, by default the model's
    positions.
    """

    def __init__(
        self,
        model: HybridModel,
        tokenizer: Any | None = None,
        *,
        settings: GenerateSettings | None = None,
        eos: Sequence[int] = (),
        context: int | None = None,
    ):
        if not (model.pre_process and model.post_process):
            raise ValueError("generation needs the whole model on each rank; set parallel.pp=1")
        self.model, self.eos = model, tuple(eos)
        self.tokenizer = None if tokenizer is None else Tokenizer.of(tokenizer)
        self.settings = settings or GenerateSettings()
        self.groups, self.context = model.context.groups, context or model.spec.max_positions
        self.device = next(model.parameters()).device
        self.costs = Costs.of(model)
        self.statistics = Statistics()
        self._caches: tuple[Capacity, Caches] | None = None

    def generate(self, prompts: Sequence[str | Sequence[int]], **sampling: Any) -> list[list[Response]]:
        """Responses to each prompt, a text or its tokens; keywords are the fields of Sampling."""
        how = Sampling(**sampling)
        requests = [
            Request(self._tokens(prompt), tuple((how.seed, 0, i, sample) for sample in range(how.samples)))
            for i, prompt in enumerate(prompts)
        ]
        completions = sorted(self.stream(requests, how), key=lambda c: (c.request, c.sample))
        responses = [Response(self.text(c, how), c) for c in completions]
        return [responses[i : i + how.samples] for i in range(0, len(responses), how.samples)]

    def text(self, completion: Completion, sampling: Sampling) -> str | None:
        return None if self.tokenizer is None else response_text(self.tokenizer, completion.tokens, sampling.stop)

    @torch.inference_mode()
    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Completions as they finish, in the same order on all tensor-parallel ranks.

        The weights must not change before the last one. Raises ValueError, before anything runs, for an empty prompt,
        one that leaves no position for a response, a token outside the vocabulary, and caches that are too small.
        """
        self._check(requests, sampling)
        if requests:
            yield from Stream(self, requests, sampling).completions()

    def reset(self) -> None:
        """Free the caches and forget the statistics."""
        self._caches, self.statistics = None, Statistics()

    def _tokens(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(prompt)
        if self.tokenizer is None:
            raise ValueError("a prompt is text, and this engine has no tokenizer; give it one, or tokens as prompts")
        return tuple(self.tokenizer.encode(prompt))

    def _check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        if sampling.stop and self.tokenizer is None:
            raise ValueError("sampling.stop needs an engine with a tokenizer; use sampling.stop_ids")
        size = self.model.spec.vocab_size
        unknown = [token for token in sampling.stop_ids if not 0 <= token < size]
        if unknown:
            raise ValueError(f"sampling.stop_ids holds {unknown[0]}; needed: ids from 0 to {size - 1}, the vocabulary")
        for index, request in enumerate(requests):
            problem = prompt_problem(request.tokens, size, self.context)
            if not request.keys:
                problem = "has no keys; needed: one for each of its samples, at least one"
            if problem:
                raise ValueError(f"prompt {index} {problem}")

    def caches(self, room: Capacity) -> Caches:
        """Caches of at least this capacity; those of the last stream where they suffice."""
        made = self._caches
        if made is None or made[0].slots < room.slots or made[0].blocks < room.blocks:
            self._caches = None  # the old ones go first
            self._caches = made = room, Caches.allocate(self.model, room, self.costs)
        self.count(cache_bytes=made[1].bytes - self.statistics.cache_bytes)
        return made[1]

    def count(self, **more: int) -> None:
        self.statistics = replace(
            self.statistics, **{name: getattr(self.statistics, name) + n for name, n in more.items()}
        )

    def sampler(self, sampling: Sampling) -> Sampler:
        """What draws tokens from `logits` at sampling.temperature."""
        spec, tp = self.model.spec, self.groups.tp_size
        exact = self.model.context.ops.uses_exact("lm_logits")
        return Sampler(
            Vocabulary.of(spec.vocab_size, padded_vocabulary(spec, tp), self.groups),
            greedy=sampling.temperature == 0,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            token_logprobs=token_logprobs if exact else None,
        )


def prompt_problem(tokens: Sequence[int], vocab_size: int, context: int) -> str | None:
    """What is wrong with a prompt, or None."""
    if not len(tokens):
        return "is empty; needed: at least one token"
    if len(tokens) >= context:
        return f"has {len(tokens):,} tokens; needed: fewer than the model's {context:,} positions, to leave one to fill"
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= vocab_size:
        return f"holds token {low if low < 0 else high}; needed: ids from 0 to {vocab_size - 1}, the model's vocabulary"
    return None
