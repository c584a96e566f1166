"""Checks of the arguments of a strategy's methods.

A wrong argument raises ValueError. The message names the argument or the parameter, gives its
value, and states the right values.
"""

import functools
import inspect
import math
import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Int, PyTree

from eggroll.plan.leaf import Plan
from eggroll.state import State


def is_whole(x: object) -> bool:
    """Whether ``x`` is an integer and not a bool."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def is_even(x: object) -> bool:
    """Whether ``x`` is an even integer of at least 2."""
    return isinstance(x, int | np.integer) and is_whole(x) and bool(x >= 2 and x % 2 == 0)


def is_real(dtype: DTypeLike) -> bool:
    """Whether arrays of this dtype hold real numbers or bools."""
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def is_number(x: object) -> bool:
    """Whether ``x`` is one real number; arrays without axes count."""
    if isinstance(x, jax.Array | np.ndarray):
        return x.ndim == 0 and is_real(x.dtype)
    return isinstance(x, numbers.Real | np.bool_)


def is_positive(x: Any) -> bool:
    """Whether ``x`` is one positive, finite number."""
    return is_number(x) and math.isfinite(x) and bool(x > 0)


# ---------------------------------------------------------------- the start of a run


def seed(key: object) -> Array:
    """A typed key, from a key or a seed.

    Args:
      key: ``jax.random.key(seed)``, or an integer from 0 to 2^64 - 1. Integers below 2^32 give the
        key ``jax.random.key(key)``.

    Raises:
      ValueError: an integer is out of range.
    """
    if not is_whole(key):
        return key  # type: ignore[return-value]  # noise.seed_words checks keys
    number = int(key)  # type: ignore[call-overload]
    if not 0 <= number < 2**64:
        raise ValueError(f"key={number}: must be an integer from 0 to 2**64 - 1")
    low, high = jax.device_put((np.uint32(number % 2**32), np.uint32(number >> 32)))
    return _key_of_words(low, high)


@jax.jit
def _key_of_words(low: Array, high: Array) -> Array:
    key = jax.random.key(low)
    # jax.random.key would drop the high word.
    folded = jax.random.key_data(jax.random.fold_in(key, high))
    data = jnp.where(high == 0, jax.random.key_data(key), folded)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def state(given: object) -> State:
    """Checks that a state comes from a strategy."""
    if isinstance(given, State):
        return given
    raise ValueError(
        "state: expected the State that es.init(params, key) or es.step returned, got "
        f"{type(given).__name__}"
    )


def quantised(plan: Plan, master_weights: bool | Literal["int8"]) -> None:
    """Checks that quantised int8 parameters have copies or rests, which hold fractions of a unit."""
    for leaf in plan.leaves:
        if leaf.keeps_copy and leaf.dtype == jnp.int8 and not master_weights:
            raise ValueError(
                f"master_weights=False: must be True or 'int8', since the int8 parameter {leaf.path!r} would "
                "round every update away"
            )


def _count_unfit(
    known: Mapping[str, Any], unfit: Mapping[str, Callable[[Any], Any]]
) -> dict[str, Array]:
    """How many entries of each array are unfit to start from."""
    count = lambda known: {path: jnp.sum(unfit[path](value)) for path, value in known.items()}
    return jax.jit(count)(known)


def parameters(plan: Plan, params: PyTree) -> None:
    """Checks that training can start from the values of the parameters, unless they are traced."""
    leaves = {
        leaf.path: (leaf, value)
        for leaf, value in zip(plan.leaves, jax.tree.leaves(params), strict=True)
        if (jnp.issubdtype(value.dtype, jnp.floating) or leaf.trainable)
        and not isinstance(value, jax.core.Tracer)
    }
    unfit = {path: leaf.arithmetic.unfit for path, (leaf, _) in leaves.items()}

    # If init is traced, constants among the parameters are still checked.
    with jax.ensure_compile_time_eval():
        known = {path: value for path, (_, value) in leaves.items()}
        counts = _count_unfit(known, unfit)
    for path, found in jax.device_get(counts).items():
        if found:
            leaf, value = leaves[path]
            wrong, right = leaf.arithmetic.unfit_reason()
            raise ValueError(
                f"parameter {path!r}: {found} of {value.size} entries are {wrong}: must be {right}"
            )


# ---------------------------------------------------------------- arguments of methods


def members(given: Any, population: int, axes: int) -> Array:
    """Indices of members as an int32 array with ``axes`` axes; values that are traced are not checked."""
    return _indices("member", given, population, population, axes)


def pairs(given: Any, population: int) -> Array:
    """Numbers of pairs as an int32 array; values that are traced are not checked."""
    found = _indices("pair", given, population // 2, population, axes=1)
    if not found.shape[0]:
        raise ValueError("pairs is empty: must have at least one number")
    return found


def _indices(what: str, given: Any, count: int, population: int, axes: int) -> Array:
    right = "a list of integers" if axes else "an integer"
    leaves = jax.tree.leaves(given)
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        whole = all(jnp.issubdtype(jax.dtypes.result_type(x), jnp.integer) for x in leaves)
        traced = jnp.asarray(given, jnp.int32)
        if traced.ndim != axes or not whole:
            kind = jax.dtypes.result_type(*leaves)
            raise ValueError(
                f"{what}: must be {right} from 0 to {count - 1}, got traced {kind}{list(traced.shape)}"
            )
        return traced
    ids = np.asarray(given)
    if ids.ndim != axes or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"{what} {given!r}: must be {right} from 0 to {count - 1}")
    wrong = ids[(ids < 0) | (ids >= count)].tolist()
    if wrong:
        raise ValueError(
            f"{what} {wrong[0]}: must be from 0 to {count - 1} in a population of {population}"
        )
    return jax.device_put(ids.astype(np.int32))


def generations(given: Any) -> Array:
    """The number of generations to run, as an int32 scalar."""
    if isinstance(given, jax.core.Tracer):
        return given.astype(jnp.int32)
    is_array = isinstance(given, jax.Array | np.ndarray)
    whole = is_whole(given.item() if is_array and given.ndim == 0 else given)
    if not whole or given < 0:
        shown = f"{given.dtype}{list(given.shape)}" if is_array and given.ndim else repr(given)
        raise ValueError(f"generations={shown}: must be an integer of at least 0")
    return jax.device_put(np.int32(given))


def scores(values: Any, population: int, integer: bool) -> Array:
    """Scores from any source as an array ``[population]`` or ``[population, tasks]``.

    Args:
      values: an array, or a list that may hold None instead of a score or of a member's scores.
      population: number of members.
      integer: whether integers stay int32, for integer noise.

    Raises:
      ValueError: the shape or the dtype is wrong.
    """
    if isinstance(values, np.ndarray) and values.dtype == object:
        values = values.tolist()
    if isinstance(values, list | tuple):
        values = _table(values, integer)
    shape = np.shape(values)
    if len(shape) not in (1, 2) or shape[0] != population or 0 in shape:
        raise ValueError(
            f"values: expected the shape [population] or [population, tasks] with population="
            f"{population}, got {list(shape)}"
        )
    if not isinstance(values, jax.Array):
        values = jax.device_put(np.asarray(values))
    if not is_real(values.dtype):
        raise ValueError(f"values: expected real numbers, got {values.dtype}")
    return values.astype(jnp.int32) if values.dtype == jnp.bool_ else values


def scalar(given: Any, dtype: type) -> Array:
    """A number as an array without axes and with this dtype; an array keeps its shape."""
    if isinstance(given, jax.Array):
        return given.astype(dtype)
    return jax.device_put(np.asarray(given, dtype))


def groups(given: Any, population: int) -> Int[Array, "population"] | None:
    """The group ids of the members, int ``[population]``, or None."""
    if given is None:
        return None
    ids = given if isinstance(given, jax.Array | np.ndarray) else np.asarray(given)
    if ids.shape != (population,) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"groups: expected integers of the shape [{population}], got {ids.dtype} of the shape "
            f"{list(ids.shape)}"
        )
    return ids if isinstance(ids, jax.Array) else jax.device_put(ids)


def member_data(members: PyTree, population: int) -> None:
    """Checks that each leaf of the members' data has a leading axis [population]."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(members)[0]:
        if jnp.shape(leaf)[:1] != (population,):
            raise ValueError(
                f"members{jax.tree_util.keystr(keys)}: expected a leading axis of population="
                f"{population}, got the shape {list(jnp.shape(leaf))}"
            )


def _table(values: list | tuple, integer: bool) -> np.ndarray:
    """Nested lists of scores as an array; None becomes NaN."""
    flat = all(v is None or np.ndim(v) == 0 for v in values)
    widths = {1 if np.ndim(v) == 0 else len(v) for v in values if v is not None} or {1}
    if len(widths) > 1:
        raise ValueError(
            f"values: expected rows of one length, a score a task, got lengths {sorted(widths)}"
        )
    (width,) = widths
    rows = [[None] * width if v is None else [v] if np.ndim(v) == 0 else list(v) for v in values]
    for v in (v for row in rows for v in row):
        if v is not None and not is_number(v):
            raise ValueError(f"values: expected numbers, or None for a missing score, got {v!r}")
    whole = all(is_whole(v) for row in rows for v in row)
    table = np.array(
        [[np.nan if v is None else v for v in row] for row in rows],
        np.int32 if whole and integer else np.float64,
    ).reshape(len(rows), width)
    return table[:, 0] if flat else table


def gradients(grads: Any, expected: Any) -> None:
    """Checks that gradients have the structure and shapes of the tree that the optimizer sees."""
    found: Any = jax.tree.structure(grads)
    right: Any = jax.tree.structure(expected)
    if found != right:
        raise ValueError(f"grads: expected the structure of es.gradient, {right}, got {found}")
    for (path, g), w in zip(
        jax.tree_util.tree_flatten_with_path(grads)[0], jax.tree.leaves(expected), strict=True
    ):
        if g.shape != w.shape:
            raise ValueError(
                f"grads{jax.tree_util.keystr(path)}: expected the shape {list(w.shape)}, got "
                f"{list(g.shape)}"
            )


def fitness(seen: dict[Any, tuple[int, int]], given: Any) -> None:
    """Warns if the same code arrives as a new fitness object every generation.

    Args:
      seen: for each code object, the identity of the last fitness and the number of distinct ones.
        Python does not reuse such an identity, since the compilation cache keeps the fitness alive.
      given: a function, a method, or either wrapped by jax.jit or functools.partial.

    Raises:
      ValueError: ``given`` is not callable.
    """
    if not callable(given):
        raise ValueError(f"fitness={given!r}: must be a function of (params, key, *args)")
    inner = inspect.unwrap(given.func if isinstance(given, functools.partial) else given)
    code = getattr(inner, "__code__", None)
    if code is None:
        return
    # Every look-up of a method makes a new object; the instance identifies it.
    identity = id(getattr(given, "__self__", given))
    last, count = seen.get(code, (None, 0))
    if last == identity:
        return
    seen[code] = (identity, count + 1)
    if count + 1 == 4:
        warnings.warn(
            f"fitness {getattr(inner, '__qualname__', inner)!r} is a new object for the fourth "
            "time and is compiled again each time; define it once and pass changing values as "
            "arguments",
            stacklevel=3,
        )
