"""Integer parameters: int8 noise, votes of pairs and updates by one unit, without float operations.

The next state depends on integer arithmetic alone: the signs of the pairs, the sum
``Z = sum_p F_p A_p B_p`` and the optimizer. Metrics are floats; a separate program computes them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Array as AnyArray
from jaxtyping import Bool, Float, Int, Int8, Int32, Num, PyTree

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
from eggroll.arithmetic._statistics import statistics
from eggroll.credit import Credit
from eggroll.shaping import Shaping, pair_sign
from eggroll.values import FixedPoint, LowRank, build, fixed_point
from eggroll.values.fixed_point import LARGEST


class Integers(Arithmetic):
    """The arithmetic of int8 parameters (arXiv 2511.16652, integer pretraining)."""

    sign_type = jnp.int32
    exact_sums = True
    metrics_inside = False

    def factor_type(self, dtype: DTypeLike) -> DTypeLike:
        return dtype

    def dense_type(self, dtype: DTypeLike) -> DTypeLike:
        return dtype

    def dense_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        # A product of two factors, so that its law is the same as for matrices at rank 1.
        return ((1, *shape),) * 2

    def sum_type(self, dtype: DTypeLike) -> DTypeLike:
        return jnp.int32

    def keeps_copy(self, dtype: DTypeLike) -> bool:
        return False

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
        # The factors are already scaled by the rank.
        shift = fixed_point.shift_of(float(sigma) * leaf_sigma)
        return LowRank(w, factors, sign, (path,), arithmetic=FixedPoint(shift))

    def dense(
        self,
        w: Array,
        noise: tuple[Array, ...],
        sign: Num[AnyArray, ""],
        sigma: Sigma,
        leaf_sigma: float,
        path: str,
    ) -> Array:
        return build(self.low_rank(w, noise, sign, sigma, leaf_sigma, 1.0, path))

    def product_type(self, dtype: DTypeLike) -> DTypeLike:
        # int8 operands with int32 sums: a product of int32 operands is several times slower.
        return dtype

    def sum_dense(
        self, noise: tuple[Num[AnyArray, "pairs ..."], ...], weights: Num[AnyArray, "pairs"]
    ) -> Num[AnyArray, "..."]:
        a, b = (x[:, 0].astype(jnp.int32) for x in noise)
        d = weights.reshape(-1, *(1,) * (a.ndim - 1)).astype(jnp.int32)
        return (a * b * d).sum(0, dtype=jnp.int32)

    def pairs_in_sum(self, rank: int) -> int | None:
        return fixed_point.pairs_in_int32(rank)

    def gradient(
        self,
        total: Array,
        leaf_sigma: float,
        root_rank: float,
        sigma: Sigma,
        members: Int[AnyArray, ""],
        root_subspaces: float = 1.0,
    ) -> Array:
        # The optimizer applies the scale; it expects the spread of a sum over all decided pairs.
        if root_subspaces > 1:
            times = int(root_subspaces)
            limit = fixed_point.INT32_MAX // times
            total = jnp.clip(total, -limit, limit) * times
        return -total

    def in_range(self, trained: Array) -> Array:
        return trained

    def stored(self, trained: Array, dtype: DTypeLike) -> Array:
        return trained.astype(dtype)

    def unfit(self, w: Array) -> Bool[AnyArray, "..."]:
        return w < -LARGEST

    def unfit_reason(self) -> tuple[str, str]:
        return "-128", f"-{LARGEST} to {LARGEST}"

    # ------------------------------------------------------------ a whole generation

    def check_settings(self, sigma: object, shaping: Shaping | None, agreement: bool) -> None:
        if callable(sigma):
            raise ValueError(
                f"sigma={sigma!r}: must be a fixed power of two such as 2**-4 for int8 parameters"
            )
        fixed_point.shift_of(_number(sigma))
        if shaping != pair_sign():
            raise ValueError(
                f"shaping={shaping!r}: must be eggroll.shaping.pair_sign() for int8 parameters, "
                "whose weights are integers"
            )
        if agreement:
            raise ValueError(
                "agreement=True: must be False for int8 parameters, which have no float estimate"
            )

    def check_leaf(self, path: str, dtype: DType, trained_by: Arithmetic | None) -> None:
        if jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"parameter {path!r} is {jnp.dtype(dtype).name} in an integer model: must be int8 "
                "in [-127, 127] (to train floats, use noise that is not from eggroll.integer)"
            )

    def noise_sigma(self, setting: object, sigma: Float[AnyArray, ""]) -> Sigma:
        return _number(setting)

    def scores(self, values: Num[AnyArray, "..."] | Bool[AnyArray, "..."]) -> Num[AnyArray, "..."]:
        floating = jnp.issubdtype(values.dtype, jnp.floating)
        return values if floating else values.astype(jnp.int32)

    def weigh(
        self,
        values: Num[AnyArray, "population _"],
        groups: Int[AnyArray, "population"] | None,
        shaping: Shaping | None,
        sigma: Sigma,
        rows: bool,
    ) -> Weighed:
        signs = pair_signs(values)
        differences = pair_differences(values)
        says = jnp.any(differences != 0, axis=1) if rows else signs != 0
        decided = jnp.sum(says, dtype=jnp.int32)
        return Weighed(signs, decided, decided > 0, values, differences)

    def credit(
        self, how: Credit, differences: Num[AnyArray, "pairs rows"]
    ) -> tuple[Num[AnyArray, "pairs rows"], Num[AnyArray, "pairs"]]:
        how.check_integers()
        cut = lambda c: jnp.clip(c, -LARGEST_CREDIT, LARGEST_CREDIT).astype(jnp.int8)
        return cut(how(differences)), cut(differences.sum(1, dtype=jnp.int32))

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
        # The optimizer receives the number of decided pairs, which determines the spread of Z.
        updates, new_state = step_optimizer(optimizer, grads, state, trained, pairs=members)
        for keys, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
            if update.dtype != jnp.int8:
                path = jax.tree_util.keystr(keys, simple=True, separator="/")
                raise ValueError(
                    f"optimizer: expected int8 updates of parameter {path!r}, got {update.dtype}; "
                    "end the chain with eggroll.integer.threshold(...)"
                )
        new = kept(moves, optax.apply_updates(trained, updates), trained)
        # Every entry changes by at most one unit, so the sum is at most the number of entries.
        wide = lambda x: x.astype(jnp.int32)
        square = lambda a, b: jnp.sum(jnp.square(wide(a) - wide(b)), dtype=jnp.int32)
        squares: Any = sum(jax.tree.leaves(jax.tree.map(square, new, trained)), jnp.int32(0))
        return new, kept(moves, new_state, state), squares

    def value(self, weighed: Weighed) -> Float[AnyArray, ""] | None:
        return None

    def statistics(self, outcome: Outcome) -> tuple[Statistics | None, Float[AnyArray, ""]]:
        report = None
        if outcome.report is not None:
            assert not isinstance(outcome.report, Statistics)
            report = statistics(outcome.report.astype(jnp.float32))
        return report, jnp.sqrt(outcome.change.astype(jnp.float32))


# The largest credit of a row: its product with noise is cut to int8 (:mod:`eggroll.nodes`).
LARGEST_CREDIT = 16

# Differences of integer scores are cut here, so that sums over rows stay in int32.
LARGEST_DIFFERENCE = 2**16


def pair_differences(values: Num[AnyArray, "population rows"]) -> Int32[AnyArray, "pairs rows"]:
    """How far the first member of each pair is ahead, for each row; of float scores the sign alone."""
    first, second = values[0::2], values[1::2]
    if jnp.issubdtype(values.dtype, jnp.floating):
        ahead = (first > second).astype(jnp.int32) - (first < second).astype(jnp.int32)
        return jnp.where(jnp.isfinite(first) & jnp.isfinite(second), ahead, 0)
    wide = lambda x: jnp.clip(x, -(2**30), 2**30 - 1).astype(jnp.int32)
    difference = wide(first) - wide(second)
    return jnp.clip(difference, -LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)


def pair_signs(values: Num[AnyArray, "population tasks"]) -> Int8[AnyArray, "pairs"]:
    """The better member of each pair: 1 for the first, -1 for the second, 0 for a tie.

    The sign is a vote over tasks. Scores are compared and not subtracted, so they may be any
    integers. A float score that is not finite drops its pair for that task.
    """
    first, second = values[0::2], values[1::2]
    ahead = (first > second).astype(jnp.int32) - (first < second).astype(jnp.int32)
    if jnp.issubdtype(values.dtype, jnp.floating):
        ahead = jnp.where(jnp.isfinite(first) & jnp.isfinite(second), ahead, 0)
    return jnp.sign(ahead.sum(1, dtype=jnp.int32)).astype(jnp.int8)


def _number(sigma: object) -> float:
    return float(sigma)  # type: ignore[arg-type]  # the settings were checked
