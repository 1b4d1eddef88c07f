"""Text from the weights that are trained: continuous batching over cached sequences, in process.

One engine per model replica; under tensor parallelism every rank of it makes the same calls with the same arguments and
gets the same answers. Nothing is copied from the model: a pass after an optimizer step uses the new weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prism_mcore.generate.prompts import prompt_problem, prompt_tokens, text_tokens
from prism_mcore.generate.replica import Replica, Statistics
from prism_mcore.generate.requests import Completion, Request
from prism_mcore.generate.settings import EngineSettings, Sampling
from prism_mcore.generate.stream import Stream
from prism_mcore.model.hybrid import HybridModel
from prism_mcore.text import StopTexts, Tokenizer, response_text, stop_tokens


@dataclass(frozen=True)
class Response:
    """One response to a prompt of `Engine.generate`."""

    text: str | None  # before a stop text; None without a tokenizer
    completion: Completion


class Engine:
    """Samples responses from a HybridModel that is whole on this rank or its tensor-parallel group.

    tokenizer: `text.load_tokenizer(DIR)` or a fast tokenizer of transformers, for texts and for its end-of-sequence
    token; eos: more such tokens. context: the most tokens of prompt and response together, by default the model's
    positions. Raises ValueError where the model is not whole on this rank or the tokenizer is another model's.
    """

    def __init__(
        self,
        model: HybridModel,
        tokenizer: Any | None = None,
        *,
        settings: EngineSettings | None = None,
        eos: Sequence[int] = (),
        context: int | None = None,
    ):
        self.replica = Replica(model, settings or EngineSettings())
        self.model, self.eos = model, tuple(eos)
        self.tokenizer = None if tokenizer is None else Tokenizer.of(tokenizer)
        self.context = context or model.spec.max_positions
        if strange := [token for token in self.eos if type(token) is not int or token < 0]:
            raise ValueError(f"eos holds {strange[0]!r}; needed: token ids")
        if self.tokenizer is not None:
            self.tokenizer.check_fits(model.spec.vocab_size, "give the model's own tokenizer")

    @property
    def statistics(self) -> Statistics:
        """What the engine has done since it was made or reset."""
        return self.replica.statistics

    def generate(self, prompts: Sequence[str | Sequence[int]], **sampling: Any) -> list[list[Response]]:
        """Responses to each prompt, a text or its tokens; keywords are the fields of Sampling.

        Raises ValueError, before anything runs, for prompts that are no such list, and as `stream`.
        """
        how = Sampling(**sampling)
        if isinstance(prompts, str | bytes):
            raise ValueError("prompts is one text; needed: a list of prompts, each a text or a list of token ids")
        requests = [
            Request(self._tokens(i, prompt), tuple((how.seed, 0, i, sample) for sample in range(how.samples)))
            for i, prompt in enumerate(prompts)
        ]
        completions = sorted(self.stream(requests, how), key=lambda c: (c.request, c.sample))
        responses = [Response(self.text(c, how), c) for c in completions]
        return [responses[i : i + how.samples] for i in range(0, len(responses), how.samples)]

    def text(self, completion: Completion, sampling: Sampling) -> str | None:
        return None if self.tokenizer is None else response_text(self.tokenizer, completion.tokens, sampling.stop)

    @torch.inference_mode()
    def stream(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        before_pass: Callable[[], None] = lambda: None,
        budget: int = 0,
    ) -> Iterator[Completion]:
        """Completions as they finish, in the same order on all tensor-parallel ranks.

        budget: a sample that has gained so many tokens leaves unfinished (0: none does); a request that `begun` with
        its tokens continues it, and draws what it would have drawn, from the weights that there are then.
        before_pass: called before every pass through the model, the same ones on all tensor-parallel ranks; may raise
        what is to end the stream. The weights must not change before the last completion. Raises ValueError, before
        anything runs, for an empty prompt, one that leaves no position for a response, a token outside the vocabulary,
        and caches that are too small.
        """
        self._check(requests, sampling)
        if requests:
            stop_texts = StopTexts(self.tokenizer, sampling.stop) if self.tokenizer and sampling.stop else None
            ends = stop_tokens(sampling, self.tokenizer, self.eos)
            stream = Stream(
                self.replica,
                requests,
                sampling,
                ends=ends,
                stop_texts=stop_texts,
                context=self.context,
                budget=budget,
                before_pass=before_pass,
            )
            try:
                yield from stream.completions()
            finally:
                self.model.release_kept_weights()

    def reset(self) -> None:
        """Free the caches and forget the statistics."""
        self.replica.reset()

    def _tokens(self, index: int, prompt: str | Sequence[int]) -> tuple[int, ...]:
        try:
            return text_tokens(prompt, self.tokenizer) if isinstance(prompt, str) else prompt_tokens(prompt)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from error

    def _check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        if sampling.stop and self.tokenizer is None:
            raise ValueError("sampling.stop needs an engine with a tokenizer; use sampling.stop_ids")
        size = self.model.spec.vocab_size
        unknown = [token for token in sampling.stop_ids if not 0 <= token < size]
        if unknown:
            raise ValueError(f"sampling.stop_ids holds {unknown[0]}; needed: ids from 0 to {size - 1}, the vocabulary")
        for index, request in enumerate(requests):
            problem = prompt_problem(request.tokens, size, self.context) or _begun_problem(request, sampling)
            if not request.keys:
                problem = "has no keys; needed: one for each of its samples, at least one"
            if problem:
                raise ValueError(f"prompt {index} {problem}")


def _begun_problem(request: Request, sampling: Sampling) -> str:
    """What is wrong with a response that is to be continued; empty where nothing is."""
    if not request.begun:
        return ""
    if len(request.keys) != 1:
        return f"continues one response, and has {len(request.keys)} keys; needed: that response's"
    if not 0 < request.begun < len(request.tokens):
        return f"has begun={request.begun} of {len(request.tokens)} tokens; needed: a prompt before the response"
    if request.begun >= sampling.max_tokens:
        return f"has {request.begun} tokens of its response; sampling.max_tokens={sampling.max_tokens} leaves none"
    return ""
