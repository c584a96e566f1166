"""What a population's answers at several sigmas say of the sigma to take. Arrays only: nothing is written
or run here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from experiments.reasoning.diagnostics import Texts, identical_pairs, known_mean

# What a sigma must keep, to be taken: fewer identical pairs than this,
IDENTICAL = 0.5
# a share of answers that ended that is at most so much below that of the smallest sigma,
ENDED = 0.05
# and so much of the reward of the model without noise.
KEPT = 0.8
# Share of answers that another reward takes for right while the reward of training takes none.
OTHERWISE_RIGHT = 0.2


class Probed(NamedTuple):
    """What a population answered at one sigma.

    Attributes:
        sigma: of the noise; 0 of the model itself, which has no pairs.
        identical: share of pairs and questions on which both members wrote the same.
        correlation: of the rewards of a pair's two members; NaN where all rewards are equal.
        spread: standard deviation of the members' mean rewards (ddof 1).
        no_signal: chance that the two members of a pair have the same reward for a batch.
        ended: share of answers that ended by themselves.
        reward: the mean reward.
        best: the largest reward; NaN where none is known.
        rewards: means of other rewards of the same answers, by their names.
        seconds: that the answers took; None where programs were compiled meanwhile.
    """

    sigma: float
    identical: float
    correlation: float
    spread: float
    no_signal: float
    ended: float
    reward: float
    best: float
    rewards: Mapping[str, float]
    seconds: float | None


def probed(
    sigma: float,
    rewards: Float[np.ndarray, "population prompts"],
    texts: Texts,
    ended: Bool[np.ndarray, "population prompts"],
    others: Mapping[str, Float[np.ndarray, "population prompts"]],
    seconds: float | None = None,
) -> Probed:
    """The numbers of one sigma.

    Args:
        sigma: of the noise.
        rewards: NaN for those that are not known; members 2p and 2p + 1 are a pair, one member is the model.
        texts: what was written.
        ended: whether each answer ended by itself.
        others: further rewards of the same answers, by their names.
        seconds: that the answers took.

    Example:
        >>> rewards = np.array([[1.0, 0.0], [0.0, 0.0]])
        >>> found = probed(0.1, rewards, [["4", "5"], ["3", "5"]], rewards == 1, {})
        >>> found.identical, found.reward, round(found.spread, 3)
        (0.5, 0.25, 0.354)
    """
    pairs = len(rewards) > 1
    correlation = pair_correlation(rewards) if pairs else math.nan
    known = rewards[~np.isnan(rewards)]
    means = np.array([known_mean(own) for own in rewards])
    means = means[~np.isnan(means)]
    return Probed(
        sigma=sigma,
        identical=identical_pairs(texts) if pairs else math.nan,
        correlation=correlation,
        spread=float(means.std(ddof=1)) if len(means) > 1 else math.nan,
        no_signal=no_signal_chance(known, correlation, rewards.shape[1]) if pairs else math.nan,
        ended=known_mean(ended),
        reward=known_mean(rewards),
        best=float(known.max()) if known.size else math.nan,
        rewards={name: known_mean(values) for name, values in others.items()},
        seconds=seconds,
    )


def pair_correlation(rewards: Float[np.ndarray, "population prompts"]) -> float:
    """The correlation of the rewards of two members of a pair, over all pairs and questions.

    Neither member comes first, so both have one mean and one variance. NaN where all rewards are equal.

    Example:
        >>> pair_correlation(np.array([[1.0, 0.0], [0.0, 1.0]]))
        -1.0
    """
    both = np.stack([rewards[::2].ravel(), rewards[1::2].ravel()]).astype(np.float64)
    both = both[:, ~np.isnan(both).any(0)]
    if not both.size or both.min() == both.max():
        return math.nan
    apart = both - both.mean()
    return float((apart[0] * apart[1]).mean() / (apart**2).mean())


def no_signal_chance(
    rewards: Float[np.ndarray, "known"], correlation: float, prompts: int
) -> float:
    """The chance that a pair learns nothing from a batch, since both members have the same reward for it.

    About 1 / sqrt(4 pi B p (1 - p) (1 - rho)) for B questions of which a share p is answered right, and the
    correlation rho. The variance is that of the rewards in units of their range, p (1 - p) for rewards 0
    and 1.

    Example:
        >>> round(no_signal_chance(np.array([0.0, 1.0]), 0.0, 64), 4) == round(1 / (64 * np.pi) ** 0.5, 4)
        True
    """
    if math.isnan(correlation) or correlation >= 1:
        return 1.0
    variance = float(np.var(rewards)) / float(np.ptp(rewards)) ** 2
    return min(1.0, 1 / math.sqrt(4 * math.pi * prompts * variance * (1 - correlation)))


class Choice(NamedTuple):
    """The sigma to take.

    Attributes:
        sigma: the sigma to take; None if none will do.
        why: the reason, without a full stop; if sigma is None, also what to change.
    """

    sigma: float | None
    why: str


def choose(
    base: Probed, tried: Sequence[Probed], reward: str = "the reward", relative: bool = False
) -> Choice:
    """The sigma whose members' rewards differ most, among those that leave the model what it can.

    Args:
        base: the model without noise.
        tried: what a population answered, by rising sigma.
        reward: its name, for sentences.
        relative: whether sigma is relative to each matrix.
    """
    everything = [base, *tried]
    if not any(one.best > 0 for one in everything):
        return Choice(None, _without_reward(everything, reward))
    differing = [one for one in tried if one.identical < IDENTICAL]
    if not differing:
        last = tried[-1]
        return Choice(
            None,
            f"at {last.sigma:g} still {last.identical:.0%} of pairs write the same: raise --sigma, to "
            f"{8 * last.sigma:g} for another look",
        )
    if all(one.reward >= one.best for one in everything):
        return Choice(
            None, "every answer has the largest reward already: choose harder questions (--task)"
        )
    least = KEPT * base.reward if base.reward > 0 else -math.inf
    kept = [
        one
        for one in differing
        if one.ended >= tried[0].ended - ENDED and one.reward >= least and one.spread > 0
    ]
    if not kept:
        first = differing[0]
        return Choice(
            None,
            f"where pairs differ, from {first.sigma:g} on, the model has lost what it can (reward "
            f"{first.reward:.3g} of {base.reward:.3g}, ended {first.ended:.0%} of {tried[0].ended:.0%}): "
            f"{_smaller(first, tried)}, {'' if relative else '--sigma-scale rms, '}or --only some matrices",
        )
    best = max(kept, key=lambda one: one.spread)
    return Choice(
        best.sigma,
        f"{best.identical:.0%} of pairs write the same, {best.ended:.0%} of answers end, the reward is "
        f"{best.reward:.3g} (without noise {base.reward:.3g}), and of the sigmas that leave as much the "
        f"members' means spread most ({best.spread:.3g})",
    )


def _smaller(first: Probed, tried: Sequence[Probed]) -> str:
    """What to try below the first sigma at which pairs differ."""
    below = [one.sigma for one in tried if one.sigma < first.sigma]
    if below:
        return f"try --probe-sigmas between {below[-1]:g} and {first.sigma:g}"
    return f"try a smaller --sigma, such as {first.sigma / 8:.3g}"


def _without_reward(everything: Sequence[Probed], reward: str) -> str:
    means = {
        name: max(one.rewards[name] for one in everything if not math.isnan(one.rewards[name]))
        for name in everything[0].rewards
        # A form is no answer.
        if name != "format" and not all(math.isnan(one.rewards[name]) for one in everything)
    }
    name = max(means, key=lambda name: means[name], default=None)
    if name is not None and means[name] > OTHERWISE_RIGHT:
        return (
            f"{reward} takes every answer for wrong, although {name} gives {means[name]:.0%} on the same "
            f"answers: choose --reward {name}"
        )
    if not any(one.ended > 0 for one in everything):
        return (
            "no answer ended, and none is right: raise --max-new-tokens, or let answers end (--chat for a "
            "model that knows its template, --stop for a text behind every answer)"
        )
    return (
        f"{reward} takes every answer for wrong, as every other reward does nearly: choose easier questions "
        "(--task, --task-settings), a model that can answer some, or --start from one that learned to"
    )


def learning_rate(sigma: float, population: int) -> float:
    """The rate of SGD that moves weights by about sigma an update, to three digits.

    Example:
        >>> learning_rate(0.01, 64)
        0.0008
    """
    return float(f"{sigma**2 * math.sqrt(population):.3g}")


def ladder(sigma: float) -> tuple[float, ...]:
    """Five sigmas around one.

    Example:
        >>> ladder(0.01)
        (0.0025, 0.005, 0.01, 0.02, 0.04)
    """
    return tuple(float(f"{factor * sigma:.4g}") for factor in (0.25, 0.5, 1, 2, 4))


def table(base: Probed, tried: Sequence[Probed]) -> str:
    """The numbers, a column for each sigma, 80 characters wide at most.

    Example:
        >>> rewards = np.array([[1.0, 0.0], [0.0, 0.0]])
        >>> one = probed(0.1, rewards, [["4", "5"], ["3", "5"]], rewards == 1, {"exact": rewards}, 2.0)
        >>> print(table(one._replace(sigma=0.0, identical=math.nan), [one]))
        sigma                         0     0.1
        identical pairs               -     50%
        correlation in a pair     -0.33   -0.33
        spread of members         0.354   0.354
        chance of no signal         40%     40%
        answers that ended          25%     25%
        mean reward               0.250   0.250
          exact                   0.250   0.250
        seconds a generation          2       2
    """
    columns = [base, *tried]
    rows: list[tuple[str, list[float | None], str]] = [
        ("identical pairs", [one.identical for one in columns], ".0%"),
        ("correlation in a pair", [one.correlation for one in columns], ".2f"),
        ("spread of members", [one.spread for one in columns], ".3f"),
        ("chance of no signal", [one.no_signal for one in columns], ".0%"),
        ("answers that ended", [one.ended for one in columns], ".0%"),
        ("mean reward", [one.reward for one in columns], ".3f"),
    ]
    rows += [(f"  {name}", [one.rewards[name] for one in columns], ".3f") for name in base.rewards]
    rows.append(("seconds a generation", [one.seconds for one in columns], ".3g"))
    head = "".join(f"{_short(one.sigma):>8}" for one in columns)
    lines = [f"{'sigma':<23}{head}"]
    for name, values, form in rows:
        cells = ("-" if x is None or math.isnan(x) else format(x, form) for x in values)
        lines.append(f"{name:<23}" + "".join(f"{cell:>8}" for cell in cells))
    return "\n".join(lines)


def _short(sigma: float) -> str:
    """A number in seven characters."""
    return next(
        text for digits in (4, 3, 2, 1) if len(text := f"{sigma:.{digits}g}") <= 7 or digits == 1
    )
