"""``shard_alike``: an array that XLA shards as another; JAX 0.11 no longer has it."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import sdy
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

_alike = Primitive("shard_alike")
_group = itertools.count()


def shard_alike(x: Array, like: Array) -> Array:
    """``x``, which XLA shards as ``like``.

    Args:
      x: an array.
      like: an array of its shape.
    """
    if x.shape != like.shape:
        raise ValueError(f"shard_alike: expected shape {like.shape}, got {x.shape}")
    return _alike.bind(x, like)


def _lowered(ctx: mlir.LoweringRuleContext, x: Any, like: Any) -> Sequence[Any]:
    if not getattr(jax.config, "jax_use_shardy_partitioner", True):
        return [x]  # GSPMD, XLA's older partitioner, has no such groups and chooses by itself
    number = next(_group)
    for value in (x, like):
        sdy.sharding_group(value, number)
    return [x]


def _batched(values: tuple[Array, Array], axes: tuple[int | None, int | None]) -> tuple[Array, int]:
    size = next(x.shape[axis] for x, axis in zip(values, axes, strict=True) if axis is not None)
    x, like = (
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(values, axes, strict=True)
    )
    return shard_alike(x, like), 0


def _transposed(cotangent: Array, x: Any, like: Array) -> list[Array | None]:
    return [cotangent, None]


_alike.def_impl(jax.jit(_alike.bind))
_alike.def_abstract_eval(lambda x, like: x)
mlir.register_lowering(_alike, _lowered)
batching.primitive_batchers[_alike] = _batched
ad.defjvp(_alike, lambda tangent, x, like: _alike.bind(tangent, like), None)
ad.primitive_transposes[_alike] = _transposed
