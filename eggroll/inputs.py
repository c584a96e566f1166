"""The inputs of one generation: the one object that all its steps share, made once a trace."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, UInt32

from eggroll._settings import Settings
from eggroll.arithmetic import Arithmetic, Sigma
from eggroll.interpret.node_pass import NodeArithmetic
from eggroll.nodes import FloatNodes, IntegerNodes
from eggroll.noise import Noise
from eggroll.plan.leaf import Plan
from eggroll.population.placement import specs_of
from eggroll.state import State

Out = TypeVar("Out", bound=PyTree)


@dataclasses.dataclass(frozen=True)
class Generation:
    """The inputs of one generation, made once a trace.

    Attributes:
      settings: the settings of the strategy.
      plan: the treatment of every parameter.
      arithmetic: the arithmetic of the generation: floats or integers.
      seed: the two words of the run's seed; uint32 ``[2]``.
      number: number of generations done before this one; int32 ``[]``.
      epoch: ``number // noise_reuse``, the counter that noise is keyed by.
      sigma: standard deviation of the noise; float32 ``[]``.
      noise_sigma: sigma in the form that the arithmetic takes.
    """

    settings: Settings
    plan: Plan
    arithmetic: Arithmetic
    seed: UInt32[Array, "2"]
    number: Int[Array, ""]
    epoch: Int[Array, ""]
    sigma: Float[Array, ""]
    noise_sigma: Sigma

    @property
    def node_arithmetic(self) -> NodeArithmetic:
        """How node noise is added and weighed."""
        return node_arithmetic(self.arithmetic, self.noise_sigma)

    @property
    def pairs(self) -> int:
        """Number of pairs of members."""
        return self.settings.population // 2

    @property
    def noise(self) -> Noise:
        """The source of samples."""
        return self.settings.noise

    def isolate(self, fn: Callable[..., Out], *args: PyTree) -> Out:
        """``fn(*args)``; a reproducible schedule compiles it in isolation."""
        return self.settings.schedule.isolate(fn, self.number >= 0, *args)


def begin(settings: Settings, state: State) -> Generation:
    """Makes the coming generation of a state."""
    return generation_of(settings, state.params, state.generation, state.seed)


def generation_of(
    settings: Settings, params: PyTree, number: Int[Array, ""], seed: UInt32[Array, "2"]
) -> Generation:
    """Makes a generation of parameters, from its number and the words of the run's seed."""
    # In isolation, since XLA may round the sigma schedule differently in another program.
    schedule = functools.partial(sigma_of, settings)
    sigma = settings.schedule.isolate(schedule, number >= 0, number)
    return Generation(
        settings=settings,
        plan=plan_of(settings, params),
        arithmetic=settings.arithmetic,
        seed=seed,
        number=number,
        epoch=number // settings.noise_reuse,
        sigma=sigma,
        noise_sigma=settings.arithmetic.noise_sigma(settings.sigma, sigma),
    )


def plan_of(settings: Settings, params: PyTree) -> Plan:
    """The plan of the parameters: the treatment of every leaf.

    Raises:
      ValueError: the arithmetic of the strategy cannot train a leaf, or subspaces do not divide the pairs.
    """
    plan = settings.plan(params, settings.rank)
    if settings.perturb == "nodes":
        plan = plan.with_nodes()
        if not plan.has_nodes:
            raise ValueError(
                "perturb='nodes': no parameter has node noise, since the plan names the treatment of each; "
                "must be eggroll.Nodes() there, or not named"
            )
    for leaf in plan.leaves:
        trained_by = leaf.arithmetic if leaf.trainable else None
        settings.arithmetic.check_leaf(leaf.path, leaf.dtype, trained_by)
    pairs = settings.population // 2
    for leaf in plan.leaves:
        if pairs % leaf.subspaces:
            raise ValueError(
                f"population={settings.population}: must be a multiple of {2 * leaf.subspaces}, so that "
                f"each of the plan's {leaf.subspaces} subspaces has as many pairs"
            )
    # The leaves of the parameters are the first leaves of a state.
    specs = specs_of(params, settings.mesh) if settings.specs is None else settings.specs
    return plan if specs is None else plan.placed(specs[: len(plan.leaves)])


def sigma_of(settings: Settings, generation: Int[Array, ""]) -> Float[Array, ""]:
    """The standard deviation of the noise in a generation; float32 ``[]``.

    Raises:
      ValueError: the schedule returns an array with axes.
    """
    sigma = settings.sigma(generation) if callable(settings.sigma) else settings.sigma
    if np.shape(sigma):
        raise ValueError(
            f"sigma: expected one number from the schedule, got the shape {list(np.shape(sigma))}"
        )
    return jnp.asarray(sigma, jnp.float32)


def node_arithmetic(arithmetic: Arithmetic, sigma: Sigma) -> NodeArithmetic:
    """How node noise is added and weighed."""
    exact = arithmetic.exact_sums
    return IntegerNodes(float(sigma)) if exact else FloatNodes(jnp.asarray(sigma))
