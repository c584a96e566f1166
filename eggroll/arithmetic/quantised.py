"""Quantised int8 parameters beside float parameters: float noise in units of their steps."""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Array as AnyArray
from jaxtyping import Bool, Num

from eggroll import values
from eggroll.arithmetic._interface import Sigma
from eggroll.arithmetic.floats import Floats, _scale
from eggroll.values import Upcast
from eggroll.values.fixed_point import LARGEST


class Quantised(Floats):
    """The arithmetic of an int8 parameter that is trained beside float parameters.

    A float32 copy is trained, and the parameter is the copy rounded to int8. Factors are float32; a
    model that casts the parameter to bfloat16 casts the factors too.
    """

    of_values = values.QUANTISED

    def factor_type(self, dtype: DTypeLike) -> DTypeLike:
        return jnp.dtype(jnp.float32)

    def sum_type(self, dtype: DTypeLike) -> DTypeLike:
        return jnp.dtype(jnp.float32)

    def keeps_copy(self, dtype: DTypeLike) -> bool:
        return True

    def dense(
        self,
        w: Array,
        noise: tuple[Array, ...],
        sign: Num[AnyArray, ""],
        sigma: Sigma,
        leaf_sigma: float,
        path: str,
    ) -> Array | Upcast:
        value = w.astype(jnp.float32) + sign * _scale(sigma, leaf_sigma, 1.0) * noise[0]
        return Upcast(value, w.dtype)

    def in_range(self, trained: Array) -> Array:
        return jnp.clip(trained, -LARGEST, LARGEST)

    def stored(self, trained: Array, dtype: DTypeLike) -> Array:
        return jnp.round(trained).astype(dtype)

    def unfit(self, w: Array) -> Bool[AnyArray, "..."]:
        return w < -LARGEST

    def unfit_reason(self) -> tuple[str, str]:
        return "-128", f"-{LARGEST} to {LARGEST}"
