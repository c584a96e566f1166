"""The plan as a datum: every parameter with its treatment and its arithmetic."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from eggroll._types import DType
from eggroll.arithmetic import FLOATS, INTEGERS, Arithmetic
from eggroll.plan.treatments import Dense, Frozen, Matrix, Treatment

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter and its treatment; the rank of a :class:`Matrix` is settled here.

    Attributes:
      path: the parameter's path in the tree, such as ``"params/Dense_0/kernel"``.
      shape: its shape.
      dtype: its type.
      treatment: the noise that it gets.
      reason: why, for :func:`eggroll.plan.describe`.
      arithmetic: how its numbers are perturbed, summed and moved.
      spec: how it is laid out on a mesh, where that is known.
    """

    path: str
    shape: Shape
    dtype: DType
    treatment: Treatment
    reason: str
    arithmetic: Arithmetic
    spec: jax.sharding.PartitionSpec | None = None

    @property
    def trainable(self) -> bool:
        """Whether the parameter gets noise and updates."""
        return not isinstance(self.treatment, Frozen)

    @property
    def keeps_copy(self) -> bool:
        """Whether a float32 copy of the parameter is what is trained."""
        return self.trainable and self.arithmetic.keeps_copy(self.dtype)

    @property
    def sum_type(self) -> DTypeLike:
        """The type in which the parameter's noise is summed up."""
        return self.arithmetic.sum_type(self.dtype)

    @property
    def sigma(self) -> float:
        """The factor on the strategy's sigma."""
        return 0.0 if isinstance(self.treatment, Frozen) else self.treatment.sigma

    @property
    def rank(self) -> int:
        """The rank of low-rank noise; 1 for other noise."""
        return (isinstance(self.treatment, Matrix) and self.treatment.rank) or 1

    @property
    def root_rank(self) -> float:
        """What ``sum_r A_r B_r`` is divided by to have entries of unit variance."""
        return math.sqrt(self.rank)

    def noise_shapes(self) -> tuple[Shape, ...]:
        """Shapes of what one pair of members draws.

        Two factors ``[rank, *axes]`` for low-rank noise, with size 1 along the axes that a factor
        does not vary along; what the arithmetic says for dense noise; nothing for a frozen leaf.
        """
        t = self.treatment
        if isinstance(t, Frozen):
            return ()
        if isinstance(t, Dense):
            return self.arithmetic.dense_shapes(self.shape)
        a = [1 if axis in t.columns else n for axis, n in enumerate(self.shape)]
        b = [1 if axis in t.rows else n for axis, n in enumerate(self.shape)]
        return ((self.rank, *a), (self.rank, *b))

    def noise_specs(self) -> tuple[jax.sharding.PartitionSpec | None, ...]:
        """How the noise of one pair is laid out on a mesh: every axis as the parameter's."""
        shapes = self.noise_shapes()
        if self.spec is None:
            return (None,) * len(shapes)
        parts = (*self.spec, *(None,) * (len(self.shape) - len(self.spec)))

        def of(shape: Shape) -> jax.sharding.PartitionSpec:
            lead = len(shape) - len(parts)
            varies = zip(parts, shape[lead:], strict=True)
            return jax.P(*(None,) * lead, *(part if n > 1 else None for part, n in varies))

        return tuple(map(of, shapes))

    @property
    def noise_dtype(self) -> DTypeLike:
        """The type that noise is drawn in."""
        if isinstance(self.treatment, Matrix):
            return self.arithmetic.factor_type(self.dtype)
        return self.arithmetic.dense_type(self.dtype)

    @property
    def noise_bytes(self) -> int:
        """Bytes that a pair of members draws for this parameter."""
        size = jnp.dtype(self.noise_dtype).itemsize if self.trainable else 0
        return size * sum(math.prod(shape) for shape in self.noise_shapes())


@dataclasses.dataclass(frozen=True)
class Plan:
    """The treatment of every leaf, in the order of the parameters' tree.

    Attributes:
      leaves: one record a parameter.
    """

    leaves: tuple[Leaf, ...]

    @property
    def arithmetic(self) -> Arithmetic:
        """The arithmetic of a whole generation: that of integers where int8 parameters alone are
        trained by integer noise, else that of floats (for quantised leaves too)."""
        whole = any(leaf.trainable and leaf.arithmetic == INTEGERS for leaf in self.leaves)
        return INTEGERS if whole else FLOATS

    @property
    def noise_bytes(self) -> int:
        """Bytes that a pair of members draws for all parameters."""
        return sum(leaf.noise_bytes for leaf in self.leaves)

    @property
    def specs(self) -> tuple[jax.sharding.PartitionSpec | None, ...]:
        """How the parameters are laid out on a mesh, where that is known."""
        return tuple(leaf.spec for leaf in self.leaves)

    @property
    def largest_rank(self) -> int:
        """The largest rank of the noise of any parameter."""
        return max(leaf.rank for leaf in self.leaves)

    def placed(self, specs: Sequence[jax.sharding.PartitionSpec | None]) -> "Plan":
        """The plan of parameters with this layout on a mesh."""
        placed = zip(self.leaves, specs, strict=True)
        return Plan(tuple(dataclasses.replace(leaf, spec=spec) for leaf, spec in placed))

    def __getitem__(self, path: str) -> Leaf:
        for leaf in self.leaves:
            if leaf.path == path:
                return leaf
        raise KeyError(f"no parameter {path!r}; there are {[leaf.path for leaf in self.leaves]}")
