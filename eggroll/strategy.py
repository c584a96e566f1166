"""EvolutionStrategy: evaluate a population, weigh it, estimate a gradient, step an optimizer."""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, PyTree

from eggroll import _checks as checks
from eggroll import _programs as programs
from eggroll import exchange as exchanges
from eggroll import generation
from eggroll import noise as noises
from eggroll._calling import Function, call, one_of
from eggroll._settings import Settings
from eggroll.arithmetic import Outcome
from eggroll.interpret import Context, interpret
from eggroll.perturbation import draw, perturb
from eggroll.plan import Plan, table
from eggroll.population.placement import Specs, specs_of, spread
from eggroll.state import Metrics, State, trainable_of

Groups = Sequence[int] | np.ndarray | Array | None
# Wider than documented where `_checks` says in a sentence what would be right.
Values = Any
Member = Any


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class EvolutionStrategy(Settings):
    """Evolution strategies with low-rank noise, for any JAX function of any parameters.

    Members 2p and 2p + 1 of the population are a pair: they see ``+E_p`` and ``-E_p``. Fitness is
    always maximised. Everything random is a function of (seed, generation, pair, leaf path).

    Attributes:
      optimizer: any optax transform; it minimises, and gets the estimate
        ``-(1/N) sum_i w_i E_i / sigma``.
      population: number of members, even.
      sigma: standard deviation of the noise, or an optax schedule over generations.
      rank: rank of the noise of matrices, or "full" for dense ES (OpenES).
      shaping: from scores to weights (:mod:`eggroll.shaping`); None takes the scores as they are.
      plan: which parameter gets what (:mod:`eggroll.plan`).
      noise: the source of samples (:mod:`eggroll.noise`).
      chunk: members evaluated at a time on a device; None for all. Bounds memory, and changes nothing but
        rounding.
      mesh: divides members over its axis "population". Weights that are sharded over its other axes
        (tensor parallel) stay so, and so does all that belongs to them. Axis types: Auto.
      exchange: what devices send each other for an update: "update", sums of noise, each device those
        of its own members; "fitness", the scores alone, and each device sums the noise of all members;
        or :func:`eggroll.exchange.auto`, the quicker of them ("auto" for its default rates). The
        result is the same but for rounding.
      deterministic: the same bits whatever the number of devices that members are divided over, for
        floats too (models in int8 alone have that without). Members are evaluated in chunks of ``chunk``,
        or an eighth of the population at most, and sums of noise are added up in eight parts in order:
        slower, and with eight copies of the update in memory, or as many as there are devices.
      noise_reuse: generations that the same noise is used for; 1 is fresh noise every generation.
      on_dense: "warn", "error" or "ignore" where a low-rank matrix has to be built for every member.
      agreement: also measure how far two halves of the population agree (costs a second estimate).
      shared_keys: whether the two members of a pair get one key (common random numbers).
      master_weights: keep float32 copies of narrower parameters, which would lose small updates.
      factor_memory: bytes on a device up to which a step keeps its noise from the evaluation for
        the update instead of drawing it again. The result is the same; beyond a CPU's cache, drawing
        again is the faster.
      specs: how the arrays of a state lie on the mesh; of what :meth:`placed` gives, else None.

    Example:
      >>> import optax, jax, jax.numpy as jnp
      >>> def fitness(params, key, x, y):
      ...     return -jnp.mean((x @ params["w"] + params["b"] - y) ** 2)
      >>> x = jnp.eye(4)
      >>> es = EvolutionStrategy(optimizer=optax.adam(0.1), population=64, sigma=0.1)
      >>> state = es.init({"w": jnp.zeros((4, 4)), "b": jnp.zeros(4)}, jax.random.key(0))
      >>> state = es.optimize(state, fitness, 100, x, 3 * x)
      >>> bool(fitness(es.params(state), None, x, 3 * x) > -0.01)
      True
    """

    # For the warning about a new fitness every generation, and the strategies that `placed` made.
    _seen: dict[Any, tuple[int, int]] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )
    _placed: dict[Specs, "EvolutionStrategy"] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    # ------------------------------------------------------------ the state and what is in it

    def init(self, params: PyTree, key: Array | int | np.integer) -> State:
        """The state before the first generation.

        Args:
          params: any tree of arrays; floats are trained, other types pass through. In a tree without
            floats those in int8 are trained, by the noise of :mod:`eggroll.integer`; beside floats only
            those that the plan names, by noise of floats in units of their steps.
          key: ``jax.random.key(seed)``, or a seed: a whole number from 0 to 2^64 - 1.

        Raises:
          ValueError: for a leaf that is no array or complex, NaN or infinity (or -128) in a leaf, a
            negative seed, or nothing to train.
        """
        plan = self.plan_of(params)
        checks.parameters(plan, params)
        checks.quantised(plan, self.master_weights)
        # Constants that optimizers start from come from the host: no transfer that a guard is about.
        with jax.transfer_guard_host_to_device("allow"):
            # Fresh arrays, so that a donated state never takes the caller's parameters with it.
            params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
            master = {}
            if self.master_weights:
                for leaf, value in zip(plan.leaves, jax.tree.leaves(params), strict=True):
                    if leaf.keeps_copy:
                        master[leaf.path] = value.astype(jnp.float32)
            optimizer = self.optimizer.init(trainable_of(plan, params, master))
            seed = noises.seed_words(checks.seed(key))
            state = State(params, master, optimizer, jnp.zeros((), jnp.int32), seed)
            return spread(state, self.mesh)

    def params(self, state: State) -> PyTree:
        """The current mean of the population: the trained parameters."""
        return checks.state(state).params

    def member(self, state: State, i: Member) -> PyTree:
        """Parameters of member ``i`` of the coming generation, built; ``i`` may be traced.

        Perturbed leaves of a narrower type come in float32: rounding would lose the noise.

        Raises:
          ValueError: for a member that the population does not have.
        """
        members = checks.members(i, self.population, axes=0)
        return programs.member(self, checks.state(state), members)

    def ask(self, state: State, indices: Sequence[int] | Int[Array, "members"]) -> PyTree:
        """Parameters of several members, built, each leaf with a leading axis."""
        members = checks.members(indices, self.population, axes=1)
        return programs.ask(self, checks.state(state), members)

    # ------------------------------------------------------------ a generation

    def step(
        self,
        state: State,
        fitness: Function,
        *args: PyTree,
        members: PyTree = None,
        groups: Groups = None,
    ) -> tuple[State, Metrics]:
        """One generation: evaluate the population, update the parameters.

        Args:
          state: from :meth:`init` or the step before.
          fitness: ``fitness(params, key, [member,] *args)`` gives a score ``[]`` or scores
            ``[tasks]``, alone or as ``(scores, aux)``; aux is dropped here. Pass the same object
            every generation: a new one is compiled anew.
          *args: arrays that every member gets.
          members: a tree with leading axis [population]; each member gets its own part.
          groups: int ``[population]``, for shapings that compare members within groups.
        """
        checks.fitness(self._seen, fitness)
        es, groups = self.placed(state), checks.groups(groups, self.population)
        return self._with_metrics(programs.step(es, state, fitness, args, members, groups))

    def evaluate(
        self, state: State, fitness: Function, *args: PyTree, members: PyTree = None
    ) -> PyTree:
        """Scores of all members, ``[population]`` or ``[population, tasks]``.

        Gives ``(values, aux)``, aux with a leading axis [population], where the fitness gives
        ``(scores, aux)``. Arguments as in :meth:`step`.
        """
        checks.fitness(self._seen, fitness)
        return programs.evaluate(self.placed(state), state, fitness, args, members)

    def map(self, state: State, fn: Function, *args: PyTree, members: PyTree = None) -> PyTree:
        """Any function ``fn(params, key, [member,] *args)`` of the perturbed parameters.

        Returns its outputs, each leaf with a leading axis [population].
        """
        checks.fitness(self._seen, fn)
        return programs.map(self.placed(state), state, fn, args, members)

    def update(self, state: State, values: Values, groups: Groups = None) -> tuple[State, Metrics]:
        """The second half of a generation: from scores, wherever they come from.

        Args:
          state: the state that the members were made from.
          values: ``[population]`` or ``[population, tasks]``; a list may hold None. A score that is
            not finite, or None, drops its pair (for that task) and is counted.
          groups: as in :meth:`step`.
        """
        es, groups = self.placed(state), checks.groups(groups, self.population)
        values = checks.scores(values, self.population, self.noise.integer)
        return self._with_metrics(programs.update(es, state, values, groups))

    tell = update

    def gradient(self, state: State, values: Values, groups: Groups = None) -> PyTree:
        """The gradient estimate alone: the tree of the parameters, None where nothing is trained."""
        es, groups = self.placed(state), checks.groups(groups, self.population)
        values = checks.scores(values, self.population, self.noise.integer)
        return programs.gradient(es, state, values, groups)

    def apply_gradient(
        self,
        state: State,
        grads: PyTree,
        pairs: int | Int[Array, ""] | None = None,
        value: float | Num[Array, ""] | None = None,
    ) -> tuple[State, Metrics]:
        """The rest of :meth:`update`; its metrics know no fitness (None).

        Args:
          state: the state that the gradient is of.
          grads: of :meth:`gradient`, or from elsewhere.
          pairs: for int8 parameters, how many pairs did not end in a tie; all of them by default.
          value: minus the mean fitness, for optimizers that take it.
        """
        es = self.placed(state)
        pairs = checks.scalar(self.population // 2 if pairs is None else pairs, np.int32)
        value = None if value is None else checks.scalar(value, np.float32)
        return self._with_metrics(programs.apply_gradient(es, state, grads, pairs, value))

    def optimize(
        self,
        state: State,
        fitness: Function,
        generations: int,
        *args: PyTree,
        members: PyTree = None,
        groups: Groups = None,
        callback: Callable[[State, Metrics], object] | None = None,
    ) -> State:
        """Runs generations; with a callback, one at a time, until it returns something true."""
        count = checks.generations(generations)
        if callback is None:
            checks.fitness(self._seen, fitness)
            es, groups = self.placed(state), checks.groups(groups, self.population)
            return programs.optimize(es, state, fitness, count, args, members, groups)
        for _ in range(generations):
            state, metrics = self.step(state, fitness, *args, members=members, groups=groups)
            if callback(state, metrics):
                break
        return state

    def describe(
        self,
        params: PyTree,
        fitness: Function | None = None,
        *args: PyTree,
        members: PyTree = None,
    ) -> str:
        """A table of every parameter's treatment; with a fitness, what would be built and why."""
        plan, arithmetic = self.plan_of(params), self.arithmetic
        context = Context(on_dense="ignore")
        if fitness is not None:

            def trace(params: PyTree, member: PyTree, args: tuple) -> PyTree:
                words = jnp.zeros(2, jnp.uint32)
                drawn = draw(plan, self.noise, words, jnp.int32(0), jnp.int32(0))
                one = jnp.ones((), arithmetic.sign_type)
                sigma = arithmetic.noise_sigma(self.sigma, jnp.float32(1))
                lazy = perturb(plan, params, drawn, sigma, one)
                key = generation.typed_key(words)
                return call(interpret(fitness, context), lazy, key, member, args)

            jax.eval_shape(trace, params, one_of(members), args)
        return table.describe(plan, context.built)

    # ------------------------------------------------------------ parts

    def plan_of(self, params: PyTree) -> Plan:
        """The treatment of every parameter."""
        return generation.plan_of(self, params)

    def placed(self, state: State) -> "EvolutionStrategy":
        """This strategy for states that are laid out on the mesh as this one is; programs keep that."""
        specs = specs_of(checks.state(state), self.mesh)
        if specs is None:
            return self
        if specs not in self._placed:
            es = copy.copy(self)
            object.__setattr__(es, "specs", specs)
            self._placed[specs] = es
        return self._placed[specs]

    def exchange_costs(self, params: PyTree, tasks: int = 1) -> exchanges.Costs:
        """What devices send and compute by either ``exchange``, to be printed.

        Args:
          params: the parameters, as they are laid out on the mesh.
          tasks: scores of a member.
        """
        rates = self.exchange if isinstance(self.exchange, exchanges.Auto) else None
        return exchanges.costs(self.plan_of(params), self.population, self.mesh, tasks, rates)

    def exchanged(self, plan: Plan) -> str:
        """What devices send each other: "update" or "fitness"."""
        return "fitness" if self.sends_scores_alone(plan) else "update"

    # ------------------------------------------------------------ deprecated, until version 0.3

    def epoch(self, state: State) -> Int[Array, ""]:
        """Deprecated: ``state.generation // es.noise_reuse``, what noise is keyed by."""
        _deprecated("epoch(state)", "state.generation // es.noise_reuse")
        return state.generation // self.noise_reuse

    def sigma_of(self, state: State) -> Float[Array, ""]:
        """Deprecated: the standard deviation of the noise; metrics have it."""
        _deprecated("sigma_of(state)", "metrics.sigma")
        return generation.sigma_of(self, state.generation)

    def _with_metrics(self, done: tuple[State, Outcome | Metrics]) -> tuple[State, Metrics]:
        """The state with metrics, where the program of the update did not make them itself."""
        state, told = done
        return state, programs.metrics(self, told) if isinstance(told, Outcome) else told


def _deprecated(old: str, new: str) -> None:
    warnings.warn(f"es.{old} is deprecated; use {new}", DeprecationWarning, stacklevel=3)
