"""Which parameter gets what noise: low rank (and which axes are rows), dense, or none.

A plan is fixed before anything is drawn and depends on the parameters' paths and shapes alone
(:func:`by_shape`), or on a trace of the fitness made once (:func:`infer`), so that members can be
built, and values from elsewhere used, without a fitness function at hand.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from eggroll.plan.axis_uses import Roles, trace_roles
from eggroll.values.fixed_point import is_integer
from eggroll.values.lowrank import accumulator, is_narrow

Axes = int | Sequence[int]


@dataclasses.dataclass(frozen=True, init=False)
class Matrix:
    """Low-rank noise: ``A`` over the row axes, ``B`` over the column axes.

    Attributes:
      rows: axes that ``A`` varies along (mostly those that a product contracts).
      columns: axes that ``B`` varies along.
      batch: axes with noise of their own at every index: layers of a stack, experts.
      rank: columns of ``A`` and ``B``; None takes the strategy's.
      sigma: factor on the strategy's sigma for this parameter.

    Example:
      >>> Matrix(rows=0, columns=(1, 2))
      Matrix(rows=(0,), columns=(1, 2), batch=(), rank=None, sigma=1.0)
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    batch: tuple[int, ...]
    rank: int | None
    sigma: float

    def __init__(
        self,
        rows: Axes,
        columns: Axes,
        batch: Axes = (),
        rank: int | None = None,
        sigma: float = 1.0,
    ) -> None:
        for name, axes in (("rows", rows), ("columns", columns), ("batch", batch)):
            several = axes if isinstance(axes, Sequence) else (axes,)
            object.__setattr__(self, name, tuple(map(int, several)))
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "sigma", sigma)


@dataclasses.dataclass(frozen=True)
class Dense:
    """Full-rank noise, one number an entry: vectors, small matrices, or plain OpenES."""

    sigma: float = 1.0


@dataclasses.dataclass(frozen=True)
class Frozen:
    """No noise and no update."""


Treatment = Matrix | Dense | Frozen


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter and its treatment; of a :class:`Matrix` the rank is settled.

    ``quantised`` is an int8 parameter that is trained beside float ones: by noise of floats, in units of
    its own steps, with a float32 copy of which it is the rounded form. Its factors are float32; a model that
    casts it to bfloat16 rounds them with it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    treatment: Treatment
    reason: str
    quantised: bool = False
    spec: jax.sharding.PartitionSpec | None = None  # how it lies on a mesh, where that is known

    @property
    def trainable(self) -> bool:
        return not isinstance(self.treatment, Frozen)

    @property
    def integer(self) -> bool:
        return is_integer(self.dtype) and not self.quantised

    @property
    def held(self) -> bool:
        """Whether a float32 copy of the parameter is what is trained."""
        return self.trainable and (self.quantised or is_narrow(self.dtype))

    @property
    def sums(self) -> Any:
        """The type in which the parameter's noise is summed up."""
        return accumulator(self.float_dtype)

    @property
    def float_dtype(self) -> Any:
        return jnp.dtype(jnp.float32) if self.quantised else self.dtype

    @property
    def sigma(self) -> float:
        """The factor on the strategy's sigma."""
        return 0.0 if isinstance(self.treatment, Frozen) else self.treatment.sigma

    @property
    def root_rank(self) -> float:
        """What ``sum_r A_r B_r`` is divided by to have entries of unit variance."""
        return math.sqrt(getattr(self.treatment, "rank", None) or 1)

    def noise_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of what one pair draws: the factors ``[rank, *axes]``, or ``[*shape]``.

        Dense integer noise is a product of two factors too: the law is then that of rank 1 everywhere.
        """
        t = self.treatment
        if isinstance(t, Frozen):
            return ()
        if isinstance(t, Dense):
            return ((1, *self.shape),) * 2 if self.integer else (self.shape,)
        a = [1 if axis in t.columns else n for axis, n in enumerate(self.shape)]
        b = [1 if axis in t.rows else n for axis, n in enumerate(self.shape)]
        assert t.rank is not None
        return ((t.rank, *a), (t.rank, *b))

    def noise_specs(self) -> tuple[jax.sharding.PartitionSpec | None, ...]:
        """How what one pair draws lies on a mesh: every axis as that of the parameter."""
        shapes = self.noise_shapes()
        if self.spec is None:
            return (None,) * len(shapes)
        parts = (*self.spec, *(None,) * (len(self.shape) - len(self.spec)))

        def of(shape: tuple[int, ...]) -> jax.sharding.PartitionSpec:
            lead = len(shape) - len(parts)
            varies = zip(parts, shape[lead:], strict=True)
            return jax.P(*(None,) * lead, *(part if n > 1 else None for part, n in varies))

        return tuple(map(of, shapes))

    @property
    def noise_dtype(self) -> Any:
        """Factors are drawn in the parameter's type; dense noise is never narrower than float32."""
        if isinstance(self.treatment, Matrix) or self.integer:
            return self.float_dtype
        return self.sums

    @property
    def noise_bytes(self) -> int:
        """Bytes that a pair of members draws for this parameter."""
        size = jnp.dtype(self.noise_dtype).itemsize if self.trainable else 0
        return size * sum(math.prod(shape) for shape in self.noise_shapes())


@dataclasses.dataclass(frozen=True)
class Plan:
    """The treatment of every leaf, in the order of the parameters' tree."""

    leaves: tuple[Leaf, ...]

    @property
    def noise_bytes(self) -> int:
        return sum(leaf.noise_bytes for leaf in self.leaves)

    @property
    def specs(self) -> tuple[jax.sharding.PartitionSpec | None, ...]:
        """How the parameters lie on a mesh, where that is known."""
        return tuple(leaf.spec for leaf in self.leaves)

    @property
    def largest_rank(self) -> int:
        return max(getattr(leaf.treatment, "rank", 1) for leaf in self.leaves)

    @property
    def integer(self) -> bool:
        """Whether int8 parameters are trained (then no float ones are there)."""
        return any(leaf.trainable and leaf.integer for leaf in self.leaves)

    def placed(self, specs: Sequence[jax.sharding.PartitionSpec | None]) -> "Plan":
        """The plan of parameters that lie on a mesh like this."""
        placed = zip(self.leaves, specs, strict=True)
        return Plan(tuple(dataclasses.replace(leaf, spec=spec) for leaf, spec in placed))

    def __getitem__(self, path: str) -> Leaf:
        for leaf in self.leaves:
            if leaf.path == path:
                return leaf
        raise KeyError(f"no parameter {path!r}; there are {[leaf.path for leaf in self.leaves]}")


# Makes a plan for parameters at a strategy's rank (a whole number, or "full").
Planner = Callable[[Any, Any], Plan]

# Treatments by path pattern; of a wider type, since what is no treatment is refused in a sentence.
Overrides = Mapping[str, Any]


def by_shape(overrides: Overrides | None = None) -> Planner:
    """Plans by shapes alone.

    Two axes are a matrix; of more, the last is the columns and the rest are the rows; vectors and
    scalars get dense noise. A matrix whose factors would be no smaller than itself, that is
    ``rank (m + n) >= m n``, gets dense noise too.

    Args:
      overrides: treatments by path pattern (``fnmatch`` on paths such as
        ``"params/Dense_0/kernel"``); of several that match, the last counts. Beside float leaves one in
        int8 is trained only where an override is its very path: a quantised matrix, with noise of floats,
        whose sigma is in its own steps.

    Returns:
      A planner, for ``EvolutionStrategy(plan=...)``.

    Raises:
      ValueError: (when used) for a pattern that matches nothing, axes that do not partition the
        parameter's, or a named rank above a side.

    Example:
      >>> params = {"kernel": jnp.zeros((64, 32)), "bias": jnp.zeros(32)}
      >>> plan = by_shape({"bias": Frozen()})(params, rank=1)
      >>> plan["kernel"].treatment
      Matrix(rows=(0,), columns=(1,), batch=(), rank=1, sigma=1.0)
      >>> plan["bias"].treatment
      Frozen()
    """

    def planner(params: Any, rank: int | Literal["full"]) -> Plan:
        return _settle(params, rank, _propose_by_shape, overrides or {})

    return planner


def infer(
    fitness: Callable[..., Any],
    params: Any,
    *args: Any,
    members: Any = None,
    overrides: Overrides | None = None,
) -> Planner:
    """Plans by what the fitness does with each parameter.

    The fitness is traced once, abstractly, and every axis of every parameter followed to the
    products that it enters: contracted axes are rows, free axes columns; scanned, indexed (a stack)
    or batched axes get noise of their own at each index; a parameter that never enters a product
    gets dense noise; one that is looked up in is an embedding, whose indexed axis is the rows.

    Args:
      fitness: ``fitness(params, key, [member,] *args)``.
      params: the parameters, or a tree of ``jax.ShapeDtypeStruct``.
      *args: what the fitness gets beside them.
      members: as in ``EvolutionStrategy.evaluate`` (leading axis: the population).
      overrides: as in :func:`by_shape`.

    Returns:
      A planner, for ``EvolutionStrategy(plan=...)``.

    Example:
      >>> def fitness(params, key, x):
      ...     layer = lambda x, w: (jnp.tanh(x @ w), None)
      ...     return jax.lax.scan(layer, x, params["layers"])[0].sum()
      >>> params = {"layers": jnp.zeros((12, 32, 32))}
      >>> infer(fitness, params, jnp.zeros((4, 32)))(params, rank=1)["layers"].treatment
      Matrix(rows=(1,), columns=(2,), batch=(0,), rank=1, sigma=1.0)
    """
    is_trained = trained_type(params)
    paths = [path if is_trained(leaf) else None for path, leaf in leaf_paths(params)]
    roles = trace_roles(fitness, params, paths, args, members)

    def propose(path: str, shape: tuple[int, ...]) -> tuple[Treatment, str]:
        if path not in roles:
            raise ValueError(
                f"parameter {path!r} was not there when the plan was inferred; it knows {sorted(roles)}"
            )
        if len(roles[path]) != len(shape):
            raise ValueError(
                f"parameter {path!r} has {len(shape)} axes {list(shape)}; it had {len(roles[path])} when "
                "the plan was inferred"
            )
        return _classify(shape, roles[path])

    def planner(params: Any, rank: int | Literal["full"]) -> Plan:
        return _settle(params, rank, propose, overrides or {})

    return planner


# ---------------------------------------------------------------- the parameters' tree


def leaf_paths(params: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree of parameters with their paths, ``"params/Dense_0/kernel"``.

    Raises:
      ValueError: where a leaf is no array, or two leaves have one path.
    """
    leaves = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"parameter {path!r} is {leaf!r}, not an array; keep what is not an array out of the "
                "parameters (with Equinox: eqx.partition(model, eqx.is_array))"
            )
        leaves.append((path, leaf))
    seen: set[str] = set()
    for path, _ in leaves:
        if path in seen:
            raise ValueError(
                f"two parameters have the path {path!r}; noise is keyed by paths: rename one"
            )
        seen.add(path)
    return leaves


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def trained_type(params: Any) -> Callable[[Any], bool]:
    """Which leaves are trained: the float ones; of a tree without any, those in int8.

    Beside float ones int8 leaves are trained where an override is their very path.
    """
    if any(is_float(leaf) for _, leaf in leaf_paths(params)):
        return is_float
    return lambda leaf: leaf.dtype == jnp.int8


def _settle(
    params: Any,
    rank: int | Literal["full"],
    propose: Callable[[str, tuple[int, ...]], tuple[Treatment, str]],
    overrides: Overrides,
) -> Plan:
    leaves, is_trained = leaf_paths(params), trained_type(params)
    _check_overrides(overrides, [path for path, _ in leaves])
    plan = []
    for path, leaf in leaves:
        shape = tuple(leaf.shape)
        treatment: Treatment
        if is_trained(leaf):
            treatment, reason = propose(path, shape)
        else:
            treatment, reason = Frozen(), f"{leaf.dtype}: passes through"
        for pattern, chosen in overrides.items():
            # A wide pattern is meant for what is trained; a quantised matrix is named.
            named = leaf.dtype == jnp.int8 and pattern == path
            if named or (is_trained(leaf) and fnmatch.fnmatchcase(path, pattern)):
                treatment, reason = chosen, f"override {pattern!r}"
        if isinstance(treatment, Matrix):
            treatment, reason = _settle_matrix(path, shape, treatment, rank, reason)
        quantised = not is_trained(leaf) and not isinstance(treatment, Frozen)
        plan.append(Leaf(path, shape, leaf.dtype, treatment, reason, quantised))
    if not any(leaf.trainable for leaf in plan):
        kinds = {leaf.path: str(leaf.dtype) for leaf in plan}
        raise ValueError(
            "params hold no float array to train, nor one in int8: every leaf is frozen or of another "
            f"type ({kinds})"
        )
    return Plan(tuple(plan))


def _check_overrides(overrides: Overrides, paths: Sequence[str]) -> None:
    for pattern, chosen in overrides.items():
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            raise ValueError(
                f"the override {pattern!r} matches no parameter; there are {list(paths)}"
            )
        if not isinstance(chosen, Treatment):
            raise ValueError(
                f"the override {pattern!r} is {chosen!r}; a Matrix, Dense or Frozen of eggroll is right"
            )
        if not isinstance(chosen, Frozen) and not (
            math.isfinite(chosen.sigma) and chosen.sigma > 0
        ):
            raise ValueError(
                f"the override {pattern!r} has sigma={chosen.sigma!r}; a positive number is right, or "
                "eggroll.Frozen() for no noise"
            )


def _settle_matrix(
    path: str, shape: tuple[int, ...], matrix: Matrix, rank: int | Literal["full"], reason: str
) -> tuple[Treatment, str]:
    groups = (matrix.rows, matrix.columns, matrix.batch)
    axes = [
        a % len(shape) if -len(shape) <= a < len(shape) else a for group in groups for a in group
    ]
    if sorted(axes) != list(range(len(shape))):
        raise ValueError(
            f"parameter {path!r} has {len(shape)} axes {list(shape)}; rows={matrix.rows}, "
            f"columns={matrix.columns}, batch={matrix.batch} must name each of them once"
        )
    wrap = lambda group: tuple(a % len(shape) for a in group)
    matrix = dataclasses.replace(
        matrix, rows=wrap(matrix.rows), columns=wrap(matrix.columns), batch=wrap(matrix.batch)
    )
    m = math.prod(shape[a] for a in matrix.rows)
    n = math.prod(shape[a] for a in matrix.columns)
    if matrix.rank is not None:
        if not isinstance(matrix.rank, int) or not 1 <= matrix.rank <= min(m, n):
            raise ValueError(
                f"rank {matrix.rank!r} for parameter {path!r} is out of range: its matrix is {m} x {n}, "
                f"so 1 to {min(m, n)} would be right"
            )
        return matrix, reason
    if rank == "full":
        return Dense(matrix.sigma), "rank='full'"
    if rank * (m + n) >= m * n:
        return Dense(matrix.sigma), f"rank {rank} of {m} x {n} is no smaller than dense"
    return dataclasses.replace(matrix, rank=rank), reason


def _propose_by_shape(path: str, shape: tuple[int, ...]) -> tuple[Treatment, str]:
    if len(shape) < 2:
        return Dense(), "vector" if shape else "scalar"
    last = len(shape) - 1
    return Matrix(rows=tuple(range(last)), columns=last), "by shape"


def _classify(shape: tuple[int, ...], roles: Roles) -> tuple[Treatment, str]:
    wide = [a for a, n in enumerate(shape) if n > 1]
    if len(wide) < 2:
        return Dense(), "vector" if shape else "scalar"
    if not any(roles[a] & {"contracted", "free"} for a in wide):
        rows = [a for a in wide if "indexed" in roles[a]]
        columns = [a for a in range(len(shape)) if a not in rows]
        if not rows or len(rows) == len(wide):
            return Dense(), "never in a product"
        return Matrix(rows, columns), "rows looked up"

    def is_batch(axis: int) -> bool:
        if roles[axis] & {"scanned", "batched"}:
            return True
        return "indexed" in roles[axis] and not roles[axis] & {"contracted", "free"}

    batch = [a for a in wide if is_batch(a)]
    rest = [a for a in range(len(shape)) if a not in batch]
    rows = [a for a in rest if "contracted" in roles[a] or "free" not in roles[a]]
    columns = [a for a in rest if a not in rows]
    if not any(a in wide for a in columns):
        both = [a for a in rows if "free" in roles[a]]
        if len(both) < 2:
            return Dense(), "only contracted as a whole"
        columns, rows = both[-1:], [a for a in rows if a != both[-1]]  # used as W and as W^T
    if not any(a in wide for a in rows):
        return Dense(), "never contracted"
    return Matrix(rows, columns, batch), "from the traced fitness"
