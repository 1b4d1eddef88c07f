"""What goes into the engine and what comes out of it."""

from dataclasses import dataclass

import numpy as np

Key = tuple[int, int, int, int]  # (seed, step, prompt, sample): with a position, one uniform number


@dataclass(frozen=True)
class Request:
    """One prompt, prefilled once for all its samples: `Request((1, 1128, 29), ((0, 12, 17, 0), (0, 12, 17, 1)))`.

    A response that an earlier stream began is continued by a request of its own, `Request((1, 1128, 29, 829), ((0, 12,
    17, 1),), begun=1)`: it is sampled from position 1 on.
    """

    tokens: tuple[int, ...]
    keys: tuple[Key, ...]  # of each sample
    begun: int = 0  # how many of the tokens, the last, are the response's already


@dataclass(frozen=True)
class Completion:
    """One sample of one request.

    Completion(request=0, sample=1, tokens=(829, 2), logprobs=[-0.31, -0.02], finish="stop", stop_token=True)
    """

    request: int  # index in the list of requests
    sample: int  # index in its keys
    tokens: tuple[int, ...]  # new ones; ends with the stop id where stop_token, else with a stop text's last token
    logprobs: np.ndarray  # [tokens] float32: log-softmax of logits / temperature over the whole vocabulary
    finish: str  # "stop", "length" (max_tokens), "context" (the engine's) or "budget": it can be continued
    stop_token: bool
