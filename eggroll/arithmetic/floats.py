"""Float parameters: noise is added, estimates are means, narrow weights have float32 copies."""

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Array as AnyArray
from jaxtyping import Bool, Float, Int, Num, PyTree

from eggroll import values
from eggroll._types import DType
from eggroll.arithmetic._interface import (
    Arithmetic,
    Outcome,
    Shape,
    Sigma,
    Statistics,
    Weighed,
    kept,
    step_optimizer,
)
from eggroll.arithmetic._statistics import statistics, valid_pairs
from eggroll.credit import Credit
from eggroll.shaping import Shaping
from eggroll.values import LowRank, Upcast, accumulator, is_integer, is_narrow

# Up to this bound, the squares of a gradient that optimizers compute are finite in float32.
LARGEST_SUM = 1e17


class Floats(Arithmetic):
    """The arithmetic of float parameters (arXiv 2511.16652, section 4)."""

    sign_type = jnp.float32
    exact_sums = False
    metrics_inside = True
    of_values: values.ValueArithmetic = values.FLOATS

    def factor_type(self, dtype: DTypeLike) -> DTypeLike:
        return dtype

    def dense_type(self, dtype: DTypeLike) -> DTypeLike:
        # At least float32, since dense noise is added to the weight.
        return self.sum_type(dtype)

    def dense_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return (shape,)

    def sum_type(self, dtype: DTypeLike) -> DTypeLike:
        return accumulator(dtype)

    def keeps_copy(self, dtype: DTypeLike) -> bool:
        return is_narrow(dtype)

    def low_rank(
        self,
        w: Array,
        factors: tuple[Array, ...],
        sign: Num[AnyArray, ""],
        sigma: Sigma,
        leaf_sigma: float,
        root_rank: float,
        path: str,
    ) -> LowRank:
        scale = sign * _scale(sigma, leaf_sigma, root_rank)
        return LowRank(w, factors, scale, (path,), arithmetic=self.of_values)

    def dense(
        self,
        w: Array,
        noise: tuple[Array, ...],
        sign: Num[AnyArray, ""],
        sigma: Sigma,
        leaf_sigma: float,
        path: str,
    ) -> Array | Upcast:
        sums = self.sum_type(w.dtype)
        value = w.astype(sums) + (sign * _scale(sigma, leaf_sigma, 1.0)).astype(sums) * noise[0]
        return Upcast(value, w.dtype) if self.keeps_copy(w.dtype) else value

    def product_type(self, dtype: DTypeLike) -> DTypeLike:
        return self.sum_type(dtype)

    def sum_dense(
        self, noise: tuple[Num[AnyArray, "pairs ..."], ...], weights: Num[AnyArray, "pairs"]
    ) -> Num[AnyArray, "..."]:
        return jnp.tensordot(weights, noise[0], 1)

    def pairs_in_sum(self, rank: int) -> int | None:
        return None

    def gradient(
        self,
        total: Array,
        leaf_sigma: float,
        root_rank: float,
        sigma: Sigma,
        members: Int[AnyArray, ""],
        root_subspaces: float = 1.0,
    ) -> Array:
        count = jnp.maximum(members, 1).astype(jnp.float32)
        factor = root_subspaces / (root_rank * leaf_sigma * sigma * count)
        return -total * factor.astype(total.dtype)

    def in_range(self, trained: Array) -> Array:
        return trained

    def stored(self, trained: Array, dtype: DTypeLike) -> Array:
        return trained.astype(dtype)

    def unfit(self, w: Array) -> Bool[AnyArray, "..."]:
        return ~jnp.isfinite(w)

    def unfit_reason(self) -> tuple[str, str]:
        return "not finite", "finite numbers"

    # ------------------------------------------------------------ a whole generation

    def check_settings(self, sigma: object, shaping: Shaping | None, agreement: bool) -> None:
        """Floats support every setting."""

    def check_leaf(self, path: str, dtype: DType, trained_by: Arithmetic | None) -> None:
        if trained_by is not None and is_integer(dtype) and not trained_by.keeps_copy(dtype):
            raise ValueError(
                f"parameter {path!r} is int8: must be trained with integer noise, by "
                "eggroll.integer.strategy(...)"
            )

    def noise_sigma(self, setting: object, sigma: Float[AnyArray, ""]) -> Sigma:
        return sigma

    def scores(self, values: Num[AnyArray, "..."] | Bool[AnyArray, "..."]) -> Num[AnyArray, "..."]:
        floating = jnp.issubdtype(values.dtype, jnp.floating)
        return values if floating else values.astype(jnp.float32)

    def weigh(
        self,
        values: Num[AnyArray, "population _"],
        groups: Int[AnyArray, "population"] | None,
        shaping: Shaping | None,
        sigma: Sigma,
        rows: bool,
    ) -> Weighed:
        if not jnp.issubdtype(values.dtype, jnp.floating) or is_narrow(values.dtype):
            values = values.astype(jnp.float32)
        paired = valid_pairs(values)
        valid = jnp.repeat(paired, 2, axis=0)
        clean = jnp.where(valid, values, 0)
        shaped = clean if shaping is None else shaping(clean, valid, groups)
        if jnp.shape(shaped) != clean.shape:
            raise ValueError(
                f"shaping: expected weights of the shape {list(clean.shape)}, as the scores, got "
                f"{list(jnp.shape(shaped))}"
            )
        # Tied members contribute exactly zero, even if a shaping rounds equal scores differently.
        says = paired & (values[0::2] != values[1::2])
        if groups is not None:
            says |= paired & (groups[0::2] != groups[1::2])[:, None]
        differences = jnp.where(says, shaped[0::2] - shaped[1::2], 0)
        weights = differences.mean(1)
        # Nothing moves if sums would overflow: raw scores near the largest float, or a sigma
        # schedule that reached zero. A NaN size compares False.
        used = differences / differences.shape[1] if rows else weights
        size = jnp.abs(used.astype(jnp.float32)).sum() / jnp.abs(sigma)
        moves = jnp.any(used != 0) & (size < LARGEST_SUM)
        members = 2 * paired.any(1).sum(dtype=jnp.int32)
        return Weighed(weights, members, moves, statistics(values), differences)

    def credit(
        self, how: Credit, differences: Num[AnyArray, "pairs rows"]
    ) -> tuple[Num[AnyArray, "pairs rows"], Num[AnyArray, "pairs"]]:
        # The objective is the mean over rows.
        differences = differences / differences.shape[1]
        return how(differences), differences.sum(1)

    def move(
        self,
        optimizer: optax.GradientTransformation,
        grads: PyTree,
        state: PyTree,
        trained: PyTree,
        moves: Bool[AnyArray, ""],
        members: Int[AnyArray, ""],
        value: Num[AnyArray, ""] | None,
    ) -> tuple[PyTree, PyTree, Num[AnyArray, ""]]:
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, trained)
        extra = {} if value is None else {"value": value}
        updates, new_state = step_optimizer(optimizer, grads, state, trained, **extra)
        new = kept(moves, optax.apply_updates(trained, updates), trained)
        change = jax.tree.map(lambda a, b: (a - b).astype(jnp.float32), new, trained)
        return new, kept(moves, new_state, state), optax.tree.norm(change)

    def value(self, weighed: Weighed) -> Float[AnyArray, ""] | None:
        return -weighed.report.mean if isinstance(weighed.report, Statistics) else None

    def statistics(self, outcome: Outcome) -> tuple[Statistics | None, Float[AnyArray, ""]]:
        report = outcome.report
        return (report if isinstance(report, Statistics) else None), outcome.change


def _scale(sigma: Sigma, leaf_sigma: float, root_rank: float) -> Array:
    """The sigma of a leaf over the square root of the rank: the factor on ``sum_r A_r B_r``."""
    return jnp.asarray(sigma) * (leaf_sigma / root_rank)
