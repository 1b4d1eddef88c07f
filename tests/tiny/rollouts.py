"""Rollouts for tests: `from rollouts import rollout, group_of, random_groups`."""

import numpy as np

from prism_mcore.batch import Prompt, Rollout, RolloutGroup


def rollout(tokens, reward=0.0, *, prompt=(5, 6), logprobs=None, version=0, valid=True, group=0, sample=0):
    """A response with these tokens; its log-probs default to -1 each."""
    n = len(tokens)
    return Rollout(
        prompt=group,
        group=group,
        sample=sample,
        key=(0, 1, group, sample),
        prompt_tokens=tuple(prompt),
        tokens=tuple(tokens),
        logprobs=np.asarray([-1.0] * n if logprobs is None else logprobs, np.float32),
        versions=np.full(n, version, np.int32),
        temperature=1.0,
        finish="stop",
        stop_token=True,
        rewards={"correct": reward},
        valid=valid,
    )


def group_of(*rollouts, index=0):
    tokens = rollouts[0].prompt_tokens
    return RolloutGroup(Prompt(index, "math", tokens, "2 + 3 =", {"reward": "math", "answer": "5"}), tuple(rollouts))


def random_groups(vocab_size, *, groups=3, samples=4, longest=9, seed=0, version=0):
    """Groups of random responses of 1 to `longest` tokens with rewards 0 and 1; the last group has no spread."""
    random = np.random.default_rng(seed)
    made = []
    for g in range(groups):
        prompt = random.integers(0, vocab_size, random.integers(1, 5)).tolist()
        lengths = random.integers(1, longest + 1, samples)
        rewards = [float(i % 2) for i in range(samples)] if g < groups - 1 else [1.0] * samples
        made.append(
            group_of(
                *(
                    rollout(
                        random.integers(0, vocab_size, n).tolist(),
                        reward,
                        prompt=prompt,
                        logprobs=-4 * random.random(n),
                        version=version,
                        group=g,
                        sample=i,
                    )
                    for i, (n, reward) in enumerate(zip(lengths, rewards, strict=True))
                ),
                index=g,
            )
        )
    return made
