"""Shapings: pure functions from scores to weights, chained like optax transforms.

A shaping maps ``(values, valid, groups)`` to weights ``[population, tasks]``, by which the
estimator multiplies each member's noise. Three terms recur:

* a *task* is a column of ``values``; scores ``[population]`` are one task;
* a *group* is the set of cells of one task whose members have the same id in ``groups``. Without
  ``groups`` the whole column is one group (every member answers every prompt, one prompt a column).
  With ``groups``, scores ``[population]`` split into the members with the same prompt;
* the *batch* is the set of all cells.

All shapings have these properties:

* statistics are over valid cells only, and invalid cells get weight 0;
* weights are finite, and zero if no cell is valid;
* scores whose range is within two machine epsilons of the largest magnitude count as equal for
  means and deviations: they are centred to exactly zero and are not divided. Ranks and signs
  compare exactly;
* weights are float32, or float64 for float64 scores; variances have ddof 0;
* sums over groups are a fixed tree over sorted members and not a scatter-add: a GPU does not
  guarantee the order of additions in a scatter-add.

A constant that is added to a group has no effect on an evolution strategy, since it cancels within
each pair. Centring therefore removes noise and no signal; scaling and ranking change the direction.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Integer, Shaped

from eggroll.shaping._moments import (
    SHRINK,
    differs_from_previous,
    divide,
    moments,
    over,
    over_batch,
    over_task,
    run_bounds,
)

Shaping = Callable[
    [
        Float[Array, "population tasks"],
        Bool[Array, "population tasks"],
        Int[Array, "population"] | None,
    ],
    Float[Array, "population tasks"],
]


def identity() -> Shaping:
    """The scores as weights; the same as ``shaping=None``.

    Returns:
      A shaping that sets invalid cells to 0 and changes nothing else.

    Example:
      >>> import jax.numpy as jnp
      >>> identity()(jnp.array([[2.0], [3.0]]), jnp.array([[True], [False]]), None).tolist()
      [[2.0], [0.0]]
    """
    return _Rule(_identity)


def zscore(eps: float = 0.0) -> Shaping:
    """``(R - mean) / sqrt(var + eps)``: the z-score of each task over the whole population.

    The paper (arXiv 2511.16652) takes the z-score of one score a member over all members. With
    several tasks, each task has its own mean and variance, so that a task with a wide range of
    scores does not dominate the others. ``groups`` is ignored. Numerical safety does not need
    ``eps``. A positive ``eps`` damps a population whose scores hardly differ, and makes the weights
    depend on the unit of the scores.

    Args:
      eps: added to the variance; at least 0.

    Returns:
      A shaping whose columns have mean 0 and, for ``eps=0``, variance 1 (or are all 0).

    Raises:
      ValueError: ``eps`` is negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = jnp.array([[1.0], [3.0], [1.0], [3.0]])
      >>> zscore()(scores, jnp.ones((4, 1), bool), None)[:, 0].tolist()
      [-1.0, 1.0, -1.0, 1.0]
    """
    return _Rule(_zscore, (("eps", _checked_eps("zscore", eps)),))


def centered_rank() -> Shaping:
    """Ranks within the group, evenly spaced over [-0.5, 0.5]; equal scores share a mean rank.

    The worst valid score of a group gets -0.5, the best 0.5; a single score gets 0. The weights
    depend on the order of the scores alone, and not on outliers or units.

    Returns:
      A shaping with cost O(n log n) in the population.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = jnp.array([[5.0], [-1.0], [5.0], [900.0], [0.0]])
      >>> centered_rank()(scores, jnp.ones((5, 1), bool), None)[:, 0].tolist()
      [0.125, -0.5, 0.125, 0.5, -0.25]
    """
    return _Rule(_centered_rank)


def center(by: str = "task") -> Shaping:
    """Subtracts a mean.

    Args:
      by: the set of scores that the mean is over. ``"task"``: the scores of the task; ``"group"``:
        the scores of the group; ``"population"``: all scores of all members.

    Returns:
      A shaping. Differences are clipped to the range of finite floats.

    Raises:
      ValueError: ``by`` is another string.

    Example:
      >>> import jax.numpy as jnp
      >>> scores, valid = jnp.array([[1.0, 5.0], [3.0, 7.0]]), jnp.ones((2, 2), bool)
      >>> center("task")(scores, valid, None).tolist()
      [[-1.0, -1.0], [1.0, 1.0]]
      >>> center("population")(scores, valid, None).tolist()
      [[-3.0, 1.0], [-1.0, 3.0]]
    """
    _check_option("center", "by", by, ("task", "group", "population"))
    return _Rule(_center, (("by", by),))


def scale(by: str = "batch", eps: float = 1e-5) -> Shaping:
    """Divides by a standard deviation, ``R / sqrt(var + eps)``, and subtracts nothing.

    The deviation is over the input of this shaping: after ``center("group")`` it is the spread
    within groups, which is smaller than the spread of the raw scores if the means of the groups
    differ. :func:`per_task` centres by the group and divides by the deviation of the raw scores.

    Args:
      by: the set of scores that the deviation is over. ``"none"``: no division; ``"group"``: the
        scores of the group; ``"batch"``: all scores of all members.
      eps: added to the variance; at least 0. The default is the same as for :func:`per_task`.

    Returns:
      A shaping. Scores without spread become 0 unless ``by`` is ``"none"``.

    Raises:
      ValueError: ``by`` is another string, or ``eps`` is negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> scale(eps=0.0)(jnp.array([[4.0], [8.0]]), jnp.ones((2, 1), bool), None).tolist()
      [[2.0], [4.0]]
    """
    _check_option("scale", "by", by, _SCALES)
    return _Rule(
        _scale,
        (
            ("by", by),
            ("eps", _checked_eps("scale", eps)),
        ),
    )


def per_task(scale: str = "batch", eps: float = 1e-5) -> Shaping:
    """``(R - group mean) / sqrt(var + eps)``: the shaping of arXiv 2511.16652 for prompts.

    Args:
      scale: the set of raw scores that the variance is over. ``"batch"``: all scores of all
        members, as in the paper; ``"group"``: the scores of the group, which gives GRPO's advantage
        (arXiv 2402.03300) with ddof 0 and ``eps`` inside the root; ``"none"``: no division, as in
        Dr. GRPO.
      eps: added to the variance; at least 0. The default is from the paper's public code.

    Returns:
      A shaping.

    Raises:
      ValueError: ``scale`` is another string, or ``eps`` is negative or not finite.

    Example:
      Two prompts and four members; a correct answer to the first, harder prompt weighs more.

      >>> import jax.numpy as jnp
      >>> correct = jnp.array([[1, 0, 0, 0], [1, 1, 1, 0]]).T
      >>> weights = per_task()(correct, jnp.ones((4, 2), bool), None)
      >>> print(weights.T.round(5))
      [[ 1.49997 -0.49999 -0.49999 -0.49999]
       [ 0.49999  0.49999  0.49999 -1.49997]]
    """
    _check_option("per_task", "scale", scale, _SCALES)
    return _Rule(
        _per_task,
        (
            ("scale", scale),
            ("eps", _checked_eps("per_task", eps)),
        ),
    )


def pair_sign() -> Shaping:
    """The better member of each pair gets +1/2, the other -1/2; both get 0 in a tie.

    Members ``2p`` and ``2p + 1`` have opposite noise, so the weight of the pair's noise is the
    difference of the two: -1, 0 or 1. Integer training (arXiv 2511.16652) uses these weights. A
    pair with an invalid member gets 0. ``groups`` is ignored.

    Returns:
      A shaping.

    Raises:
      ValueError: (when called) the population is odd.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = jnp.array([[3.0], [7.0], [2.0], [2.0]])
      >>> pair_sign()(scores, jnp.ones((4, 1), bool), None)[:, 0].tolist()
      [-0.5, 0.5, 0.0, 0.0]
    """
    return _Rule(_pair_sign)


def chain(*shapings: Shaping) -> Shaping:
    """Applies shapings one after another, the first argument first.

    Args:
      *shapings: shapings of this module, or any functions of the same type. A cell whose score is
        not finite is invalid for all of them.

    Returns:
      A shaping; without arguments it is :func:`identity`.

    Raises:
      ValueError: an argument is a function of this module that makes a shaping (``zscore`` instead
        of ``zscore()``).

    Example:
      >>> import jax.numpy as jnp
      >>> clipped = chain(zscore(), lambda values, valid, groups: jnp.clip(values, -1, 1))
      >>> scores = jnp.array([[0.0], [0.0], [0.0], [9.0]])
      >>> clipped(scores, jnp.ones((4, 1), bool), None)[:, 0].round(3)
      Array([-0.577, -0.577, -0.577,  1.   ], dtype=float32)
    """
    for shaping in shapings:
        if shaping in (identity, zscore, centered_rank, center, scale, per_task, pair_sign, chain):
            name = shaping.__name__
            raise ValueError(f"chain: expected a shaping such as {name}(), got the function {name}")
    return _Rule(_chain, (("shapings", shapings),))


@dataclasses.dataclass(frozen=True)
class _Rule:
    """A rule with its options, compared by value: ``zscore() == zscore()``.

    Strategies with equal settings then have equal static arguments, and nothing compiles twice.
    """

    rule: Callable[..., Array]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(
        self,
        values: Shaped[Array, "population tasks"],
        valid: Bool[Array, "population tasks"],
        groups: Integer[Array, "population"] | None = None,
    ) -> Float[Array, "population tasks"]:
        scores = values.astype(jnp.float64 if values.dtype == jnp.float64 else jnp.float32)
        valid = valid & jnp.isfinite(scores)
        scores = jnp.where(valid, scores, 0)
        return jnp.where(valid, self.rule(scores, valid, groups, **dict(self.options)), 0)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options)
        return f"{self.rule.__name__.removeprefix('_')}({options})"


# The rules take scores and valid [population, tasks] and groups [population] or None. Scores are 0
# where they are invalid, and finite elsewhere.


def _identity(scores: Array, valid: Array, groups: Array | None) -> Array:
    return scores


def _zscore(scores: Array, valid: Array, groups: Array | None, *, eps: float) -> Array:
    deviation, std = moments(scores, valid, over_task)
    return divide(deviation, std, eps)


def _center(scores: Array, valid: Array, groups: Array | None, *, by: str) -> Array:
    deviation, _ = moments(scores, valid, over(by, groups))
    largest = jnp.finfo(scores.dtype).max
    return jnp.clip(SHRINK * deviation, -largest, largest)


def _scale(scores: Array, valid: Array, groups: Array | None, *, by: str, eps: float) -> Array:
    if by == "none":
        return scores
    _, std = moments(scores, valid, over(by, groups))
    return divide(scores / SHRINK, std, eps)


def _per_task(
    scores: Array, valid: Array, groups: Array | None, *, scale: str, eps: float
) -> Array:
    if scale == "none":
        return _center(scores, valid, groups, by="group")
    deviation, group_std = moments(scores, valid, over("group", groups))
    if scale == "group":
        return divide(deviation, group_std, eps)
    _, std = moments(scores, valid, over_batch)
    return divide(deviation, std, eps)


def _pair_sign(scores: Array, valid: Array, groups: Array | None) -> Array:
    population, tasks = scores.shape
    if population % 2:
        raise ValueError(
            f"pair_sign: expected an even population, with pairs (2p, 2p + 1), got {population}"
        )
    pairs = scores.reshape(population // 2, 2, tasks)
    other = pairs[:, ::-1]
    both = valid.reshape(pairs.shape).all(axis=1, keepdims=True)
    # Scores are compared and not subtracted, since a difference may underflow or overflow.
    ahead = (pairs > other).astype(scores.dtype) - (pairs < other).astype(scores.dtype)
    return jnp.where(both, ahead / 2, 0).reshape(scores.shape)


def _chain(
    scores: Array, valid: Array, groups: Array | None, *, shapings: tuple[Shaping, ...]
) -> Array:
    for shaping in shapings:
        scores = shaping(scores, valid, groups)
    return scores


def _centered_rank(scores: Array, valid: Array, groups: Array | None) -> Array:
    ids = jnp.zeros(scores.shape[0], jnp.int32) if groups is None else groups
    keys = jnp.where(valid, scores, jnp.inf)
    return jax.vmap(_column_rank, in_axes=(1, None), out_axes=1)(keys, ids)


def _column_rank(
    keys: Float[Array, "population"], ids: Integer[Array, "population"]
) -> Float[Array, "population"]:
    """The centred rank of each key among the finite keys with the same id."""
    ids, ordered, order = lax.sort((ids, keys, jnp.arange(keys.size)), num_keys=2)
    new_group = differs_from_previous(ids)
    group_first, group_end = run_bounds(new_group)
    first, end = run_bounds(new_group | differs_from_previous(ordered))
    below = first - group_first
    up_to = end - group_first
    # Invalid keys are inf, so they are last in their group.
    finite = jnp.isfinite(ordered)
    counted = jnp.cumsum(finite, dtype=jnp.int32)
    count = counted[group_end - 1] - counted[group_first] + finite[group_first].astype(jnp.int32)
    # Equal keys have the ranks below, ..., up_to - 1; this is their mean over count - 1, minus 1/2.
    steps = (2 * jnp.maximum(count - 1, 1)).astype(keys.dtype)
    rank = (below + up_to - count).astype(keys.dtype) / steps
    return jnp.zeros_like(keys).at[order].set(rank, unique_indices=True)


_SCALES = ("none", "group", "batch")


def _check_option(function: str, field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        names = ", ".join(map(repr, allowed[:-1])) + f" or {allowed[-1]!r}"
        raise ValueError(f"{function}: {field}={value!r}: must be {names}")


def _checked_eps(function: str, eps: float) -> float:
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{function}: eps={eps!r}: must be a finite number of at least 0")
    return float(eps)
