"""The interface of an arithmetic, and the records that its steps pass on."""

import abc
from collections.abc import Sequence
from typing import NamedTuple

import jax
import optax
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Array as AnyArray
from jaxtyping import Bool, Float, Int, Num, PyTree

from eggroll._types import DType
from eggroll.credit import Credit
from eggroll.shaping import Shaping
from eggroll.values import LowRank, Upcast

# A Python number for integers, whose shifts depend on it; otherwise a scalar that may be traced.
Sigma = float | Float[AnyArray, ""]
Shape = tuple[int, ...]


class Statistics(NamedTuple):
    """Statistics of the scores of a population; scalar arrays.

    Attributes:
      mean: mean score of the members with a finite score; a member's score is its mean over tasks.
      best: the largest of these scores.
      worst: the smallest of these scores.
      std: the standard deviation of these scores (ddof 0).
      invalid: number of members with a score that is not finite.
      identical: number of valid pairs whose two members scored the same.
    """

    mean: Float[AnyArray, ""]
    best: Float[AnyArray, ""]
    worst: Float[AnyArray, ""]
    std: Float[AnyArray, ""]
    invalid: Int[AnyArray, ""]
    identical: Int[AnyArray, ""]


class Weighed(NamedTuple):
    """The weights of the noise, from the scores of a population.

    Attributes:
      weights: the weight of each pair's noise, ``[pairs]``; 0 for a pair that contributes nothing.
      members: the scale of the sum: the number of valid members (floats) or decided pairs
        (integers).
      moves: whether any pair contributes; if False, nothing is updated.
      report: the scores or their statistics, for metrics; None if scores are unknown.
      differences: of the weights (floats) or scores (integers) of a pair's two members, for every task
        or row, ``[pairs, tasks]``; 0 where a score is invalid.
    """

    weights: Num[AnyArray, "pairs"]
    members: Int[AnyArray, ""]
    moves: Bool[AnyArray, ""]
    report: Statistics | Num[AnyArray, "population _"] | None
    differences: Num[AnyArray, "pairs _"]


class Outcome(NamedTuple):
    """The outcome of a generation; :meth:`Arithmetic.statistics` turns it into floats for metrics.

    Attributes:
      generation: the generation that was evaluated.
      report: as in :class:`Weighed`.
      updated: whether the parameters moved.
      change: the size of the change: its Euclidean norm (floats) or the square of it (integers).
      agreement: cosine between the estimates of two halves of the population, if requested.
    """

    generation: Int[AnyArray, ""]
    report: Statistics | Num[AnyArray, "population _"] | None
    updated: Bool[AnyArray, ""]
    change: Num[AnyArray, ""]
    agreement: Float[AnyArray, ""] | None


class Arithmetic(abc.ABC):
    """The operations that perturb, sum and update numbers. Instances of one class are equal.

    A plan assigns an arithmetic to every parameter, which uses the first part of the interface. A
    generation as a whole has an arithmetic too (:attr:`eggroll.plan.Plan.arithmetic`), which uses
    the second part.
    """

    # The dtype of the sign of a member's noise.
    sign_type: DTypeLike
    # Whether sums of noise have the same bits in any order.
    exact_sums: bool
    # Whether the program of an update computes metrics. False for integers, since metrics are
    # floats.
    metrics_inside: bool

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return type(self).__name__

    # ------------------------------------------------------------ one parameter

    @abc.abstractmethod
    def factor_type(self, dtype: DTypeLike) -> DTypeLike:
        """The dtype of low-rank factors for a parameter of ``dtype``."""

    @abc.abstractmethod
    def dense_type(self, dtype: DTypeLike) -> DTypeLike:
        """The dtype of dense noise for a parameter of ``dtype``."""

    @abc.abstractmethod
    def dense_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes of the arrays that make up dense noise for a parameter of ``shape``."""

    @abc.abstractmethod
    def sum_type(self, dtype: DTypeLike) -> DTypeLike:
        """The dtype of sums of noise over the population."""

    @abc.abstractmethod
    def keeps_copy(self, dtype: DTypeLike) -> bool:
        """Whether a float32 copy of the parameter is trained."""

    @abc.abstractmethod
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
        """The parameter of one member under low-rank noise, not built.

        Args:
          w: the mean.
          factors: the factors of its pair, ``[rank, *axes]`` each.
          sign: 1 or -1, of dtype :attr:`sign_type`.
          sigma: the sigma of the generation.
          leaf_sigma: the factor on sigma for this parameter.
          root_rank: the square root of the rank.
          path: the path of the parameter, for messages.
        """

    @abc.abstractmethod
    def dense(
        self,
        w: Array,
        noise: tuple[Array, ...],
        sign: Num[AnyArray, ""],
        sigma: Sigma,
        leaf_sigma: float,
        path: str,
    ) -> Array | Upcast:
        """The parameter of one member under dense noise; arguments as in :meth:`low_rank`."""

    @abc.abstractmethod
    def product_type(self, dtype: DTypeLike) -> DTypeLike:
        """The dtype of the operands in sums of noise over the population."""

    @abc.abstractmethod
    def sum_dense(
        self, noise: tuple[Num[AnyArray, "pairs ..."], ...], weights: Num[AnyArray, "pairs"]
    ) -> Num[AnyArray, "..."]:
        """``sum_p weights_p E_p`` for dense noise; operands have :meth:`product_type`."""

    @abc.abstractmethod
    def pairs_in_sum(self, rank: int) -> int | None:
        """The number of pairs whose sum cannot overflow the dtype of sums; None for any number."""

    @abc.abstractmethod
    def gradient(
        self,
        total: Array,
        leaf_sigma: float,
        root_rank: float,
        sigma: Sigma,
        members: Int[AnyArray, ""],
        root_subspaces: float = 1.0,
    ) -> Array:
        """The gradient for a minimiser, from a sum of noise over the population.

        Args:
          total: the sum.
          leaf_sigma: the factor on sigma for this parameter.
          root_rank: the square root of the rank.
          sigma: the sigma of the generation.
          members: as in :class:`Weighed`.
          root_subspaces: the factor that the noise of members has beside, and the sum has not.
        """

    @abc.abstractmethod
    def in_range(self, trained: Array) -> Array:
        """The result of the optimizer, clipped to the range of the parameter."""

    @abc.abstractmethod
    def stored(self, trained: Array, dtype: DTypeLike) -> Array:
        """The trained value in the dtype of the parameter."""

    @abc.abstractmethod
    def unfit(self, w: Array) -> Bool[AnyArray, "..."]:
        """Which entries of a parameter training cannot start from."""

    @abc.abstractmethod
    def unfit_reason(self) -> tuple[str, str]:
        """A description of those entries, and of the right ones, for a message."""

    # ------------------------------------------------------------ a whole generation

    @abc.abstractmethod
    def check_settings(self, sigma: object, shaping: Shaping | None, agreement: bool) -> None:
        """Checks the settings of a strategy.

        Raises:
          ValueError: this arithmetic does not support a setting.
        """

    @abc.abstractmethod
    def check_leaf(self, path: str, dtype: DType, trained_by: "Arithmetic | None") -> None:
        """Checks one parameter.

        Args:
          path: the path of the parameter.
          dtype: the dtype of the parameter.
          trained_by: the arithmetic of the parameter; None for a frozen parameter.

        Raises:
          ValueError: a generation of this arithmetic cannot hold the parameter.
        """

    @abc.abstractmethod
    def noise_sigma(self, setting: object, sigma: Float[AnyArray, ""]) -> Sigma:
        """The sigma that scales noise: the setting itself, or its value in this generation."""

    @abc.abstractmethod
    def scores(self, values: Num[AnyArray, "..."] | Bool[AnyArray, "..."]) -> Num[AnyArray, "..."]:
        """The scores of a fitness in the dtype that they are weighed in."""

    @abc.abstractmethod
    def weigh(
        self,
        values: Num[AnyArray, "population _"],
        groups: Int[AnyArray, "population"] | None,
        shaping: Shaping | None,
        sigma: Sigma,
        rows: bool,
    ) -> Weighed:
        """The weights of the pairs, from scores ``[population, tasks]``.

        Args:
          values: the scores.
          groups: as in :meth:`eggroll.EvolutionStrategy.step`.
          shaping: maps scores to weights; None for the scores themselves.
          sigma: of the generation.
          rows: whether the differences of single rows are used, as by node noise: a pair then
            contributes if any of them is not 0, and otherwise if their mean or vote is not.
        """

    @abc.abstractmethod
    def credit(
        self, how: Credit, differences: Num[AnyArray, "pairs rows"]
    ) -> tuple[Num[AnyArray, "pairs rows"], Num[AnyArray, "pairs"]]:
        """The credit of every row of a pair, and that of what belongs to no row."""

    @abc.abstractmethod
    def value(self, weighed: Weighed) -> Float[AnyArray, ""] | None:
        """Minus the mean fitness, for optimizers that take ``value``; None if it is unknown."""

    @abc.abstractmethod
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
        """Steps an optimizer; changes nothing if ``moves`` is False.

        Args:
          optimizer: any optax transform.
          grads: the gradient estimate, with the structure of ``trained``.
          state: the state of the optimizer.
          trained: the tree that the optimizer sees, None for frozen leaves.
          moves: whether to update; bool ``[]``.
          members: as in :class:`Weighed`.
          value: minus the mean fitness, for optimizers that take ``value``.

        Returns:
          The new tree, the new state of the optimizer, and the change as in :class:`Outcome`.
        """

    @abc.abstractmethod
    def statistics(self, outcome: Outcome) -> tuple[Statistics | None, Float[AnyArray, ""]]:
        """Statistics of the scores, and the Euclidean norm of the change, in floats."""


def kept(moves: Bool[AnyArray, ""], new: PyTree, old: PyTree) -> PyTree:
    """``new`` if ``moves`` is True, else ``old``."""
    return jax.tree.map(lambda a, b: jax.numpy.where(moves, a, b), new, old)


def step_optimizer(
    optimizer: optax.GradientTransformation,
    grads: PyTree,
    state: PyTree,
    trained: PyTree,
    **extra: Array,
) -> tuple[PyTree, PyTree]:
    """Updates with an optax transform; extra arguments reach the transforms that take them.

    Raises:
      ValueError: the optimizer requires arguments that an evolution strategy does not have, such as
        a function for a line search (``optax.lbfgs``).
    """
    accepts = optax.with_extra_args_support(optimizer)
    try:
        # Some optax transforms mix dtypes, such as integer counts with floats.
        with jax.numpy_dtype_promotion("standard"):
            return accepts.update(grads, state, trained, **extra)
    except TypeError as error:
        wanted = _missing_arguments(error)
        if not wanted:
            raise
        given = ", ".join(extra) or "no extra argument"
        raise ValueError(
            f"optimizer: must not require the arguments {', '.join(wanted)}, since an evolution "
            f"strategy passes {given} (for optax.lbfgs, set linesearch=None)"
        ) from error


def _missing_arguments(error: TypeError) -> Sequence[str]:
    """Names of missing keyword arguments, parsed from Python's message."""
    text = str(error)
    return text.split("argument")[-1].split("'")[1::2] if "missing" in text else ()
