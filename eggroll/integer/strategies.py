"""Evolution strategies for int8 parameters: the same strategy, with not one float in a generation.

A model is any function of plain ``jnp`` integer operations on a tree of int8 arrays in [-127, 127], whose
fixed point is that of arXiv 2511.16652 (integer pretraining): 16 stands for 1. The perturbed integer
operations are the definition of a member (:mod:`eggroll.values.fixed_point`): a product with a matrix is
``x W + sign * (((x B) A) >> (4 + s))`` in int32, a looked-up row or a vector is rounded to int8. What
has no such rule is an error that names the parameter and the operation.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core
from jax.typing import DTypeLike
from jaxtyping import Int8, UInt32

from eggroll import noise, shaping
from eggroll.integer.threshold import error_feedback as error_feedback
from eggroll.integer.threshold import inverse_decay as inverse_decay
from eggroll.integer.threshold import momentum as momentum
from eggroll.integer.threshold import threshold as threshold
from eggroll.noise import Noise
from eggroll.strategy import EvolutionStrategy
from eggroll.values.fixed_point import LARGEST


def strategy(
    *, population: int, optimizer: Any, shift: int = 4, rank: int | str = 1, **settings: Any
) -> EvolutionStrategy:
    """An :class:`EvolutionStrategy` for int8 parameters.

    Args:
      population: number of members, even.
      optimizer: :func:`threshold`, or a chain that ends with it.
      shift: sigma is ``2^-shift`` (in units of 1, which is 16): -4 to 12.
      rank: rank of the noise of matrices.
      **settings: whatever else an EvolutionStrategy has: ``chunk``, ``mesh``, ``plan``, ...

    Returns:
      ``EvolutionStrategy(noise=normal(), shaping=pair_sign(), sigma=2**-shift, ...)``.

    Example:
      Learns which of 16 inputs to add up, by matching sums.

      >>> def fitness(params, key, x, y):
      ...     return -jnp.abs((jax.lax.dot(x, params["w"], preferred_element_type=jnp.int32) >> 4) - y).sum()
      >>> x = jax.random.randint(jax.random.key(0), (32, 16), -64, 65, jnp.int8)
      >>> y = x[:, :8].astype(jnp.int32) @ jnp.ones((8, 4), jnp.int32)
      >>> es = strategy(population=64, optimizer=threshold(0.3))
      >>> state = es.init({"w": jnp.zeros((16, 4), jnp.int8)}, jax.random.key(1))
      >>> start = fitness(es.params(state), None, x, y)
      >>> state = es.optimize(state, fitness, 100, x, y)
      >>> bool(fitness(es.params(state), None, x, y) > start / 5)
      True
    """
    settings = {"noise": normal(), "shaping": shaping.pair_sign(), **settings}
    return EvolutionStrategy(
        population=population, optimizer=optimizer, sigma=2.0**-shift, rank=rank, **settings
    )


def normal() -> Noise:
    """Integer normal noise: int8 factors ``[rank, ...]`` of ``round(16 rank^(-1/4) N(0, 1))``.

    The product of two factors, summed over the rank, then has the same spread for every rank. A
    counter hash gives 16 bits a sample and a table of 64 KiB turns them into the law, exact to 2^-17
    in every probability; the largest value is 69. Sample ``i`` of an array depends on its key and
    ``i`` alone.

    Raises (from ``sample``):
      ValueError: for a dtype that is not int8.

    Example:
      >>> x = normal().sample(jnp.array([1, 2], jnp.uint32), (1, 1000, 1000), jnp.int8)
      >>> y = normal().sample(jnp.array([1, 2], jnp.uint32), (16, 1000, 100), jnp.int8)
      >>> print(f"{x.std():.1f} {y.std():.1f} {x.max()}")
      16.0 8.0 69
    """
    return Noise("integer normal", _normal, integer=True)


def float_operations(fn: Callable[..., Any], *args: Any) -> list[str]:
    """The operations with a float in or out that the outputs of ``fn(*args)`` depend on.

    Walks the traced program, bodies of loops, branches and calls included. A call as a whole counts
    where one of its outputs is used, so the list may hold too much, but never too little.

    Args:
      fn: any traceable function; what it returns is what is looked at.
      *args: arrays, or ``jax.ShapeDtypeStruct``.

    Returns:
      A line each, ``"exp: float32[4] -> float32[4]"``; empty is the proof.

    Example:
      >>> float_operations(lambda x: (x * 2) >> 1, jnp.arange(3))
      []
      >>> float_operations(lambda x: (x * 0.5).astype(jnp.int32), jnp.arange(3))[0]
      'convert_element_type: int32[3] -> float32[3]'
    """
    closed = jax.make_jaxpr(fn)(*args)
    return [_line(eqn) for eqn in _used(closed.jaxpr) if _has_float(eqn)]


def _used(jaxpr: core.Jaxpr) -> Iterator[Any]:
    """The equations that the outputs depend on, and all those inside of them."""
    wanted = {id(v) for v in jaxpr.outvars}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(id(v) in wanted for v in eqn.outvars):
            wanted.update(id(v) for v in eqn.invars)
            kept.append(eqn)
    for eqn in reversed(kept):
        yield eqn
        for inner in _bodies(list(eqn.params.values())):
            yield from _used(inner)


def _bodies(value: Any) -> Iterator[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _bodies(part)


def _has_float(eqn: Any) -> bool:
    return any(_is_float(v) for v in (*eqn.invars, *eqn.outvars))


def _is_float(v: Any) -> bool:
    dtype = getattr(v.aval, "dtype", None)
    return dtype is not None and (
        jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.complexfloating)
    )


def _line(eqn: Any) -> str:
    told = lambda vs: ", ".join(v.aval.str_short() for v in vs)
    return f"{eqn.primitive.name}: {told(eqn.invars)} -> {told(eqn.outvars)}"


# ---------------------------------------------------------------- the law of the noise


def _quantiles(rank: int) -> Int8[np.ndarray, "65536"]:
    """``round(16 rank^(-1/4) Phi^-1((u + 1/2) / 2^16))`` for every u, from the ends of the roundings."""
    std = 16 * rank**-0.25
    # u rounds to v or more where (u + 1/2) / 2^16 is above Phi((v - 1/2) / std).
    edges = [(1 + math.erf((v - 0.5) / (std * 2**0.5))) / 2 for v in range(1, LARGEST + 1)]
    upper = np.searchsorted(edges, (np.arange(2**15, 2**16) + 0.5) / 2**16)
    return np.concatenate([-upper[::-1], upper]).astype(np.int8)


def _normal(words: UInt32[Array, "2"], shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    if dtype != jnp.int8:
        raise ValueError(f"integer noise is drawn in int8, not {jnp.dtype(dtype).name}")
    size = math.prod(shape)
    bits = noise.bits_at(words[0], words[1], lax.iota(jnp.uint32, (size + 1) // 2))
    halves = lax.bitcast_convert_type(bits, jnp.uint16).reshape(-1)[:size]
    table = jnp.asarray(_quantiles(shape[0]))
    return table.at[halves].get(mode="promise_in_bounds").reshape(shape)
