"""Node noise of a generation: its source, and its arithmetic in floats and in integers.

For a product ``y_t = x_t W`` the two members of a pair see ``y_t + sigma e_t`` and ``y_t - sigma e_t``. With
the credit c_t of the row (:mod:`eggroll.credit`), the gradient of W is the mean over rows and pairs of
``x_t (outer) c_t e_t / (2 sigma)``, with x_t the mean of the two members' inputs. It is the estimate of a
low-rank member ``E = a b^T`` with the best a there is for this row, ``a = x_t / |x_t|^2``.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike
from jaxtyping import Array as AnyArray
from jaxtyping import Float, Int, Num, UInt32

from eggroll.interpret.node_pass import Draw, NodeArithmetic, NodePass, Rows
from eggroll.noise import Noise, Role, looped, stream
from eggroll.population.schedule import isolated
from eggroll.values import fixed_point
from eggroll.values.dtypes import accumulator

# The product of integer credit, at most 16, and noise of standard deviation 16 is shifted right by this,
# so that it fits int8: 127 is four standard deviations at the largest credit.
SHIFT = 3


@dataclasses.dataclass(frozen=True)
class FloatNodes(NodeArithmetic):
    """Float outputs and float noise.

    Attributes:
      sigma: of the generation; float32 ``[]``.
    """

    sigma: Float[AnyArray, ""]

    def noise_type(self, dtype: DTypeLike) -> DTypeLike | None:
        return dtype if jnp.issubdtype(dtype, jnp.floating) else None

    def add(self, y: Array, noise: Array, sign: Array, sigma: float, fan_in: int) -> Array:
        kind = accumulator(y.dtype)
        scale = (sign * self.sigma * sigma).astype(kind)
        return (y.astype(kind) + scale * noise.astype(kind)).astype(y.dtype)

    def weigh(self, credit: Array, noise: Array) -> Array:
        kind = accumulator(noise.dtype)
        return credit.astype(kind) * noise.astype(kind)

    def cotangent(self, parts: Sequence[tuple[Array, float]]) -> Array:
        # The best estimate from several sources of one output: weights in proportion to amplitudes.
        size = sum(amplitude**2 for _, amplitude in parts)
        first, *rest = [weighed * (amplitude / size) for weighed, amplitude in parts]
        for x in rest:
            first = first + x
        return first


@dataclasses.dataclass(frozen=True)
class IntegerNodes(NodeArithmetic):
    """Outputs in int8 or in int32 sums, and integer noise: 16 stands for 1.

    Attributes:
      sigma: of the noise of an output after its division by ``16 sqrt(fan-in)``.
    """

    sigma: float

    def noise_type(self, dtype: DTypeLike) -> DTypeLike | None:
        return jnp.int8 if dtype in (jnp.int8, jnp.int32) else None

    def add(self, y: Array, noise: Array, sign: Array, sigma: float, fan_in: int) -> Array:
        # Samples have standard deviation 16. A sum of products is in units of 1/256 and grows with the
        # square root of the fan-in; anything else is in units of 1/16.
        shift = fixed_point.shift_of(self.sigma * sigma) - fixed_point.FRACTION
        wide = noise.astype(jnp.int32)
        if fan_in > 1:
            wide, shift = wide * math.isqrt(fan_in), shift - fixed_point.FRACTION
        scaled = fixed_point.shift_round(wide, shift) if shift > 0 else wide << -shift
        out = y.astype(jnp.int32) + sign.astype(jnp.int32) * scaled
        return fixed_point.saturate(out).astype(jnp.int8) if y.dtype == jnp.int8 else out

    def weigh(self, credit: Array, noise: Array) -> Array:
        product = credit.astype(jnp.int32) * noise.astype(jnp.int32)
        return fixed_point.saturate(fixed_point.shift_round(product, SHIFT)).astype(jnp.int8)

    def cotangent(self, parts: Sequence[tuple[Array, float]]) -> Array:
        # The votes of several sources are added up; an amplitude gives a vote its sign alone.
        if len(parts) == 1 and parts[0][1] > 0:
            return parts[0][0]
        total = jnp.zeros(parts[0][0].shape, jnp.int32)
        for weighed, amplitude in parts:
            total += weighed.astype(jnp.int32) if amplitude > 0 else -weighed.astype(jnp.int32)
        return total


def node_pass(
    arithmetic: NodeArithmetic,
    noise: Noise,
    seed: UInt32[AnyArray, "2"],
    epoch: Int[AnyArray, ""],
    pair: Int[AnyArray, ""],
    sign: Num[AnyArray, ""],
    rows: Rows | None = None,
    credit: Num[AnyArray, "rows"] | None = None,
    whole: Num[AnyArray, ""] | None = None,
) -> NodePass:
    """The pass of one member; without credit, the first one.

    Args:
      arithmetic: floats or integers.
      noise: the source of samples.
      seed: the words of the run's seed.
      epoch: ``generation // noise_reuse``.
      pair: index of the member's pair.
      sign: 1 or -1.
      rows: which rows the scores belong to.
      credit: of every row of the pair.
      whole: the credit of what belongs to no row.
    """
    return NodePass(_draw(noise, seed, epoch, pair), arithmetic, sign, pair, rows, credit, whole)


def _draw(
    noise: Noise, seed: UInt32[AnyArray, "2"], epoch: Int[AnyArray, ""], pair: Int[AnyArray, ""]
) -> Draw:
    def draw(
        name: str, loops: tuple[Array, ...], shape: tuple[int, ...], dtype: DTypeLike
    ) -> Array:
        words = looped(stream(seed, name, epoch, pair, Role.NODE), loops)
        # Integer samples have a leading axis of ranks.
        full = (1, *shape) if noise.integer else shape
        return _stored(lambda w: noise.sample(w, full, dtype).reshape(shape))(words)

    return draw


def _stored(sample: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """``sample``, whose results for all pairs of a chunk are stored.

    Otherwise XLA would draw a sample again wherever it is used: for both members of a pair, and for
    every operation that reads it.
    """

    @custom_vmap
    def one(words: Array) -> Array:
        return sample(words)

    @one.def_vmap
    def of_pairs(size: int, batched: list[bool], words: Array) -> tuple[Array, bool]:
        always = (words[0, 0] & 1) != 2
        return isolated(jax.vmap(sample), always, words), True

    return one
