"""The interface of an arithmetic, and what its steps hand to each other."""

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
from eggroll.shaping import Shaping
from eggroll.values import LowRank, Upcast

# A number where shifts depend on it, else a scalar that may be traced.
Sigma = float | Float[AnyArray, ""]
Shape = tuple[int, ...]


class Statistics(NamedTuple):
    """What is told of the scores of a population; scalars.

    Attributes:
      mean: of the members with a finite score; a member's own is the mean over its tasks.
      best: the best of them.
      worst: the worst of them.
      std: their standard deviation.
      invalid: members with a score that is not finite.
      identical: valid pairs whose two members scored the same.
    """

    mean: Float[AnyArray, ""]
    best: Float[AnyArray, ""]
    worst: Float[AnyArray, ""]
    std: Float[AnyArray, ""]
    invalid: Int[AnyArray, ""]
    identical: Int[AnyArray, ""]


class Weighed(NamedTuple):
    """What the scores of a population say about the noise.

    Attributes:
      weights: what the noise of each pair counts, ``[pairs]``; 0 for a pair that says nothing.
      members: what the sum is divided by, or judged by: valid members (floats), decided pairs (integers).
      moves: whether any pair says anything; where it is False nothing is updated.
      report: what metrics are made from; None where scores are not known.
    """

    weights: Num[AnyArray, "pairs"]
    members: Int[AnyArray, ""]
    moves: Bool[AnyArray, ""]
    report: Statistics | Num[AnyArray, "population _"] | None


class Outcome(NamedTuple):
    """What a generation says of itself; :meth:`Arithmetic.metrics` makes metrics of it.

    Attributes:
      generation: the generation that was evaluated.
      report: of :class:`Weighed`.
      updated: whether the parameters moved.
      change: how far they moved: the Euclidean norm (floats) or its square (integers).
      agreement: cosine between the estimates of two halves of the population, where asked for.
    """

    generation: Int[AnyArray, ""]
    report: Statistics | Num[AnyArray, "population _"] | None
    updated: Bool[AnyArray, ""]
    change: Num[AnyArray, ""]
    agreement: Float[AnyArray, ""] | None


class Arithmetic(abc.ABC):
    """How numbers are perturbed, summed and moved. Instances are equal if their class is the same.

    A plan gives an arithmetic to every parameter: its duties there are the first part below. A
    generation as a whole has one too (:attr:`eggroll.plan.Plan.arithmetic`), which does the second part.
    """

    # The type of the sign that a member sees its pair's noise with.
    sign_type: DTypeLike
    # Whether sums of noise are the same bits in any order.
    exact_sums: bool
    # Whether metrics belong into the program of an update. Those of integers do not: metrics are floats.
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
        """The type in which low-rank factors are drawn for a parameter of ``dtype``."""

    @abc.abstractmethod
    def dense_type(self, dtype: DTypeLike) -> DTypeLike:
        """The type in which dense noise is drawn."""

    @abc.abstractmethod
    def dense_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Shapes of what is drawn for dense noise of a parameter of ``shape``."""

    @abc.abstractmethod
    def sum_type(self, dtype: DTypeLike) -> DTypeLike:
        """The type in which noise is summed over the population."""

    @abc.abstractmethod
    def keeps_copy(self, dtype: DTypeLike) -> bool:
        """Whether a float32 copy of the parameter is what is trained."""

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
          factors: of its pair, ``[rank, *axes]`` each.
          sign: 1 or -1, of :attr:`sign_type`.
          sigma: of the generation.
          leaf_sigma: factor on it for this parameter.
          root_rank: square root of the rank.
          path: the parameter's path, for messages.
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
        """The type of the operands of sums of noise over the population."""

    @abc.abstractmethod
    def sum_dense(
        self, noise: tuple[Num[AnyArray, "pairs ..."], ...], weights: Num[AnyArray, "pairs"]
    ) -> Num[AnyArray, "..."]:
        """``sum_p weights_p E_p`` of dense noise; operands are of :meth:`product_type`."""

    @abc.abstractmethod
    def pairs_in_sum(self, rank: int) -> int | None:
        """How many pairs the type of sums holds whatever the noise; None for any number."""

    @abc.abstractmethod
    def gradient(
        self,
        total: Array,
        leaf_sigma: float,
        root_rank: float,
        sigma: Sigma,
        members: Int[AnyArray, ""],
    ) -> Array:
        """A sum over the population as a gradient for a minimiser."""

    @abc.abstractmethod
    def in_range(self, trained: Array) -> Array:
        """What the optimizer made, cut to the numbers that the parameter can take."""

    @abc.abstractmethod
    def stored(self, trained: Array, dtype: DTypeLike) -> Array:
        """What was trained in the type of the parameter."""

    @abc.abstractmethod
    def unfit(self, w: Array) -> Bool[AnyArray, "..."]:
        """Entries of a parameter that training cannot start from."""

    @abc.abstractmethod
    def unfit_reason(self) -> tuple[str, str]:
        """What is wrong with those entries, and what would be right."""

    # ------------------------------------------------------------ a whole generation

    @abc.abstractmethod
    def check_settings(self, sigma: object, shaping: Shaping | None, agreement: bool) -> None:
        """Raises ValueError where a strategy asks for what this arithmetic cannot do."""

    @abc.abstractmethod
    def check_leaf(self, path: str, dtype: DType, trained_by: "Arithmetic | None") -> None:
        """Raises ValueError where a parameter is not for this arithmetic.

        Args:
          path: the parameter's path.
          dtype: its type.
          trained_by: its own arithmetic; None for a frozen parameter.
        """

    @abc.abstractmethod
    def noise_sigma(self, setting: object, sigma: Float[AnyArray, ""]) -> Sigma:
        """The sigma that noise is scaled by: the setting itself, or its value in a generation."""

    @abc.abstractmethod
    def scores(self, values: Num[AnyArray, "..."] | Bool[AnyArray, "..."]) -> Num[AnyArray, "..."]:
        """Scores of a fitness in the type that they are weighed in."""

    @abc.abstractmethod
    def weigh(
        self,
        values: Num[AnyArray, "population _"],
        groups: Int[AnyArray, "population"] | None,
        shaping: Shaping | None,
        sigma: Sigma,
    ) -> Weighed:
        """From scores ``[population, tasks]`` to the weights of the pairs."""

    @abc.abstractmethod
    def value(self, weighed: Weighed) -> Float[AnyArray, ""] | None:
        """Minus the mean fitness, for optimizers that take it; None where it is not known here."""

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
        """An optimizer step, or nothing where ``moves`` is False.

        Args:
          optimizer: any optax transform.
          grads: the gradient estimate, in the structure of ``trained``.
          state: the optimizer's.
          trained: what the optimizer sees, None where nothing is trained.
          moves: whether anything is to move.
          members: as :class:`Weighed` has them.
          value: minus the mean fitness, for optimizers that take it.

        Returns:
          What is trained, the optimizer's state, and the change as :class:`Outcome` has it.
        """

    @abc.abstractmethod
    def statistics(self, outcome: Outcome) -> tuple[Statistics | None, Float[AnyArray, ""]]:
        """Statistics of the scores and the Euclidean norm of the change, in floats."""


def kept(moves: Bool[AnyArray, ""], new: PyTree, old: PyTree) -> PyTree:
    """``new`` where something moves, else ``old``."""
    return jax.tree.map(lambda a, b: jax.numpy.where(moves, a, b), new, old)


def step_optimizer(
    optimizer: optax.GradientTransformation,
    grads: PyTree,
    state: PyTree,
    trained: PyTree,
    **extra: Array,
) -> tuple[PyTree, PyTree]:
    """An update of an optax transform; extra arguments reach those that take them.

    Raises:
      ValueError: the optimizer wants arguments that evolution strategies do not have, such as a
        function to search along (``optax.lbfgs`` with its line search).
    """
    accepts = optax.with_extra_args_support(optimizer)
    try:
        # Transforms of optax mix types by themselves, as counts with floats.
        with jax.numpy_dtype_promotion("standard"):
            return accepts.update(grads, state, trained, **extra)
    except TypeError as error:
        wanted = _missing_arguments(error)
        if not wanted:
            raise
        given = ", ".join(extra) or "no extra argument"
        raise ValueError(
            f"the optimizer needs the arguments {', '.join(wanted)}; an evolution strategy gives "
            f"{given}: use an optimizer without them (optax.lbfgs takes linesearch=None)"
        ) from error


def _missing_arguments(error: TypeError) -> Sequence[str]:
    """Names of keyword arguments that a call lacked, from Python's message."""
    text = str(error)
    return text.split("argument")[-1].split("'")[1::2] if "missing" in text else ()
