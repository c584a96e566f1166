"""What users hand to a strategy, checked where it comes in.

Each wrong thing is a ValueError of one sentence that names the field or the parameter, what it is, and
what would be right.
"""

import functools
import inspect
import math
import numbers
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Int, PyTree

from eggroll.plan.leaf import Plan
from eggroll.state import State


def is_whole(x: object) -> bool:
    """Whether it is a whole number, and no truth value."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def is_even(x: object) -> bool:
    """Whether it is an even whole number of at least 2."""
    return isinstance(x, int | np.integer) and is_whole(x) and bool(x >= 2 and x % 2 == 0)


def is_real(dtype: DTypeLike) -> bool:
    """Whether arrays of the type hold real numbers or truth values."""
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def is_number(x: object) -> bool:
    """Whether it is one real number, be it as an array without axes."""
    if isinstance(x, jax.Array | np.ndarray):
        return x.ndim == 0 and is_real(x.dtype)
    return isinstance(x, numbers.Real | np.bool_)


def is_positive(x: Any) -> bool:
    """Whether it is one positive, finite number."""
    return is_number(x) and math.isfinite(x) and bool(x > 0)


# ---------------------------------------------------------------- what a run starts from


def seed(key: object) -> Array:
    """A typed key from a key or a seed.

    Args:
      key: ``jax.random.key(seed)``, or a whole number from 0 to 2^64 - 1. Numbers below 2^32 give what
        ``jax.random.key`` gives.
    """
    if not is_whole(key):
        return key  # type: ignore[return-value]  # noise.seed_words says what is wrong with it
    number = int(key)  # type: ignore[call-overload]
    if not 0 <= number < 2**64:
        raise ValueError(f"key={number}: a seed from 0 to 2**64 - 1 is right")
    low, high = jax.device_put((np.uint32(number % 2**32), np.uint32(number >> 32)))
    return _key_of_words(low, high)


@jax.jit
def _key_of_words(low: Array, high: Array) -> Array:
    key = jax.random.key(low)
    # jax.random.key alone would drop the high word.
    folded = jax.random.key_data(jax.random.fold_in(key, high))
    data = jnp.where(high == 0, jax.random.key_data(key), folded)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def state(given: object) -> State:
    """A state of a strategy."""
    if isinstance(given, State):
        return given
    raise ValueError(
        f"state is a {type(given).__name__}; what es.init(params, key) or the step before returned "
        "is right"
    )


def quantised(plan: Plan, master_weights: bool) -> None:
    """That int8 parameters beside float ones have copies which can hold a part of a step."""
    for leaf in plan.leaves:
        if leaf.keeps_copy and leaf.dtype == jnp.int8 and not master_weights:
            raise ValueError(
                f"master_weights=False: parameter {leaf.path!r} is int8 and would round every update "
                "away; True is right"
            )


def parameters(plan: Plan, params: PyTree) -> None:
    """That parameters start from numbers that training can go on from (where they are known)."""
    leaves = {
        leaf.path: (leaf, value)
        for leaf, value in zip(plan.leaves, jax.tree.leaves(params), strict=True)
        if (jnp.issubdtype(value.dtype, jnp.floating) or leaf.trainable)
        and not isinstance(value, jax.core.Tracer)
    }
    unfit = {path: leaf.arithmetic.unfit for path, (leaf, _) in leaves.items()}

    @jax.jit
    def count(known: dict[str, Array]) -> dict[str, Array]:
        return {path: jnp.sum(unfit[path](value)) for path, value in known.items()}

    # Constants are looked at also where init itself is traced.
    with jax.ensure_compile_time_eval():
        counts = count({path: value for path, (_, value) in leaves.items()})
    for path, found in jax.device_get(counts).items():
        if found:
            leaf, value = leaves[path]
            wrong, right = leaf.arithmetic.unfit_reason()
            raise ValueError(
                f"parameter {path!r} has {found} of {value.size} entries that are {wrong}; "
                f"start from {right}"
            )


# ---------------------------------------------------------------- what methods are given


def members(given: Any, population: int, axes: int) -> Array:
    """Numbers of members as an int32 array with so many axes; traced ones are taken as they are."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(given)):
        return jnp.asarray(given, jnp.int32)
    ids = np.asarray(given)
    if ids.ndim != axes or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        right = f"a list of whole numbers below {population}" if axes else "a whole number"
        raise ValueError(f"member {given!r} of a population of {population}: {right} is right")
    wrong = ids[(ids < 0) | (ids >= population)].tolist()
    if wrong:
        raise ValueError(
            f"member {wrong[0]} of a population of {population}: 0 to {population - 1} is right"
        )
    return jax.device_put(ids.astype(np.int32))


def generations(given: Any) -> Array:
    """A number of generations to run, as an int32 scalar."""
    if isinstance(given, jax.core.Tracer):
        return given.astype(jnp.int32)
    is_array = isinstance(given, jax.Array | np.ndarray)
    whole = is_whole(given.item() if is_array and given.ndim == 0 else given)
    if not whole or given < 0:
        told = f"{given.dtype}{list(given.shape)}" if is_array and given.ndim else repr(given)
        raise ValueError(f"generations={told}: a whole number of at least 0 is right")
    return jax.device_put(np.int32(given))


def scores(values: Any, population: int, integer: bool) -> Array:
    """Scores from anywhere as an array ``[population]`` or ``[population, tasks]``.

    Args:
      values: an array, or a list that may hold None in the place of a score or of a member's scores.
      population: how many members there are.
      integer: whether whole numbers stay integers, for integer noise.
    """
    if isinstance(values, np.ndarray) and values.dtype == object:
        values = values.tolist()
    if isinstance(values, list | tuple):
        values = _table(values, integer)
    shape = np.shape(values)
    if len(shape) not in (1, 2) or shape[0] != population or 0 in shape:
        raise ValueError(
            f"values have the shape {list(shape)}; [population] or [population, tasks] with "
            f"population={population} is right"
        )
    if not isinstance(values, jax.Array):
        values = jax.device_put(np.asarray(values))
    if not is_real(values.dtype):
        raise ValueError(f"values have the type {values.dtype}; real numbers are right")
    return values.astype(jnp.int32) if values.dtype == jnp.bool_ else values


def scalar(given: Any, dtype: type) -> Array:
    """A number as an array without axes; arrays are taken as they are, in the type."""
    if isinstance(given, jax.Array):
        return given.astype(dtype)
    return jax.device_put(np.asarray(given, dtype))


def groups(given: Any, population: int) -> Int[Array, "population"] | None:
    """Numbers of groups, one a member."""
    if given is None:
        return None
    ids = given if isinstance(given, jax.Array | np.ndarray) else np.asarray(given)
    if ids.shape != (population,) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"groups have the shape {list(ids.shape)} and the type {ids.dtype}; a whole "
            f"number a member, [{population}], is right"
        )
    return ids if isinstance(ids, jax.Array) else jax.device_put(ids)


def member_data(members: PyTree, population: int) -> None:
    """Data of members: leaves with a leading axis [population]."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(members)[0]:
        if jnp.shape(leaf)[:1] != (population,):
            raise ValueError(
                f"members{jax.tree_util.keystr(keys)} has the shape {list(jnp.shape(leaf))}; a "
                f"leading axis of population={population} is right"
            )


def _table(values: list | tuple, integer: bool) -> np.ndarray:
    """Scores in lists as an array, NaN where there is None."""
    flat = all(v is None or np.ndim(v) == 0 for v in values)
    widths = {1 if np.ndim(v) == 0 else len(v) for v in values if v is not None} or {1}
    if len(widths) > 1:
        raise ValueError(
            f"values hold rows of lengths {sorted(widths)}; one score a task for every member is right"
        )
    (width,) = widths
    rows = [[None] * width if v is None else [v] if np.ndim(v) == 0 else list(v) for v in values]
    for v in (v for row in rows for v in row):
        if v is not None and not is_number(v):
            raise ValueError(f"values hold {v!r}; a number, or None where there is none, is right")
    whole = all(is_whole(v) for row in rows for v in row)
    table = np.array(
        [[np.nan if v is None else v for v in row] for row in rows],
        np.int32 if whole and integer else np.float64,
    ).reshape(len(rows), width)
    return table[:, 0] if flat else table


def gradients(grads: Any, expected: Any) -> None:
    """That gradients form the tree that the optimizer sees, of the same shapes."""
    found: Any = jax.tree.structure(grads)
    right: Any = jax.tree.structure(expected)
    if found != right:
        raise ValueError(
            f"grads have the structure {found}; that of es.gradient, {right}, is right"
        )
    for (path, g), w in zip(
        jax.tree_util.tree_flatten_with_path(grads)[0], jax.tree.leaves(expected), strict=True
    ):
        if g.shape != w.shape:
            raise ValueError(
                f"grads{jax.tree_util.keystr(path)} has the shape {list(g.shape)}; {list(w.shape)} "
                "is right"
            )


def fitness(seen: dict[Any, tuple[int, int]], given: Any) -> None:
    """Warns where every generation brings a new fitness object of the same code.

    Args:
      seen: for each code the identity of the last object, and how many there were. An identity is not
        given out a second time, since the compilation cache keeps its object alive.
      given: a function, a method, or either wrapped by jax.jit or functools.partial.
    """
    if not callable(given):
        raise ValueError(f"fitness={given!r}: a function of (params, key, *args) is right")
    inner = inspect.unwrap(given.func if isinstance(given, functools.partial) else given)
    code = getattr(inner, "__code__", None)
    if code is None:
        return
    # A method is a new object whenever it is looked up, but equal to the last one.
    identity = id(getattr(given, "__self__", given))
    last, count = seen.get(code, (None, 0))
    if last == identity:
        return
    seen[code] = (identity, count + 1)
    if count + 1 == 4:
        warnings.warn(
            f"fitness {getattr(inner, '__qualname__', inner)!r} is a new object for the fourth time "
            "and is compiled anew each time; define it once and pass what changes as arguments",
            stacklevel=3,
        )
