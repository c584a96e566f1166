r"""Convex functions for :func:`optim.lion_k`, each with the constrained problem that it solves.

With :math:`\mathcal K` and weight decay :math:`\lambda`, Lion-K minimises
:math:`f(x) + \mathcal K^*(\lambda x)/\lambda` (Chen, Liu, Liang and Liu, arXiv 2310.05898): where the
conjugate is the indicator of a set, f on that set; where it is finite inside, f with a penalty.
All of them are even, so that the sign convention of the momentum does not matter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Tensor = Float[Array, "..."]


class Kappa(NamedTuple):
    """A convex, even function of one array, with what Lion-K and its diagnostics need.

    One's own: ``Kappa(value, subgradient, conjugate, distance, problem)``.

    Attributes:
      value: array -> scalar.
      subgradient: array -> array, any element of the subdifferential.
      conjugate: array -> scalar, inf outside of its domain.
      distance: array -> scalar, the Euclidean distance to the domain of the conjugate (its closure).
      problem: what is solved, with x the parameters, wd the weight decay.
    """

    value: Callable[[Tensor], Tensor]
    subgradient: Callable[[Tensor], Tensor]
    conjugate: Callable[[Tensor], Tensor]
    distance: Callable[[Tensor], Tensor]
    problem: str


# A point on the boundary of a domain is inside; rounding must not put it out.
TOLERANCE = 1e-6


def _inside(norm: Tensor, finite: Tensor | float = 0.0) -> Tensor:
    return jnp.where(norm <= 1 + TOLERANCE, finite, jnp.inf)


def _beyond_box(y: Tensor) -> Tensor:
    return jnp.linalg.norm(jnp.maximum(jnp.abs(y) - 1, 0).ravel())


def _largest(z: Tensor) -> Tensor:
    return jnp.max(jnp.abs(z), initial=0.0)


def _gathered(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that needs all of an array, for arrays whose type says how they are sharded too: it gets
    the whole array on each device, and its answer is laid out as the argument was."""

    def of(z: Tensor) -> Tensor:
        spec = jax.typeof(z).sharding.spec
        if all(axis is None for axis in spec):
            return function(z)
        whole = jax.sharding.reshard(z, jax.P(*[None] * z.ndim))
        return jax.sharding.reshard(function(whole), spec)

    return of


def l1() -> Kappa:
    """The sum of absolute values: Lion itself.

    Example:
      >>> import jax.numpy as jnp
      >>> l1().subgradient(jnp.array([-2.0, 0.0, 0.5])).tolist()
      [-1.0, 0.0, 1.0]
    """
    return Kappa(
        value=lambda z: jnp.abs(z).sum(),
        subgradient=jnp.sign,
        conjugate=lambda y: _inside(_largest(y)),
        distance=_beyond_box,
        problem="minimise f subject to max |x| <= 1/wd",
    )


def lp(p: float) -> Kappa:
    """The p-norm, p > 1, of each leaf; the step is normalised, 0 where the momentum is 0."""
    if not p > 1:
        raise ValueError(f"p={p}: a number above 1 is right; l1() is the case of 1")
    q = p / (p - 1)

    def norm(z: Tensor, p: float) -> Tensor:
        # Scaled by the largest entry, so that no power over- or underflows.
        top = _largest(z)
        scaled = jnp.abs(z) / jnp.where(top > 0, top, 1)
        return top * jnp.sum(scaled**p) ** (1 / p)

    def subgradient(z: Tensor) -> Tensor:
        size = norm(z, p)
        return jnp.sign(z) * (jnp.abs(z) / jnp.where(size > 0, size, 1)) ** (p - 1)

    def distance(y: Tensor) -> Tensor:
        if p == 2:
            return jnp.maximum(jnp.linalg.norm(y.ravel()) - 1, 0)
        return _distance_to_ball(y, q, lambda x: norm(x, q))

    return Kappa(
        value=lambda z: norm(z, p),
        subgradient=subgradient,
        conjugate=lambda y: _inside(norm(y, q)),
        distance=distance,
        problem=f"minimise f subject to the {q:g}-norm of x <= 1/wd",
    )


def _distance_to_ball(y: Tensor, q: float, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """The distance to the unit ball of the q-norm, by bisection on the multiplier of the projection.

    The projection x of y solves ``x + t q x^(q-1) = |y|`` in each entry, for the t at which its norm
    is 1; both equations are monotone, and 60 halvings of each use up the digits of float64.
    """
    target = jnp.abs(y)

    def entry(t: Tensor) -> Tensor:
        def halve(_: Any, ends: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            low, high = ends
            x = (low + high) / 2
            over = x + t * q * x ** (q - 1) > target
            return jnp.where(over, low, x), jnp.where(over, x, high)

        low, high = jax.lax.fori_loop(0, 60, halve, (jnp.zeros_like(target), target))
        return (low + high) / 2

    def halve(_: Any, ends: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        low, high = ends
        t = (low + high) / 2
        outside = norm(entry(t)) > 1
        return jnp.where(outside, t, low), jnp.where(outside, high, t)

    start = (jnp.zeros((), y.dtype), jnp.asarray(norm(y) * (1 + y.size), y.dtype))
    _, t = jax.lax.fori_loop(0, 60, halve, start)
    apart = jnp.linalg.norm((target - entry(t)).ravel())
    return jnp.where(norm(y) > 1, apart, 0)


def l2() -> Kappa:
    """The Euclidean norm of each leaf: normalised steps, a ball as the constraint."""
    return lp(2.0)._replace(problem="minimise f subject to the Euclidean norm of x <= 1/wd")


def soft(e: float) -> Kappa:
    """The part of the absolute values above e: entries with little momentum stay, and the solution is
    sparse."""
    _positive(e)

    def conjugate(y: Tensor) -> Tensor:
        return _inside(_largest(y), e * jnp.abs(y).sum())

    return Kappa(
        value=lambda z: jnp.maximum(jnp.abs(z) - e, 0).sum(),
        subgradient=lambda z: jnp.where(jnp.abs(z) > e, jnp.sign(z), 0),
        conjugate=conjugate,
        distance=_beyond_box,
        problem=f"minimise f + {e:g} sum |x| subject to max |x| <= 1/wd",
    )


def topk(k: int) -> Kappa:
    """The sum of the k largest absolute values of each leaf. Of equal ones the first count, so that
    exactly k entries move; a leaf of fewer entries is one of :func:`l1`."""
    if k < 1:
        raise ValueError(f"k={k}: a whole number of at least 1 is right")

    def largest(z: Tensor) -> tuple[Tensor, Int[Array, "k"]]:
        values, at = jax.lax.top_k(jnp.abs(z).ravel(), min(k, z.size))
        return values, at

    def subgradient(z: Tensor) -> Tensor:
        _, at = largest(z)
        chosen = jnp.zeros(z.size, z.dtype).at[at].set(jnp.sign(z).ravel()[at])
        return chosen.reshape(z.shape)

    def conjugate(y: Tensor) -> Tensor:
        return _inside(jnp.maximum(jnp.abs(y).sum() / min(k, y.size), _largest(y)))

    def distance(y: Tensor) -> Tensor:
        # The projection is min(max(|y| - t, 0), 1) with the least t >= 0 whose sum is at most k.
        target, most = jnp.abs(y), min(k, y.size)

        def halve(_: Any, ends: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            low, high = ends
            t = (low + high) / 2
            outside = jnp.clip(target - t, 0, 1).sum() > most
            return jnp.where(outside, t, low), jnp.where(outside, high, t)

        _, t = jax.lax.fori_loop(0, 60, halve, (jnp.zeros((), y.dtype), _largest(y)))
        t = jnp.where(jnp.clip(target, 0, 1).sum() > most, t, 0)
        return jnp.linalg.norm((target - jnp.clip(target - t, 0, 1)).ravel())

    return Kappa(
        value=lambda z: largest(z)[0].sum(),
        subgradient=_gathered(subgradient),
        conjugate=conjugate,
        distance=distance,
        problem=f"minimise f subject to sum |x| <= {k}/wd and max |x| <= 1/wd",
    )


def huber(e: float) -> Kappa:
    """Quadratic up to e, then linear: signs, but in proportion near 0."""
    _positive(e)

    def value(z: Tensor) -> Tensor:
        size = jnp.abs(z)
        return jnp.where(size <= e, z**2 / (2 * e), size - e / 2).sum()

    return Kappa(
        value=value,
        subgradient=lambda z: jnp.clip(z / e, -1, 1),
        conjugate=lambda y: _inside(_largest(y), e / 2 * (y**2).sum()),
        distance=_beyond_box,
        problem=f"minimise f + ({e:g} wd / 2) |x|^2 subject to max |x| <= 1/wd",
    )


def smooth(e: float) -> Kappa:
    """``sum sqrt(z^2 + e^2) - e``: a smooth sign, z / sqrt(z^2 + e^2)."""
    _positive(e)

    def conjugate(y: Tensor) -> Tensor:
        return _inside(_largest(y), e * (1 - jnp.sqrt(jnp.maximum(1 - y**2, 0))).sum())

    return Kappa(
        # hypot - e without its cancellation near 0.
        value=lambda z: (z**2 / (jnp.hypot(z, e) + e)).sum(),
        subgradient=lambda z: z / jnp.hypot(z, e),
        conjugate=conjugate,
        distance=_beyond_box,
        problem=f"minimise f + sum {e:g} (1 - sqrt(1 - (wd x)^2)) / wd, which keeps max |x| <= 1/wd",
    )


def nuclear(*, exact: bool = False, steps: int = 30) -> Kappa:
    """The sum of the singular values of matrices: steps as of Muon, a bound on the spectral norm.

    Args:
      exact: by singular value decomposition; otherwise by the cubic Newton-Schulz iteration, which
        is products of matrices alone and converges for every full-rank matrix.
      steps: iterations; singular values above about 1e-5 of the largest are 1 to 1e-6 after 30.

    Leaves of fewer than two axes are treated as by :func:`l2` (a matrix of one row), those of more as
    stacks of matrices of the last two axes, whose values are summed.
    """

    def matrices(z: Tensor) -> Tensor:
        return z if z.ndim > 1 else z.reshape(1, z.size)

    def singular(z: Tensor) -> Tensor:
        return jnp.linalg.svd(matrices(z), compute_uv=False)

    def by_svd(x: Tensor) -> Tensor:
        u, s, v = jnp.linalg.svd(x, full_matrices=False)
        top = s[..., :1]
        # Directions without momentum have no sign.
        keep = s > jnp.finfo(s.dtype).eps * max(x.shape[-2:]) * top
        return (u * keep[..., None, :]) @ v

    def by_products(x: Tensor) -> Tensor:
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        size = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
        x = x / jnp.where(size > 0, size, 1)
        x = jax.lax.fori_loop(0, steps, lambda _, x: 1.5 * x - 0.5 * (x @ x.mT) @ x, x)
        return x.mT if tall else x

    def subgradient(z: Tensor) -> Tensor:
        return (by_svd if exact else by_products)(matrices(z)).reshape(z.shape)

    return Kappa(
        value=lambda z: singular(z).sum(),
        subgradient=_gathered(subgradient),
        conjugate=lambda y: _inside(_largest(singular(y))),
        distance=lambda y: _beyond_box(singular(y)),
        problem="minimise f subject to the largest singular value of x <= 1/wd",
    )


def _positive(e: float) -> None:
    if not e > 0:
        raise ValueError(f"e={e}: a positive number is right")
