"""The records that cross borders between the parts of prism_mcore: small, frozen, with shapes in the comments."""

# b sequences in a micro-batch, s tokens in a sequence, t = b * s tokens in all, row after row

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # reading prompts must not cost the seconds that importing torch takes
    from torch import Tensor


def context_chunks(num_tokens: int, cp_size: int, cp_rank: int) -> tuple[range, range]:
    """The tokens of a micro-batch that a context-parallel rank holds: chunks r and 2 cp - 1 - r of 2 cp equal ones.

    The first tokens of long documents have few keys before them and the last many: each rank has some of both.
    """
    length, rest = divmod(num_tokens, 2 * cp_size)
    assert not rest, "the settings' check refuses it"
    first, second = (chunk * length for chunk in (cp_rank, 2 * cp_size - 1 - cp_rank))
    return range(first, first + length), range(second, second + length)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of packed documents, computed on the CPU by the loader, so that no device waits for a length.

    Two sequences of four tokens, documents isolated, the first sequence holding two documents of 3 and 1 tokens:

        tokens       [[5, 6, 7, 9], [3, 4, 8, 2]]
        labels       [[6, 7, 9, 1], [4, 8, 2, 6]]      # the next token of the corpus, always a valid id
        loss_mask    [[1, 1, 0, 0], [1, 1, 1, 0]]      # 0: the label is in another document, or masked
        position_ids [[0, 1, 2, 0], [0, 1, 2, 3]]      # restart at each document
        seq_idx      [[0, 0, 0, 1], [2, 2, 2, 2]]      # which document of the micro-batch
        cu_seqlens   [0, 3, 4, 8, 8, 8, 8, 8, 8]       # document i is tokens[cu_seqlens[i]:cu_seqlens[i + 1]] of the t
        max_seqlen   4
        num_tokens   5                                 # labels that count: loss_mask.sum()

    With `data.document_mask=false` every row is one document: cu_seqlens holds the multiples of s, positions run
    0..s-1, and labels count across document borders.
    """

    tokens: Tensor | None  # [b, s] int64; None on ranks that embed nothing (all but the first pipeline stage)
    labels: Tensor | None  # [b, s] int64; None on ranks that compute no loss (all but the last pipeline stage)
    loss_mask: Tensor | None  # [b, s] bool; None where labels is None
    position_ids: Tensor  # [b, s] int64
    seq_idx: Tensor  # [b, s] int32
    cu_seqlens: Tensor  # [b*s + 1] int32 (documents isolated) or [b + 1]; has every multiple of s, padded with b*s
    max_seqlen: int  # longest document, tokens
    num_tokens: int  # labels that count; 0 where labels is None
    source_ids: Tensor  # [b] int32: index into data.sources
    sample_ids: Tensor  # [b] int64: index of each sequence in the run's global order
    parents: Tensor | None = field(default=None, kw_only=True)  # [documents] int32: which document each continues
    # the end of; -1, nothing: those come first. None: no document continues another
    row_ids: Tensor | None = field(default=None, kw_only=True)  # [2, t / 2 cp] int64: the row of each token, where this
    # is a context-parallel rank's share. None: all tokens, row after row

    @property
    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, or of each row where documents are not isolated: [documents] int32."""
        lengths = np.diff(self.cu_seqlens.numpy())
        return lengths[lengths > 0]

    def shard(self, cp_size: int, cp_rank: int) -> PackedBatch:
        """A context-parallel rank's share, two chunks: [2, t / 2 cp] of what is [b, s]; the rest stays whole."""
        import torch

        b, s = self.position_ids.shape
        chunks = [slice(chunk.start, chunk.stop) for chunk in context_chunks(b * s, cp_size, cp_rank)]

        def mine(whole: Tensor | None) -> Tensor | None:
            return None if whole is None else torch.stack([whole.flatten()[chunk] for chunk in chunks])

        share = replace(
            self,
            tokens=mine(self.tokens),
            labels=mine(self.labels),
            loss_mask=mine(self.loss_mask),
            position_ids=mine(self.position_ids),
            seq_idx=mine(self.seq_idx),
            row_ids=mine(torch.arange(b)[:, None].expand(b, s)),
        )
        return replace(share, num_tokens=0 if share.loss_mask is None else int(share.loss_mask.sum()))


@dataclass(frozen=True)
class PolicyBatch(PackedBatch):
    """One micro-batch of rollouts, a document each: prompt and response without its last token.

    A rollout with prompt [5, 6] and response [7, 9] (its stop token), alone in its micro-batch:

        tokens            [[5, 6, 7]]
        labels            [[6, 7, 9]]
        loss_mask         [[0, 1, 1]]            # the label is a response token of a rollout in the loss
        advantages        [[0, 1.5, 1.5]]
        sampler_logprobs  [[0, -0.3, -0.02]]     # of the label
        on_policy         [[1, 1, 1]]            # sampled with the weights that this update starts from
        weights           [[0, 0.25, 0.25]]      # 1 / denominator
        rollout_ids       [3]                    # a document's rollout, by its place in the step; -1: none

    Rollouts of one prompt may share it: a document of the prompt without its last token, and for each rollout one that
    continues it, the prompt's last token and the response without its last. With responses [7, 9] and [1]:

        tokens            [[5, 6, 7, 6]]
        labels            [[0, 7, 9, 1]]
        position_ids      [[0, 1, 2, 1]]
        cu_seqlens        [0, 1, 3, 4]
        parents           [-1, 0, 0]
        rollout_ids       [-1, 3, 4]
    """

    advantages: Tensor  # [b, s] fp32
    sampler_logprobs: Tensor  # [b, s] fp32
    on_policy: Tensor  # [b, s] bool
    weights: Tensor  # [b, s] fp32
    rollout_ids: Tensor  # [documents] int64
    temperature: float  # of the sampler: log-probs are of logits / temperature
    reference_logprobs: Tensor | None = None  # [b, s] fp32; None: no KL term


@dataclass(frozen=True)
class Prompt:
    """One prompt of an RL or evaluation set, rendered to tokens; `index` is its place in the mixture.

    Prompt(17, "math", (1, 1128, 29, 9), "How much is 2 + 3?", {"reward": "math", "answer": "5"})
    """

    index: int
    source: str  # the name of the prompt file's source, for metrics
    tokens: tuple[int, ...]  # with BOS, as the model sees it
    text: str  # as rendered, for people
    record: dict[str, Any]  # the JSONL object: `reward`, `answer` and whatever else the reward reads


@dataclass(frozen=True)
class Rollout:
    """One sampled response with all that training, scoring and inspection need. Caches are never part of it.

    Rollout(prompt=17, group=3, sample=1, key=(0, 12, 17, 1), prompt_tokens=(1, 1128), tokens=(829, 2),
            logprobs=[-0.31, -0.02], versions=[12, 12], temperature=1.0, finish="stop", stop_token=True,
            verifier="ok", rewards={"correct": 1.0}, valid=True)
    """

    prompt: int  # Prompt.index
    group: int  # its group's place in the step
    sample: int  # its place in the group
    key: tuple[int, int, int, int]  # (seed, step, prompt, sample): with a position, one uniform number
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]  # the response; its last one is a stop id where stop_token
    logprobs: np.ndarray  # [response] float32: log-softmax of logits / temperature, at sampling
    versions: np.ndarray  # [response] int32: optimizer steps the weights had seen
    temperature: float
    finish: str  # "stop", "length" or "context"
    stop_token: bool  # does the response end with a stop id?
    verifier: str = "ok"  # "ok", "timeout" or "crash"
    rewards: Mapping[str, float] = field(default_factory=dict)  # named parts; their sum is the reward
    valid: bool = True  # False: counted in metrics, not in the loss nor in its group's mean and std

    @property
    def reward(self) -> float:
        return float(sum(self.rewards.values()))


@dataclass(frozen=True)
class RolloutGroup:
    """All samples of one prompt in one step."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
