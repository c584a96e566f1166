"""What groups of samples of one question are worth: pass@k, majority votes, advantages."""

import math
from collections import Counter
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer


def pass_at_k(
    correct: Integer[Array | np.ndarray, "*batch"], samples: int, k: int
) -> Float[Array, "*batch"]:
    """Chance that one at least of k samples is right, without bias from n: ``1 - C(n-c, k) / C(n, k)``.

    Chen et al., arXiv 2107.03374.

    Args:
        correct: c, how many of the samples of each question are right.
        samples: n, how many there are.
        k: how many are drawn, at most n.

    Raises:
        ValueError: where k is not from 1 to n.

    Example:
        >>> print(pass_at_k(np.array([0, 1, 2, 4]), samples=4, k=2))
        [0.        0.5       0.8333333 1.       ]
    """
    _check(samples, k)
    # Whole numbers of any size, so that nothing overflows.
    total = math.comb(samples, k)
    table = [1 - math.comb(samples - c, k) / total for c in range(samples + 1)]
    return jnp.asarray(table, jnp.float32)[correct]


def max_at_k(
    rewards: Float[Array | np.ndarray, "*batch samples"], k: int
) -> Float[Array, "*batch"]:
    """Mean over all groups of k samples of the best reward in each: pass@k as a fitness.

    Of rewards that are 0 or 1, this is :func:`pass_at_k`. A NaN makes its question NaN.

    Args:
        rewards: of the samples that one member wrote for each question.
        k: how many are in a group.

    Raises:
        ValueError: where k is not from 1 to the number of samples.

    Example:
        The best of the pairs are 2, 3, 3.

        >>> print(max_at_k(np.array([1.0, 3.0, 2.0]), k=2))
        2.6666667
    """
    samples = rewards.shape[-1]
    _check(samples, k)
    # The i-th smallest, from 0, is the best of as many groups as k - 1 others below it can be chosen.
    total = math.comb(samples, k)
    weights = np.array([math.comb(i, k - 1) / total for i in range(samples)], np.float32)
    return jnp.sort(rewards, axis=-1) @ weights


def _check(samples: int, k: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to the {samples} samples, got {k}")


def majority_at_k(
    answers: Sequence[str | None], correct: Sequence[bool], k: int | None = None
) -> float:
    """1 where the answer that most of the first k samples give is right, else 0.

    Args:
        answers: of the samples; None has no vote.
        correct: whether each is right.
        k: all of them by default.

    Returns:
        Of answers with as many votes the first counts; without any votes 0.

    Raises:
        ValueError: where k is not from 1 to the number of samples.

    Example:
        >>> majority_at_k(["5", "7", "7", None], [False, True, True, False])
        1.0
        >>> majority_at_k(["5", "7"], [False, True])
        0.0
    """
    k = len(answers) if k is None else k
    _check(len(answers), k)
    # A Counter keeps the order in which it met them, and most_common keeps that among equals.
    votes = Counter(answer for answer in answers[:k] if answer is not None)
    if not votes:
        return 0.0
    return float(correct[answers.index(votes.most_common(1)[0][0])])


def of_samples(
    answers: Sequence[Sequence[str]], correct: Bool[np.ndarray, "questions samples"]
) -> dict[str, list[float]]:
    """pass@k, for each power of two k, and the majority of all samples, a number for each question.

    Args:
        answers: of the samples of each question.
        correct: whether each is right.

    Example:
        >>> of_samples([["5", "7"], ["3", "4"]], np.array([[False, True], [False, False]]))
        {'pass@1 of 2 samples': [0.5, 0.0], 'pass@2 of 2 samples': [1.0, 0.0], 'majority@2': [0.0, 0.0]}
    """
    samples = correct.shape[1]
    found = {}
    for k in (2**i for i in range(samples.bit_length())):
        passed = pass_at_k(correct.sum(1), samples, k)
        found[f"pass@{k} of {samples} samples"] = np.asarray(passed).tolist()
    rows = zip(answers, correct.tolist(), strict=True)
    found[f"majority@{samples}"] = [majority_at_k(said, right) for said, right in rows]
    return found


# ---------------------------------------------------------------- advantages


def grpo(
    rewards: Float[Array | np.ndarray, "*batch group"], eps: float = 1e-6
) -> Float[Array, "*batch group"]:
    """``(R - mean R) / (std R + eps)`` in each group, the deviation with ddof 1.

    Here and below NaN stands for a sample that cannot be told: it gets 0 and has no part in its group's
    statistics. Groups with fewer than two others are 0.

    Shao et al., DeepSeekMath, arXiv 2402.03300.

    Args:
        rewards: of the samples of each question.
        eps: added to the deviation.

    Example:
        >>> print(np.round(np.float64(grpo(np.array([1.0, 0, 0, 1, 0, 0, 0, 0]))[:2]), 4))
        [ 1.6202 -0.5401]
    """
    centred, count = _centred(rewards)
    variance = (centred**2).sum(-1, keepdims=True) / jnp.maximum(count - 1, 1)
    return centred / (jnp.sqrt(variance) + eps)


def dr_grpo(
    rewards: Float[Array | np.ndarray, "*batch group"],
) -> Float[Array, "*batch group"]:
    """``R - mean R`` in each group.

    Liu et al., arXiv 2503.20783.

    Example:
        >>> print(dr_grpo(np.array([1.0, 0, 0, 1])))
        [ 0.5 -0.5 -0.5  0.5]
    """
    return _centred(rewards)[0]


def rloo(rewards: Float[Array | np.ndarray, "*batch group"]) -> Float[Array, "*batch group"]:
    """Each reward less the mean of the others in its group: ``R - (sum R - R) / (G - 1)``.

    Ahmadian et al., arXiv 2402.14740.

    Example:
        >>> print(rloo(np.array([1.0, 0, 0, 1, 0])))
        [ 0.75 -0.5  -0.5   0.75 -0.5 ]
    """
    # The same as R - mean R, times G / (G - 1).
    centred, count = _centred(rewards)
    return centred * count / jnp.maximum(count - 1, 1)


ADVANTAGES = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}


def _centred(rewards: Float[Array | np.ndarray, "*batch group"]) -> tuple[Array, Array]:
    """(R - mean R with 0 for NaN, how many are none) in each group."""
    valid = ~jnp.isnan(rewards)
    count = valid.sum(-1, keepdims=True)
    # From the lowest on: equal rewards are then exactly 0, whatever their sum would be rounded to.
    lowest = jnp.where(valid, rewards, jnp.inf).min(-1, keepdims=True)
    above = jnp.where(valid, rewards - lowest, 0)
    mean = above.sum(-1, keepdims=True) / jnp.maximum(count, 1)
    return jnp.where(valid, above - mean, 0), count
