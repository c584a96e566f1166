"""Rules of writes into an array: ``dynamic_update_slice`` and the scatter operations.

A write into ``W + s A B^T`` is the same write into ``W`` and, for the noise, a write into the factor
that varies along the axes on which only a part is written: rows that are set have their rows of A
set to 0. Where no factor varies along all of these axes, the noise of the block is subtracted as a
term of its own. What is written may itself be perturbed; its noise is then one more term, which is
0 outside what is written.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from eggroll import _compat as compat
from eggroll.interpret.context import Context
from eggroll.interpret.equations import bind
from eggroll.interpret.registry import UNHANDLED, Rounding, rule
from eggroll.interpret.selection import factor_over
from eggroll.interpret.structure import Result
from eggroll.interpret.terms import Noise, noise_of, value_of
from eggroll.values.lowrank import LateBroadcast, LowRank, Upcast, Value, materialize

# A write of an update into an array: (array, update) -> array.
Put = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Write:
    """Where an update goes.

    Attributes:
      put: writes an update into an array. Both may have size 1 along axes that are written whole.
      shape: of the update.
      axis_of: for each axis of the update the axis of the array that it lies along; None for an
        axis that counts places.
      partial: axes of the array of which only a part is written at each place.
      together: axes of the array with a place for each index.
      block: the one place, for each axis in ``partial`` its start and size; None where there are
        several places, or one that may be dropped.
    """

    put: Put
    shape: tuple[int, ...]
    axis_of: tuple[int | None, ...]
    partial: tuple[int, ...]
    together: tuple[int, ...]
    block: dict[int, tuple[Array, int]] | None

    @property
    def placed(self) -> list[int]:
        """The axes of the update that count places or lie along partial axes."""
        return [i for i, a in enumerate(self.axis_of) if a is None or a in self.partial]

    def into(self, factor: Array, shape: Sequence[int], small: Array) -> Array:
        """Writes into a factor, each rank alike.

        Args:
          factor: ``[rank, *axes]``.
          shape: of the whole array.
          small: ``[rank, *update]`` or ``[1, *update]``, of size 1 where the update does not vary.
        """
        varying = {a for i, a in enumerate(self.axis_of) if small.shape[i + 1] > 1}
        along = {a for a in range(len(shape)) if factor.shape[a + 1] > 1}
        full = {*self.partial, *self.together, *varying, *along}
        axes = [n if a in full else 1 for a, n in enumerate(shape)]
        update = [
            n if axis is None or axis in full else 1
            for n, axis in zip(self.shape, self.axis_of, strict=True)
        ]
        ranks = max(factor.shape[0], small.shape[0])
        return jax.vmap(self.put)(
            jnp.broadcast_to(factor, (ranks, *axes)),
            jnp.broadcast_to(small, (ranks, *update)).astype(factor.dtype),
        )

    def over(self, small: Array, ndim: int) -> Array:
        """A factor ``[rank, *update]`` of size 1 along :attr:`placed`, with the axes of the array."""
        kept = [(a, i + 1) for i, a in enumerate(self.axis_of) if a is not None]
        order = [i for _, i in sorted(kept)]
        rest = [i for i in range(1, small.ndim) if i not in order]
        shape = [1] * ndim
        for axis, i in kept:
            shape[axis] = small.shape[i]
        return jnp.transpose(small, [0, *order, *rest]).reshape(small.shape[0], *shape)


@rule(
    "dynamic_update_slice",
    keeps="slices of arrays and of perturbed values, without gains",
    integers=True,
    late_broadcasts=True,
    rounding=Rounding.EXACT,
)
def dynamic_update_slice(
    ctx: Context, eqn: core.JaxprEqn, operand: Value, update: Value, *starts: Value
) -> Result:
    shape, sizes = operand.shape, update.shape
    partial = tuple(a for a in range(len(shape)) if sizes[a] < shape[a])
    block = {a: (jnp.clip(starts[a], 0, shape[a] - sizes[a]), sizes[a]) for a in partial}

    def put(x: Array, u: Array) -> Array:
        # A start beyond an axis of size 1 is clamped to it.
        return lax.dynamic_update_slice(x, u, starts)

    write = Write(put, tuple(sizes), tuple(range(len(shape))), partial, (), block)
    return written(ctx, write, operand, update)


@rule(
    "scatter",
    keeps="rows, columns, entries of arrays and of perturbed values, without gains",
    integers=True,
    late_broadcasts=True,
    rounding=Rounding.EXACT,
)
def scatter(
    ctx: Context, eqn: core.JaxprEqn, operand: Value, indices: Value, update: Value
) -> Result:
    if eqn.params["update_jaxpr"] is not None:
        return UNHANDLED  # .at[].apply(fn)
    return written(ctx, scattered(eqn, operand.shape, indices, update.shape), operand, update)


@rule(
    "scatter-add",
    "scatter-sub",
    keeps="sums with arrays and perturbed values, without gains",
    late_broadcasts=True,
    rounding=Rounding.SUMS,
)
def scatter_add(
    ctx: Context, eqn: core.JaxprEqn, operand: Value, indices: Value, update: Value
) -> Result:
    write = scattered(eqn, operand.shape, indices, update.shape)
    return written(ctx, write, operand, update, adds=True)


@rule(
    "scatter-mul",
    keeps="multiples by what varies along the axes of one factor, without gains",
    late_broadcasts=True,
    rounding=Rounding.SUMS,
)
def scatter_mul(
    ctx: Context, eqn: core.JaxprEqn, operand: Value, indices: Value, update: Value
) -> Result:
    if not isinstance(operand, LowRank) or isinstance(update, LowRank) or operand.gains:
        return UNHANDLED
    small, full = small_of(update), materialize(update)
    if isinstance(full, Upcast) or compat.is_batched(small):
        return UNHANDLED
    full = jnp.asarray(full)
    write = scattered(eqn, operand.shape, indices, full.shape)
    along = [a for a, n in zip(write.axis_of, small.shape, strict=True) if n > 1 and a is not None]
    k = factor_over(operand, (*write.partial, *along))
    if k is None:
        return multiplied_block(write, operand, small, full)
    factor = write.into(operand.factors[k], operand.shape, small[None])
    factors = (*operand.factors[:k], factor, *operand.factors[k + 1 :])
    return operand.replace(w=write.put(operand.w, full), factors=factors)


def multiplied_block(write: Write, value: LowRank, small: Array, full: Array) -> Result:
    """A multiple of one block: the noise outside it, and the multiple of the noise inside."""
    along = [a for a, n in zip(write.axis_of, small.shape, strict=True) if n > 1 and a is not None]
    j, left = factor_over(value, along), outside(write, value)
    if write.block is None or left is None or j is None or set(along) & set(write.partial):
        return UNHANDLED
    block = in_block(write.block, value, noise_of(value))
    times = write.over(small[None], value.ndim)
    block = (*block[:j], block[j] * times.astype(block[j].dtype), *block[j + 1 :])
    terms = [*left, block]
    out = value_of(write.put(value.w, full), terms, [value] * len(terms))
    return UNHANDLED if out is None else out


def scattered(
    eqn: core.JaxprEqn, shape: Sequence[int], indices: Value, update: Sequence[int]
) -> Write:
    """Where a scatter writes; ``indices`` may be a broadcast that has not been carried out."""
    indices = materialize(indices)
    numbers = eqn.params["dimension_numbers"]
    windows = list(map(int, numbers.update_window_dims))
    together = list(map(int, numbers.operand_batching_dims))
    indexed = list(map(int, numbers.scatter_dims_to_operand_dims))
    left_out = (*map(int, numbers.inserted_window_dims), *together)
    window_axes = [a for a in range(len(shape)) if a not in left_out]
    counted = [i for i in range(len(update)) if i not in windows]
    axis_of: list[int | None] = [None] * len(update)
    for i, axis in zip(windows, window_axes, strict=True):
        axis_of[i] = axis
    for place, axis in zip(map(int, numbers.scatter_indices_batching_dims), together, strict=True):
        axis_of[counted[place]] = axis
    sizes = {axis: update[i] for i, axis in enumerate(axis_of) if axis is not None}
    partial = tuple(a for a in range(len(shape)) if a in indexed or sizes.get(a, 1) < shape[a])

    def put(x: Array, u: Array) -> Array:
        return bind(eqn, x, indices, u)

    block = None
    if all(update[i] == 1 for i in counted) and not together:
        starts = indices.reshape(-1)
        given = {a: (starts[j], sizes.get(a, 1)) for j, a in enumerate(indexed)}
        block = kept_block(given, shape, eqn.params["mode"])
        # A window that is not indexed starts at 0.
        block |= {a: (jnp.zeros_like(starts[0]), sizes[a]) for a in partial if a not in indexed}
    return Write(put, tuple(update), tuple(axis_of), partial, tuple(together), block)


def kept_block(
    given: dict[int, tuple[Array, int]], shape: Sequence[int], mode: lax.GatherScatterMode
) -> dict[int, tuple[Array, int]]:
    """The starts and sizes of a block, clipped, or past the end of the array if it is dropped."""
    last = {axis: shape[axis] - size for axis, (_, size) in given.items()}
    if mode == lax.GatherScatterMode.CLIP:
        return {a: (jnp.clip(start, 0, last[a]), size) for a, (start, size) in given.items()}
    whole = jnp.ones((), bool)
    for axis, (start, _) in given.items():
        whole = whole & (start >= 0) & (start <= last[axis])
    return {a: (jnp.where(whole, start, shape[a]), size) for a, (start, size) in given.items()}


def within(block: dict[int, tuple[Array, int]], axis: int, shape: Sequence[int]) -> Array:
    """Whether each place along an axis lies in a block, with the axes of a factor."""
    start, size = block[axis]
    places = jnp.arange(shape[axis], dtype=start.dtype)
    inside = (places >= start) & (places < start + size)
    return inside.reshape([1, *(-1 if a == axis else 1 for a in range(len(shape)))])


# ---------------------------------------------------------------- what every write does


def written(
    ctx: Context, write: Write, operand: Value, update: Value, adds: bool = False
) -> Result:
    """The result of a write that replaces what is there, or adds to it."""
    values = [v for v in (operand, update) if isinstance(v, LowRank)]
    if any(v.gains or v.arithmetic != values[0].arithmetic for v in values):
        return UNHANDLED
    into_data = operand.activation if isinstance(operand, LowRank) else update.activation
    plain = operand.w if isinstance(operand, LowRank) else materialize(operand)
    if into_data or isinstance(plain, Upcast) or compat.is_batched(plain):
        return UNHANDLED
    noises: list[Noise | None] = []
    sources: list[LowRank] = []
    if isinstance(operand, LowRank):
        kept = [noise_of(operand)] if adds or ctx.recorder else outside(write, operand)
        noises += kept or [None]
        sources += [operand] * len(noises)
    if isinstance(update, LowRank):
        noises.append(inside(write, plain.shape, noise_of(update)))
        sources.append(update)
        shared = update.w
    else:
        small, shared = small_of(update), materialize(update)
        if isinstance(shared, Upcast):
            return UNHANDLED
        if compat.is_batched(small) and operand.arithmetic.linear:
            # A row of a member's own is noise of rank 1; the array stays shared.
            noises.append(inside(write, plain.shape, row_of(write, small)))
            sources.append(operand)
            shared = jnp.zeros_like(shared)
    w = write.put(jnp.asarray(plain), jnp.asarray(shared))
    terms = [noise for noise in noises if noise is not None]
    if len(terms) < len(noises):
        return UNHANDLED
    out = value_of(w, terms, sources)
    return UNHANDLED if out is None else out


def small_of(update: Value) -> Array:
    """What is written, of size 1 along axes that a broadcast would give it."""
    value = update.value if isinstance(update, LateBroadcast) else update
    return value.value if isinstance(value, Upcast) else jnp.asarray(value)


def outside(write: Write, value: LowRank) -> list[Noise] | None:
    """The noise of a value, 0 where something else is written, in one or two terms."""
    noise = noise_of(value)
    k = factor_over(value, write.partial)
    if k is not None:
        zeros = jnp.zeros((1, *[1] * len(write.shape)), noise[k].dtype)
        return [(*noise[:k], write.into(noise[k], value.shape, zeros), *noise[k + 1 :])]
    if write.block is None:
        return None
    block = in_block(write.block, value, noise)
    return [noise, (-block[0], *block[1:])]


def in_block(block: dict[int, tuple[Array, int]], value: LowRank, noise: Noise) -> Noise:
    """The noise of a value, 0 outside a block."""
    factors = list(noise)
    for axis in block:
        k = next(iter(value.along(axis)), 0)
        factors[k] = factors[k] * within(block, axis, value.shape).astype(factors[k].dtype)
    return tuple(factors)


def inside(write: Write, shape: Sequence[int], noise: Noise | None) -> Noise | None:
    """The noise of an update, in the axes of the array and 0 elsewhere.

    Args:
      write: where the update goes.
      shape: of the array.
      noise: factors ``[rank, *update]``.

    Returns:
      None where several factors vary from place to place.
    """
    if noise is None:
        return None
    moving = [k for k, f in enumerate(noise) if any(f.shape[i + 1] > 1 for i in write.placed)]
    if write.block is not None and len(write.block) > 1:
        return inside_block(write, write.block, shape, noise)
    if len(moving) > 1:
        return None
    k = moving[0] if moving else min(range(len(noise)), key=lambda k: noise[k].size)
    zeros = jnp.zeros((noise[k].shape[0], *[1] * len(shape)), noise[k].dtype)
    placed = write.into(zeros, shape, noise[k])
    return tuple(placed if j == k else write.over(f, len(shape)) for j, f in enumerate(noise))


def inside_block(
    write: Write, block: dict[int, tuple[Array, int]], shape: Sequence[int], noise: Noise
) -> Noise | None:
    """:func:`inside` for one place, each factor along the axes that it varies along."""
    factors, free = [], set(block)
    for factor in noise:
        if any(factor.shape[i + 1] > 1 for i, a in enumerate(write.axis_of) if a is None):
            return None
        out = write.over(factor, len(shape))
        for axis in [a for a in block if out.shape[a + 1] > 1]:
            free.discard(axis)
            out = padded(out, block[axis], axis + 1, shape[axis])
        factors.append(out)
    for axis in free:
        k = min(range(len(factors)), key=lambda k: factors[k].size)
        factors[k] = factors[k] * within(block, axis, shape).astype(factors[k].dtype)
    return tuple(factors)


def padded(factor: Array, part: tuple[Array, int], axis: int, size: int) -> Array:
    """A factor put at its place along an axis of a size, with zeros around it."""
    start, length = part
    zeros = jnp.zeros(
        (*factor.shape[:axis], size + length, *factor.shape[axis + 1 :]), factor.dtype
    )
    whole = lax.dynamic_update_slice_in_dim(zeros, factor, start, axis)
    return lax.slice_in_dim(whole, 0, size, axis=axis)


def row_of(write: Write, small: Array) -> Noise | None:
    """An update that is one product of what varies from place to place and what does not."""
    one = jnp.ones((1, *[1] * small.ndim), small.dtype)
    if all(small.shape[i] == 1 for i in write.placed):
        return one, small[None]
    moving = [i for i, n in enumerate(small.shape) if n > 1]
    return (small[None], one) if set(moving) <= set(write.placed) else None
