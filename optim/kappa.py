r"""Convex functions for :func:`optim.lion_k`, each with the constrained problem that it solves.

With :math:`\mathcal K` and weight decay :math:`\lambda`, Lion-K minimises :math:`f(x) + \mathcal
K^*(\lambda x)/\lambda` (Chen, Liu, Liang and Liu, arXiv 2310.05898). Where the conjugate
:math:`\mathcal K^*` is the indicator of a set, that is f on the set; where the conjugate is finite
inside the set, it is f plus a penalty. Every function here is even, so that the sign convention of
the momentum does not matter.

Every function takes an array of any floating or complex dtype and computes in float32 at least: a
subgradient has the dtype of its argument, a value is float32 or float64. A complex entry counts by
its modulus, and its sign is z / |z|, as in optax; :func:`nuclear` uses complex singular values. To
treat real and imaginary parts as entries of their own, wrap the optimizer in
``optax.contrib.split_real_and_imaginary``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from optim import _numerics
from optim._numerics import divided, euclidean, scaled, sign

Tensor = Inexact[Array, "..."]
Real = Float[Array, "..."]
Value = Float[Array, ""]


class Kappa(NamedTuple):
    """A convex, even function of one array, with what Lion-K and its diagnostics need.

    A function of one's own is ``Kappa(value, subgradient, conjugate, distance, problem)``.

    Attributes:
      value: array -> scalar, the function.
      subgradient: array -> array of its shape and dtype, any element of the subdifferential.
      conjugate: array -> scalar, the convex conjugate, inf outside its domain.
      distance: array -> scalar, the Euclidean distance to the closure of the conjugate's domain.
      problem: what Lion-K minimises, with x the parameters and wd the weight decay.
    """

    value: Callable[[Tensor], Value]
    subgradient: Callable[[Tensor], Tensor]
    conjugate: Callable[[Tensor], Value]
    distance: Callable[[Tensor], Value]
    problem: str


# A point on the boundary of a domain is inside, also after rounding.
TOLERANCE = 1e-6


def _kappa(
    value: Callable[[Tensor], Value],
    subgradient: Callable[[Tensor], Tensor],
    conjugate: Callable[[Tensor], Value],
    distance: Callable[[Tensor], Value],
    problem: str,
) -> Kappa:
    """A kappa whose functions get their argument in float32 at least."""

    def of_wide(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda z: function(_numerics.wide(z))

    def in_its_dtype(z: Tensor) -> Tensor:
        return subgradient(_numerics.wide(z)).astype(z.dtype)

    return Kappa(of_wide(value), in_its_dtype, of_wide(conjugate), of_wide(distance), problem)


def _inside(norm: Real, finite: Real | float = 0.0) -> Value:
    return jnp.where(norm <= 1 + TOLERANCE, finite, jnp.inf)


def _largest(z: Tensor) -> Value:
    return jnp.max(jnp.abs(z), initial=0)


def _beyond_box(y: Tensor) -> Value:
    return euclidean(jnp.maximum(jnp.abs(y) - 1, 0))


def _gathered(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function on the whole array on every device, the result sharded as the argument.

    Explicitly sharded arrays carry their sharding in their type, and sorts and decompositions are
    not defined across shards.
    """

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
    return _kappa(
        value=lambda z: jnp.abs(z).sum(),
        subgradient=sign,
        conjugate=lambda y: _inside(_largest(y)),
        distance=_beyond_box,
        problem="minimise f subject to max |x| <= 1/wd",
    )


def _norm(z: Tensor, p: float) -> Value:
    z, scale = scaled(z)
    return scale * jnp.sum(jnp.abs(z) ** p) ** (1 / p)


def lp(p: float) -> Kappa:
    """The p-norm of each leaf: normalised steps, and the ball of the dual norm as the constraint.

    Args:
      p: above 1.

    Raises:
      ValueError: p is 1 or less.
    """
    if not p > 1:
        raise ValueError(f"p must be above 1, got {p}; l1() is the case p=1")
    q = p / (p - 1)

    def subgradient(z: Tensor) -> Tensor:
        x, scale = scaled(z)
        norm = jnp.sum(jnp.abs(x) ** p) ** (1 / p)
        # Twice by the root of what may overflow; x, if it were used again, would be kept in memory.
        root = jnp.sqrt(scale) * jnp.sqrt(jnp.where(norm > 0, norm, 1))
        unit = divided(divided(z, root), root)
        return unit if p == 2 else sign(unit) * jnp.abs(unit) ** (p - 1)

    def distance(y: Tensor) -> Value:
        return jnp.maximum(euclidean(y) - 1, 0) if p == 2 else _distance_to_ball(y, q)

    return _kappa(
        value=lambda z: _norm(z, p),
        subgradient=subgradient,
        conjugate=lambda y: _inside(_norm(y, q)),
        distance=distance,
        problem=f"minimise f subject to the {q:g}-norm of x <= 1/wd",
    )


def _bisected(is_low: Callable[[Real], Array], low: Real, high: Real) -> Real:
    """Where ``is_low`` ceases to hold, entry by entry; 60 halvings give all digits of float64."""

    def halve(_: Any, ends: tuple[Real, Real]) -> tuple[Real, Real]:
        low, high = ends
        middle = low + (high - low) / 2
        below = is_low(middle)
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    return jax.lax.fori_loop(0, 60, halve, (low, high))[1]


def _distance_to_ball(y: Tensor, q: float) -> Value:
    """The distance to the unit ball of the q-norm, by bisection on a multiplier.

    The projection x of y solves ``x + t q x^(q-1) = |y|`` in each entry, for the multiplier t at
    which its norm is 1. Both equations are monotone.
    """
    target = jnp.abs(y)

    def entry(t: Real) -> Real:
        below = lambda x: x + t * q * x ** (q - 1) <= target
        return _bisected(below, jnp.zeros_like(target), target)

    norm = _norm(y, q)
    most = jnp.asarray(norm * (1 + y.size), target.dtype)
    t = _bisected(lambda t: _norm(entry(t), q) > 1, jnp.zeros_like(most), most)
    return jnp.where(norm > 1, euclidean(target - entry(t)), 0)


def l2() -> Kappa:
    """The Euclidean norm of each leaf: normalised steps, and a ball as the constraint."""
    return lp(2.0)._replace(problem="minimise f subject to the Euclidean norm of x <= 1/wd")


def soft(e: float) -> Kappa:
    """The part of absolute values above e: small momenta move nothing, the solution is sparse.

    Args:
      e: above 0.

    Raises:
      ValueError: e is not positive.
    """
    _check_positive(e)

    def conjugate(y: Tensor) -> Value:
        return _inside(_largest(y), e * jnp.abs(y).sum())

    return _kappa(
        value=lambda z: jnp.maximum(jnp.abs(z) - e, 0).sum(),
        subgradient=lambda z: jnp.where(jnp.abs(z) > e, sign(z), 0),
        conjugate=conjugate,
        distance=_beyond_box,
        problem=f"minimise f + {e:g} sum |x| subject to max |x| <= 1/wd",
    )


def topk(k: int) -> Kappa:
    """The sum of the k largest absolute values of each leaf.

    Exactly k entries move: among equal ones the first in memory order. A leaf of k or fewer entries
    gets :func:`l1`.

    Args:
      k: at least 1.

    Raises:
      ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")

    def top(z: Tensor) -> tuple[Real, Int[Array, "k"]]:
        values, at = jax.lax.top_k(jnp.abs(z).ravel(), min(k, z.size))
        return values, at

    def subgradient(z: Tensor) -> Tensor:
        # A selection from the signs is sharded as they are; a scatter of them would not be.
        _, at = top(z)
        is_chosen = jnp.zeros(z.size, bool).at[at].set(True).reshape(z.shape)
        return jnp.where(is_chosen, sign(z), 0)

    def conjugate(y: Tensor) -> Value:
        most = max(min(k, y.size), 1)
        return _inside(jnp.maximum(jnp.abs(y).sum() / most, _largest(y)))

    def distance(y: Tensor) -> Value:
        # The projection is min(max(|y| - t, 0), 1) with the least t >= 0 whose sum is at most k.
        target, most = jnp.abs(y), min(k, y.size)
        too_many = lambda t: jnp.clip(target - t, 0, 1).sum() > most
        t = _bisected(too_many, jnp.zeros((), target.dtype), _largest(y))
        t = jnp.where(too_many(0), t, 0)
        return euclidean(target - jnp.clip(target - t, 0, 1))

    return _kappa(
        value=lambda z: top(z)[0].sum(),
        subgradient=_gathered(subgradient),
        conjugate=conjugate,
        distance=distance,
        problem=f"minimise f subject to sum |x| <= {k}/wd and max |x| <= 1/wd",
    )


def huber(e: float) -> Kappa:
    """Quadratic up to e, then linear: signs, but steps in proportion to the momentum near 0.

    Args:
      e: above 0.

    Raises:
      ValueError: e is not positive.
    """
    _check_positive(e)

    def value(z: Tensor) -> Value:
        size = jnp.abs(z)
        bent = jnp.minimum(size, e)
        return (bent**2 / (2 * e) + (size - bent)).sum()

    return _kappa(
        value=value,
        subgradient=lambda z: sign(z) * jnp.minimum(jnp.abs(z) / e, 1),
        conjugate=lambda y: _inside(_largest(y), e / 2 * (jnp.abs(y) ** 2).sum()),
        distance=_beyond_box,
        problem=f"minimise f + ({e:g} wd / 2) |x|^2 subject to max |x| <= 1/wd",
    )


def smooth(e: float) -> Kappa:
    """``sum sqrt(|z|^2 + e^2) - e``, whose gradient ``z / sqrt(|z|^2 + e^2)`` is a smooth sign.

    Args:
      e: above 0.

    Raises:
      ValueError: e is not positive.
    """
    _check_positive(e)

    def over(size: Real, more: float) -> Real:
        """``size / (hypot(size, e) + more)``, also where a complex modulus overflows."""
        return jnp.where(jnp.isfinite(size), size / (jnp.hypot(size, e) + more), 1)

    def conjugate(y: Tensor) -> Value:
        # e (1 - sqrt(1 - y^2)) without its cancellation near 0.
        square = jnp.abs(y) ** 2
        root = jnp.sqrt(jnp.maximum(1 - square, 0))
        return _inside(_largest(y), e * (square / (1 + root)).sum())

    return _kappa(
        # hypot - e without its cancellation near 0.
        value=lambda z: (jnp.abs(z) * over(jnp.abs(z), e)).sum(),
        subgradient=lambda z: sign(z) * over(jnp.abs(z), 0.0),
        conjugate=conjugate,
        distance=_beyond_box,
        problem=f"minimise f + sum {e:g} (1 - sqrt(1 - (wd x)^2)) / wd, which keeps max |x| <= 1/wd",
    )


def nuclear(*, exact: bool = False, steps: int = 30) -> Kappa:
    """The sum of the singular values of matrices: steps as in Muon, a bound on the spectral norm.

    Leaves of fewer than two axes are matrices of one row, so that they get :func:`l2`. Leaves of
    more axes are stacks of matrices of the last two axes; their values are summed.

    Args:
      exact: use a singular value decomposition. Otherwise the cubic Newton-Schulz iteration is
        used, which needs products of matrices alone and converges for every matrix of full rank.
      steps: iterations; after 30, singular values above about 1e-5 of the largest are 1 to within
        1e-6.
    """

    def matrices(z: Tensor) -> Tensor:
        return z if z.ndim > 1 else z.reshape(1, z.size)

    def singular(z: Tensor) -> Real:
        if z.size == 0:
            return jnp.zeros(0, _numerics.real_dtype(z.dtype))
        x, scale = scaled(matrices(z), axes=(-2, -1))
        return scale[..., 0] * jnp.linalg.svd(x, compute_uv=False)

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
        x = divided(x, jnp.where(size > 0, size, 1))
        x = jax.lax.fori_loop(0, steps, lambda _, x: 1.5 * x - 0.5 * (x @ x.mT.conj()) @ x, x)
        return x.mT if tall else x

    def subgradient(z: Tensor) -> Tensor:
        if z.size == 0:
            return z
        x, _ = scaled(matrices(z), axes=(-2, -1))
        return (by_svd if exact else by_products)(x).reshape(z.shape)

    return _kappa(
        value=lambda z: singular(z).sum(),
        subgradient=_gathered(subgradient),
        conjugate=lambda y: _inside(_largest(singular(y))),
        distance=lambda y: _beyond_box(singular(y)),
        problem="minimise f subject to the largest singular value of x <= 1/wd",
    )


def _check_positive(e: float) -> None:
    if not e > 0:
        raise ValueError(f"e must be above 0, got {e}")
