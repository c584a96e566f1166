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
import optax
from jax import Array

from eggroll import integer_generation
from eggroll import noise as noises
from eggroll import plan as plans
from eggroll import shaping as shapings
from eggroll.exchange import Auto
from eggroll.generation import is_real
from eggroll.population.placement import check_mesh
from eggroll.values.fixed_point import LARGEST


def is_whole(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    """Whether it is one real number, be it as an array without axes."""
    if isinstance(x, jax.Array | np.ndarray):
        return x.ndim == 0 and is_real(x.dtype)
    return isinstance(x, numbers.Real | np.bool_)


def is_positive(x: Any) -> bool:
    return is_number(x) and math.isfinite(x) and bool(x > 0)


def settings(es: Any) -> None:
    """The fields of an EvolutionStrategy."""

    def require(field: str, ok: bool, right: str) -> None:
        if not ok:
            raise ValueError(f"{field}={getattr(es, field)!r}: {right} is right")

    even = lambda x: is_whole(x) and x >= 2 and x % 2 == 0
    require(
        "population",
        even(es.population),
        "members come in pairs with opposite noise, so an even number of at least 2",
    )
    require(
        "sigma",
        callable(es.sigma) or is_positive(es.sigma),
        "a positive number or a schedule over generations",
    )
    require(
        "rank",
        es.rank == "full" or (is_whole(es.rank) and es.rank >= 1),
        "a whole number of at least 1, or 'full' for dense noise,",
    )
    require(
        "chunk",
        es.chunk is None or even(es.chunk),
        "an even number of members of at least 2, or None for all at once,",
    )
    require(
        "noise_reuse",
        is_whole(es.noise_reuse) and es.noise_reuse >= 1,
        "a whole number of generations of at least 1",
    )
    require("on_dense", es.on_dense in ("error", "warn", "ignore"), "'error', 'warn' or 'ignore'")
    if es.deterministic and es.exchange not in ("update", "fitness"):
        raise ValueError(
            f"exchange={es.exchange!r}: what deterministic=True sends is not counted; 'update' or 'fitness' "
            "is right"
        )
    require(
        "exchange",
        es.exchange in ("update", "fitness", "auto") or isinstance(es.exchange, Auto),
        "'update', 'fitness', 'auto' or eggroll.exchange.auto(bandwidth, flops)",
    )
    require(
        "factor_memory",
        is_number(es.factor_memory) and es.factor_memory >= 0,
        "a number of bytes, 0 for none,",
    )
    require(
        "optimizer",
        isinstance(es.optimizer, optax.GradientTransformation),
        "an optax transform such as optax.adam(1e-2)",
    )
    for field, module in (("shaping", shapings), ("plan", plans), ("noise", noises)):
        value = getattr(es, field)
        name = getattr(value, "__name__", "")
        made_here = bool(name) and getattr(module, name, None) is value
        require(field, not made_here, f"this is the function that makes one; {name}()")
    require(
        "shaping",
        es.shaping is None or callable(es.shaping),
        "one of eggroll.shaping such as zscore(), or None for the scores as they are,",
    )
    require(
        "plan",
        callable(es.plan),
        "eggroll.plan.by_shape(overrides) or eggroll.plan.infer(fitness, params, *args)",
    )
    require("noise", isinstance(es.noise, noises.Noise), "one of eggroll.noise such as counter()")
    if es.noise.integer:
        integer_generation.check_settings(es)
    check_mesh(es.mesh)


def quantised(plan: plans.Plan, master_weights: bool) -> None:
    """That int8 parameters beside float ones have copies which can hold a part of a step."""
    for leaf in plan.leaves:
        if leaf.quantised and not master_weights:
            raise ValueError(
                f"master_weights=False: parameter {leaf.path!r} is int8 and would round every update "
                "away; True is right"
            )


def parameters(plan: plans.Plan, params: Any) -> None:
    """That parameters start from numbers that training can go on from (where they are known)."""
    known = {
        leaf.path: value
        for leaf, value in zip(plan.leaves, jax.tree.leaves(params), strict=True)
        if (plans.is_float(value) or (leaf.trainable and value.dtype == jnp.int8))
        and not isinstance(value, jax.core.Tracer)
    }
    # Constants are looked at also where init itself is traced.
    with jax.ensure_compile_time_eval():
        counts = _count_unfit(known)
    for path, count in counts.items():
        if count:
            wrong, right = "not finite", "finite numbers"
            if known[path].dtype == jnp.int8:
                wrong, right = "-128", f"-{LARGEST} to {LARGEST}"
            raise ValueError(
                f"parameter {path!r} has {count} of {known[path].size} entries that are {wrong}; "
                f"start from {right}"
            )


@jax.jit
def _count_unfit(leaves: dict[str, Array]) -> dict[str, Array]:
    unfit = lambda x: ~jnp.isfinite(x) if plans.is_float(x) else x < -LARGEST
    return {path: jnp.sum(unfit(value)) for path, value in leaves.items()}


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
    return jnp.asarray(ids, jnp.int32)


def generations(given: Any) -> None:
    """A number of generations to run."""
    if isinstance(given, jax.core.Tracer):
        return
    is_array = isinstance(given, jax.Array | np.ndarray)
    whole = is_whole(given.item() if is_array and given.ndim == 0 else given)
    if not whole or given < 0:
        told = f"{given.dtype}{list(given.shape)}" if is_array and given.ndim else repr(given)
        raise ValueError(f"generations={told}: a whole number of at least 0 is right")


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
    values = jnp.asarray(values)
    if not is_real(values.dtype):
        raise ValueError(f"values have the type {values.dtype}; real numbers are right")
    return values


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
    )
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
