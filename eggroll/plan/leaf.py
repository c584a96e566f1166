"""The plan as data: every parameter with its treatment and its arithmetic."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from eggroll._types import DType
from eggroll.arithmetic import FLOATS, INTEGERS, Arithmetic
from eggroll.plan.treatments import Dense, Frozen, Given, Matrix, Nodes, Treatment

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Slices:
    """Factors on the sigma of a parameter that vary along its axes; their mean square is 1.

    Attributes:
      shape: the axes of the parameter, of size 1 where the factors do not vary.
      values: the factors, row-major.
    """

    shape: Shape
    values: tuple[float, ...]

    @property
    def array(self) -> np.ndarray:
        """The factors, float64 ``[*shape]``."""
        return np.reshape(np.asarray(self.values), self.shape)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter and its treatment; a :class:`Matrix` has its final rank here.

    Attributes:
      path: the path of the parameter in the tree, such as ``"params/Dense_0/kernel"``.
      shape: the shape of the parameter.
      dtype: the dtype of the parameter.
      treatment: the noise of the parameter.
      reason: the reason for the treatment, for :meth:`eggroll.EvolutionStrategy.describe`.
      arithmetic: the arithmetic that perturbs, sums and updates the parameter.
      named: whether an override of the plan names the treatment.
      spec: the sharding of the parameter on the mesh; None if it is unknown.
      slices: factors on sigma that vary along axes of the parameter, such as one a layer of a stack; None
        for one sigma.
      subspaces: the number of disjoint subspaces that the pairs are divided over; 1 for none.
    """

    path: str
    shape: Shape
    dtype: DType
    treatment: Treatment
    reason: str
    arithmetic: Arithmetic
    named: bool = False
    spec: jax.sharding.PartitionSpec | None = None
    slices: Slices | None = None
    subspaces: int = 1

    @property
    def trainable(self) -> bool:
        """Whether the parameter gets updates."""
        return not isinstance(self.treatment, Frozen)

    @property
    def keeps_copy(self) -> bool:
        """Whether a float32 copy of the parameter is trained."""
        return self.trainable and self.arithmetic.keeps_copy(self.dtype)

    @property
    def sum_type(self) -> DTypeLike:
        """The dtype of the sum of the parameter's noise."""
        return self.arithmetic.sum_type(self.dtype)

    @property
    def sigma(self) -> float:
        """The factor on the strategy's sigma, its root mean square over slices; 0 without noise."""
        return 0.0 if isinstance(self.treatment, Frozen | Given) else self.treatment.sigma

    @property
    def scale(self) -> float | np.ndarray:
        """The factor on the strategy's sigma at every entry.

        A number, or with :attr:`slices` float64 with the axes of the parameter, of size 1 where the factor
        does not vary.
        """
        return self.sigma if self.slices is None else self.sigma * self.slices.array

    @property
    def sliced(self) -> int | None:
        """Which array of the noise :attr:`slices` multiply; None if no single one varies as they do."""
        if self.slices is None:
            return None
        varies = [axis for axis, n in enumerate(self.slices.shape) if n > 1]
        # B first, as for the weights of the estimate: usually the smaller and the last in the product.
        shapes = list(enumerate(shape[-len(self.shape) :] for shape in self.noise_shapes()))
        for k, shape in reversed(shapes):
            if all(shape[axis] == self.shape[axis] for axis in varies):
                return k
        return None

    @property
    def rank(self) -> int:
        """The rank of low-rank noise; 1 for other treatments."""
        return (isinstance(self.treatment, Matrix) and self.treatment.rank) or 1

    @property
    def root_rank(self) -> float:
        """The divisor that gives the entries of ``sum_r A_r B_r`` unit variance."""
        return math.sqrt(self.rank)

    @property
    def root_subspaces(self) -> float:
        """The factor on sigma inside a subspace, so that the noise of a member has the same expected norm."""
        return math.sqrt(self.subspaces)

    @property
    def divided(self) -> tuple[int, ...]:
        """The axes that subspaces divide: the longer of rows and columns, or all of dense noise."""
        t = self.treatment
        if not isinstance(t, Matrix):
            return tuple(range(len(self.shape)))
        size = lambda axes: math.prod(self.shape[axis] for axis in axes)
        return t.columns if size(t.columns) >= size(t.rows) else t.rows

    @property
    def masked(self) -> int:
        """Which array of the noise is masked to a subspace: the one that varies along :attr:`divided`."""
        t = self.treatment
        return 1 if isinstance(t, Matrix) and self.divided == t.columns else 0

    def noise_shapes(self) -> tuple[Shape, ...]:
        """The shapes of the noise of one pair.

        Low-rank noise has two factors ``[rank, *axes]``, with size 1 along the axes over which a
        factor does not vary. The arithmetic determines the shapes of dense noise. A frozen leaf has
        none, and neither has node noise, which is drawn where products are formed.
        """
        t = self.treatment
        if isinstance(t, Frozen | Given | Nodes):
            return ()
        if isinstance(t, Dense):
            return self.arithmetic.dense_shapes(self.shape)
        a = [1 if axis in t.columns else n for axis, n in enumerate(self.shape)]
        b = [1 if axis in t.rows else n for axis, n in enumerate(self.shape)]
        return ((self.rank, *a), (self.rank, *b))

    def noise_specs(self) -> tuple[jax.sharding.PartitionSpec | None, ...]:
        """The sharding of one pair's noise on the mesh; each axis follows the parameter's axis."""
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
        """The dtype that noise is drawn in."""
        if isinstance(self.treatment, Matrix):
            return self.arithmetic.factor_type(self.dtype)
        return self.arithmetic.dense_type(self.dtype)

    @property
    def noise_bytes(self) -> int:
        """The bytes of noise that a pair draws for this parameter."""
        size = jnp.dtype(self.noise_dtype).itemsize if self.trainable else 0
        return size * sum(math.prod(shape) for shape in self.noise_shapes())


@dataclasses.dataclass(frozen=True)
class Plan:
    """The treatment of every leaf, in the order of the leaves in the tree of parameters.

    Attributes:
      leaves: one record a leaf.
    """

    leaves: tuple[Leaf, ...]

    @property
    def arithmetic(self) -> Arithmetic:
        """The arithmetic of a generation as a whole.

        Integers if a leaf is trained with integer noise; else floats, for quantised leaves too.
        """
        whole = any(leaf.trainable and leaf.arithmetic == INTEGERS for leaf in self.leaves)
        return INTEGERS if whole else FLOATS

    @property
    def noise_bytes(self) -> int:
        """The bytes of noise that a pair draws for all parameters."""
        return sum(leaf.noise_bytes for leaf in self.leaves)

    @property
    def has_nodes(self) -> bool:
        """Whether a parameter has node noise."""
        return any(isinstance(leaf.treatment, Nodes) for leaf in self.leaves)

    def with_nodes(self) -> "Plan":
        """The plan with node noise in place of every treatment that no override names."""

        def of(leaf: Leaf) -> Leaf:
            if leaf.named or not leaf.trainable or isinstance(leaf.treatment, Given):
                return leaf
            if leaf.subspaces > 1:
                raise ValueError(
                    f"parameter {leaf.path!r}: plan.subspaces needs weight noise, so perturb must be "
                    "'weights'"
                )
            if leaf.slices is not None:
                raise ValueError(
                    f"parameter {leaf.path!r}: expected one factor on sigma with perturb='nodes', got "
                    f"factors of the shape {list(leaf.slices.shape)} from plan.scaled"
                )
            return dataclasses.replace(leaf, treatment=Nodes(leaf.sigma), reason="perturb='nodes'")

        return Plan(tuple(map(of, self.leaves)))

    @property
    def subspaces(self) -> int:
        """The largest number of subspaces of any parameter; 1 for none."""
        return max(leaf.subspaces for leaf in self.leaves)

    @property
    def specs(self) -> tuple[jax.sharding.PartitionSpec | None, ...]:
        """The sharding of every parameter on the mesh; None where it is unknown."""
        return tuple(leaf.spec for leaf in self.leaves)

    @property
    def largest_rank(self) -> int:
        """The largest rank of the noise of any parameter."""
        return max(leaf.rank for leaf in self.leaves)

    def placed(self, specs: Sequence[jax.sharding.PartitionSpec | None]) -> "Plan":
        """The same plan for parameters with this sharding on a mesh."""
        placed = zip(self.leaves, specs, strict=True)
        return Plan(tuple(dataclasses.replace(leaf, spec=spec) for leaf, spec in placed))

    def __getitem__(self, path: str) -> Leaf:
        """The leaf with this path.

        Raises:
          KeyError: no leaf has this path.
        """
        for leaf in self.leaves:
            if leaf.path == path:
                return leaf
        raise KeyError(f"parameter {path!r}: must be one of {[leaf.path for leaf in self.leaves]}")
