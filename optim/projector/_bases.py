"""Splits by a basis: the projection of a gradient on orthonormal vectors, and the remainder."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Inexact

from optim.projector._interface import Projector, Split, each_matrix

Side = Literal["std", "reverse_std", "left", "right", "full"]

# Units of rounding below which an entry of the rest is residue: of the entry, and of its column or
# row.
RESIDUE, NORMWISE = 2, 16


class Bases(NamedTuple):
    """Orthonormal columns for the columns of a matrix (left), its rows (right), or both.

    Attributes:
      left: None where the matrix is not projected from the left.
      right: None where the matrix is not projected from the right.
    """

    left: Inexact[Array, "*layers rows rank"] | None
    right: Inexact[Array, "*layers columns rank"] | None


def sides(shape: tuple[int, ...], side: str) -> tuple[bool, bool]:
    """Whether a matrix of this shape is projected from the left, and from the right.

    Example:
      >>> sides((8, 4), "std"), sides((8, 4), "reverse_std"), sides((4, 8), "std")
      ((False, True), (True, False), (True, False))
      >>> sides((4, 4), "std"), sides((4, 4), "reverse_std")
      ((True, False), (True, False))
    """
    rows, columns = shape
    if side == "full":
        return True, True
    left = {"std": rows <= columns, "reverse_std": rows >= columns, "left": True, "right": False}
    return left[side], not left[side]


def _dot(a: Array, b: Array) -> Array:
    """The product in at least float32, where the default of an accelerator has fewer digits."""
    wide = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)


def _compressed(grad: Array, at: Bases) -> Array:
    grad = grad if at.left is None else _dot(at.left.conj().T, grad)
    return grad if at.right is None else _dot(grad, at.right)


def _expanded(compact: Array, at: Bases) -> Array:
    compact = compact if at.left is None else _dot(at.left, compact)
    return compact if at.right is None else _dot(compact, at.right.conj().T)


def _without_residue(rest: Array, grad: Array, at: Bases) -> Array:
    """The rest with 0 for entries that are rounding residue, whose sign would be a whole step.

    Three roundings leave residue. That of the gradient: some units of the entry. That of the
    decomposition and the products: some units of the norm of the entry's column (from the left) or
    row (from the right). That of bases kept in fewer digits: units of theirs, times that norm,
    times the norm of the entry's row of the basis.
    """
    eps = lambda x: float(jnp.finfo(x.dtype).eps)
    wide = grad.astype(rest.dtype)
    most = RESIDUE * eps(grad) * jnp.abs(wide)
    for basis, axis in ((at.left, 0), (at.right, 1)):
        if basis is not None:
            norms = jnp.linalg.norm(wide, axis=axis, keepdims=True)
            kept = jnp.linalg.norm(basis.astype(rest.dtype), axis=1)
            share = RESIDUE * eps(basis) * jnp.expand_dims(kept, 1 - axis)
            most = most + norms * jnp.maximum(share, NORMWISE * eps(rest))
    # Written so that entries that are not numbers stay.
    return jnp.where(jnp.abs(rest) <= most, 0, rest)


def _of_bases(
    bases: Callable[[Array, Array, int, bool, bool], tuple[Array | None, Array | None]],
    rank: int | None,
    side: str,
) -> Projector:
    """A projector whose bases are ``bases(key, gradient, rank, whether left, whether right)``."""
    if side not in ("std", "reverse_std", "left", "right", "full"):
        raise ValueError(f"side must be std, reverse_std, left, right or full, got {side!r}")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(
            f"rank must be an int of at least 1, or None for the density, got {rank!r}"
        )

    def init(shape: tuple[int, ...], dtype: DTypeLike, density: float) -> Bases:
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
        # The dtype of the parameters, which that of the gradients need not be.
        return jax.tree.map(lambda x, o: x.astype(o.dtype), Bases(*new), old)

    def down(grad: Array, at: Bases) -> tuple[Array, Array]:
        kept = [x for x in at if x is not None]
        dtype = jnp.result_type(grad, *kept)
        compact = _compressed(grad, at)
        if all(x.shape[0] == x.shape[1] for x in kept):
            return compact.astype(dtype), jnp.zeros_like(grad)
        if kept[0].shape[1] == 0:
            return compact.astype(dtype), grad
        rest = _without_residue(grad - _expanded(compact, at), grad, at)
        return compact.astype(dtype), rest.astype(grad.dtype)

    def up(compact: Array, at: Bases, shape: tuple[int, ...]) -> Array:
        return _expanded(compact, at).astype(jnp.result_type(compact, *jax.tree.leaves(at)))

    return each_matrix(Split(init, down, up, refresh))


def random(rank: int | None = None, side: Side = "std") -> Projector:
    """A random orthonormal basis.

    Args:
      rank: how many vectors, at most as many as the matrix has rows or columns; by default
        ``round(density * min(rows, columns))``, at least one, whichever side is projected.
      side: which side is projected. ``"std"`` (GaLore): the shorter one, so that the basis is the
        smaller; ``"reverse_std"`` (``optax.contrib.galore``): the longer one, so that the compact
        part is the smaller; ``"left"`` (the rows, which in JAX are the inputs of a layer);
        ``"right"``; ``"full"``: both. The two rules take the rows of a square matrix, as the
        programs that they are from do: GaLore's columns are its inputs, since PyTorch keeps the
        transpose.

    State: for each basis 4 * rank bytes a row (left) or column (right) of a float32 matrix.

    Rounding: entries of the rest that are within a few units of rounding of the gradient are 0, so
    that no sign is taken of them.
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

    Matrices are decomposed one after the other, so that one decomposition is in memory at a time.
    Under ``vmap`` every update makes a decomposition unless refreshes are asked for by hand: see
    :func:`optim.scale_by_frugal`.

    Args: as those of :func:`optim.projector.random`.

    State: as that of :func:`optim.projector.random`.
    """

    def bases(
        key: Array, grad: Array, rank: int, left: bool, right: bool
    ) -> tuple[Array | None, Array | None]:
        u, _, vh = jnp.linalg.svd(grad, full_matrices=False)
        return u[:, :rank] if left else None, vh[:rank].conj().T if right else None

    return _of_bases(bases, rank, side)
