"""How per-token losses become one number: a weight per token for each sample, known before any backward pass.

The loss of an update is the sum over samples i and their tokens t of weight_i * l_it. Denominators count the samples
that are in the loss, over all ranks and micro-batches, so no layout and no split changes a weight. A group without
spread is in the loss (its policy term is 0, its KL term is not) and counts in every denominator below; with
`rl.drop_zero_spread` it is in neither. Invalid samples (verifier time-out or crash) and empty responses never are.
"""

# G groups that have a token in the loss, |o_i| tokens of sample i, the stop token included

from collections.abc import Callable, Sequence

Lengths = Sequence[Sequence[int]]  # |o_i| by group; 0: not in the loss
Weights = list[list[float]]  # of each token of sample i, by group


def group_total(lengths: Lengths, longest: int = 0) -> Weights:
    """1/G sum_g [ sum_{i in g} sum_t l_it / sum_{i in g} |o_i| ]: each group counts the same, whatever its length.

    PRISM's "normalised by total group tokens" (arXiv 2603.17074, appendix D); DAPO's token-level loss applied to one
    group at a time, as in open-instruct.
    """
    totals = [sum(group) for group in lengths]
    counting = sum(total > 0 for total in totals)
    return [
        [1.0 / (counting * total) if n else 0.0 for n in group] for group, total in zip(lengths, totals, strict=True)
    ]


def token_mean(lengths: Lengths, longest: int = 0) -> Weights:
    """sum_i sum_t l_it / sum_i |o_i|: each token counts the same. Source: DAPO, arXiv 2503.14476, equation 8."""
    total = sum(n for group in lengths for n in group)
    return [[1.0 / total if n else 0.0 for n in group] for group in lengths]


def sequence_mean(lengths: Lengths, longest: int = 0) -> Weights:
    """1/N sum_i [ sum_t l_it / |o_i| ]: each of the N samples counts the same. GRPO, arXiv 2402.03300, eq. 3."""
    samples = sum(n > 0 for group in lengths for n in group)
    return [[1.0 / (samples * n) if n else 0.0 for n in group] for group in lengths]


def constant(lengths: Lengths, longest: int = 0) -> Weights:
    """1/N sum_i [ sum_t l_it ] / longest, the tokens that a response may have: no length changes a token's weight.

    Source: Dr. GRPO, arXiv 2503.20783, §3.2.
    """
    samples = sum(n > 0 for group in lengths for n in group)
    return [[1.0 / (samples * longest) if n else 0.0 for n in group] for group in lengths]


AGGREGATIONS: dict[str, Callable[[Lengths, int], Weights]] = {
    "group_total": group_total,
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant": constant,
}
