"""Splits by a basis: a gradient's projection on some orthonormal vectors, and what is orthogonal to them."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from optim.projector._interface import Projector, Split, each_matrix

Side = Literal["std", "reverse_std", "left", "right", "full"]


class Bases(NamedTuple):
    """Orthonormal columns for a matrix's columns (left), its rows (right), or both.

    Attributes:
      left: None where the matrix is not projected from the left.
      right: None where it is not from the right.
    """

    left: Float[Array, "*layers rows rank"] | None
    right: Float[Array, "*layers columns rank"] | None


def sides(shape: tuple[int, ...], side: str) -> tuple[bool, bool]:
    """Whether a matrix of this shape is projected from the left, and from the right.

    Example:
      >>> sides((8, 4), "std"), sides((8, 4), "reverse_std"), sides((4, 8), "std")
      ((False, True), (True, False), (True, False))
    """
    tall = shape[0] >= shape[1]
    left = {"std": not tall, "reverse_std": tall, "left": True, "right": False, "full": True}
    right = {"std": tall, "reverse_std": not tall, "left": False, "right": True, "full": True}
    return left[side], right[side]


def _of_bases(
    bases: Callable[[Array, Array, int, bool, bool], tuple[Array | None, Array | None]],
    rank: int | None,
    side: str,
) -> Projector:
    """A projector whose bases are ``bases(key, gradient, rank, whether left, whether right)``."""
    if side not in ("std", "reverse_std", "left", "right", "full"):
        raise ValueError(f"side={side!r}: std, reverse_std, left, right or full is right")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank={rank}: a whole number from 1 on is right, or None for the density")

    def init(shape: tuple[int, ...], dtype: Any, density: float) -> Bases:
        r = max(round(density * min(shape)), 1 if density > 0 else 0) if rank is None else rank
        r = min(r, *shape)
        eye = [
            jnp.eye(size, r, dtype=dtype) if at else None
            for size, at in zip(shape, sides(shape, side), strict=True)
        ]
        return Bases(*eye)

    def refresh(key: Array, grad: Array, old: Bases) -> Bases:
        r = next(x.shape[1] for x in old if x is not None)
        if r == 0:
            return old
        wide = grad.astype(jnp.promote_types(grad.dtype, jnp.float32))
        new = bases(key, wide, r, *sides(grad.shape, side))
        return Bases(*(None if x is None else x.astype(grad.dtype) for x in new))

    def compressed(grad: Array, at: Bases) -> Array:
        grad = grad if at.left is None else at.left.T @ grad
        return grad if at.right is None else grad @ at.right

    def up(compact: Array, at: Bases, shape: tuple[int, ...]) -> Array:
        compact = compact if at.left is None else at.left @ compact
        return compact if at.right is None else compact @ at.right.T

    def down(grad: Array, at: Bases) -> tuple[Array, Array]:
        compact = compressed(grad, at)
        if all(x is None or x.shape[0] == x.shape[1] for x in at):
            # Exactly nothing, where rounding would leave small numbers with signs.
            return compact, jnp.zeros_like(grad)
        return compact, grad - up(compact, at, grad.shape)

    return each_matrix(Split(init, down, up, refresh))


def random(rank: int | None = None, side: Side = "std") -> Projector:
    """A random orthonormal basis.

    Args:
      rank: how many vectors, at most as many as the matrix has rows or columns; by default
        ``round(density * min(rows, columns))``, at least one.
      side: which side is projected. ``"std"`` (GaLore's official rule): the right one where there are at
        least as many rows as columns, else the left one, so that the basis is the smaller.
        ``"reverse_std"`` (that of ``optax.contrib.galore``): the other, so that the compact part is the
        smaller. ``"left"``, ``"right"``; ``"full"``: both.

    State: for each basis 4 * rank bytes a row (left) or column (right) of a float32 matrix.
    """

    def bases(
        key: Array, grad: Array, rank: int, left: bool, right: bool
    ) -> tuple[Array | None, Array | None]:
        def one(key: Array, size: int) -> Array:
            return jnp.linalg.qr(jax.random.normal(key, (size, rank), grad.dtype))[0]

        first, second = jax.random.split(key)
        rows, columns = grad.shape
        return one(first, rows) if left else None, one(second, columns) if right else None

    return _of_bases(bases, rank, side)


def svd(rank: int | None = None, side: Side = "std") -> Projector:
    """The leading singular vectors of the gradient at the time of the refresh, as in GaLore.

    Under ``vmap`` a decomposition is made at every update unless refreshes are asked for by hand: see
    :func:`optim.scale_by_frugal`.

    Args: as those of :func:`optim.projector.random`.

    State: as that of :func:`optim.projector.random`.
    """

    def bases(
        key: Array, grad: Array, rank: int, left: bool, right: bool
    ) -> tuple[Array | None, Array | None]:
        u, _, vt = jnp.linalg.svd(grad, full_matrices=False)
        return u[:, :rank] if left else None, vt[:rank].T if right else None

    return _of_bases(bases, rank, side)
