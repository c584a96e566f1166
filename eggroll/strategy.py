"""EvolutionStrategy: evaluate a population, weigh it, estimate a gradient, step an optimizer."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int

from eggroll import _checks as checks
from eggroll import _programs as programs
from eggroll import exchange as exchanges
from eggroll import generation, integer_generation
from eggroll import noise as noises
from eggroll import plan as plans
from eggroll import shaping as shapings
from eggroll.interpret.interpreter import Context, interpret
from eggroll.perturbation import draw, perturb
from eggroll.plan import table
from eggroll.population.placement import Specs, specs_of, spread
from eggroll.state import Metrics, State, trainable_of


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class EvolutionStrategy:
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

    # Wider types than the docstring's where checks.settings says in a sentence what would be right.
    optimizer: Any
    population: int
    sigma: float | optax.Schedule
    rank: int | str = 1
    shaping: shapings.Shaping | None = dataclasses.field(default_factory=shapings.zscore)
    plan: plans.Planner = dataclasses.field(default_factory=plans.by_shape)
    noise: Any = dataclasses.field(default_factory=noises.counter)
    chunk: int | None = None
    mesh: Mesh | None = None
    exchange: str | exchanges.Auto = "update"
    deterministic: bool = False
    noise_reuse: int = 1
    on_dense: str = "warn"
    agreement: bool = False
    shared_keys: bool = True
    master_weights: bool = True
    factor_memory: int = 2**25
    specs: Specs | None = dataclasses.field(default=None, init=False, repr=False)
    _seen: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _placed: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        checks.settings(self)

    # ------------------------------------------------------------ the state and what is in it

    def init(self, params: Any, key: Any) -> State:
        """The state before the first generation.

        Args:
          params: any tree of arrays; floats are trained, other types pass through. In a tree without
            floats those in int8 are trained, by the noise of :mod:`eggroll.integer`; beside floats only
            those that the plan names, by noise of floats in units of their steps.
          key: ``jax.random.key(seed)``, or a seed as a whole number.

        Raises:
          ValueError: for a leaf that is no array, NaN or infinity (or -128) in a leaf, or nothing to
            train.
        """
        plan = self.plan_of(params)
        checks.parameters(plan, params)
        checks.quantised(plan, self.master_weights)
        if checks.is_whole(key):
            key = jax.random.key(key)
        # Fresh arrays, so that a donated state never takes the caller's parameters with it.
        params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
        master = {}
        if self.master_weights:
            for leaf, value in zip(plan.leaves, jax.tree.leaves(params), strict=True):
                if leaf.held:
                    master[leaf.path] = value.astype(jnp.float32)
        trainable = trainable_of(plan, params, master)
        state = State(
            params,
            master,
            self.optimizer.init(trainable),
            jnp.zeros((), jnp.int32),
            noises.seed_words(key),
        )
        return spread(state, self.mesh)

    def params(self, state: State) -> Any:
        """The current mean of the population: the trained parameters."""
        return state.params

    def member(self, state: State, i: Any) -> Any:
        """Parameters of member ``i`` of the coming generation, built; ``i`` may be traced.

        Perturbed leaves of a narrower type come in float32: rounding would lose the noise.

        Raises:
          ValueError: for a member that the population does not have.
        """
        return programs.member(self, state, checks.members(i, self.population, axes=0))

    def ask(self, state: State, indices: Sequence[int] | Int[Array, "members"]) -> Any:
        """Parameters of several members, built, each leaf with a leading axis."""
        return programs.ask(self, state, checks.members(indices, self.population, axes=1))

    # ------------------------------------------------------------ a generation

    def step(
        self,
        state: State,
        fitness: Callable[..., Any],
        *args: Any,
        members: Any = None,
        groups: Any = None,
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
        return self._told(programs.step(self.placed(state), state, fitness, args, members, groups))

    def evaluate(
        self, state: State, fitness: Callable[..., Any], *args: Any, members: Any = None
    ) -> Any:
        """Scores of all members, ``[population]`` or ``[population, tasks]``.

        Gives ``(values, aux)``, aux with a leading axis [population], where the fitness gives
        ``(scores, aux)``. Arguments as in :meth:`step`.
        """
        checks.fitness(self._seen, fitness)
        return programs.evaluate(self.placed(state), state, fitness, args, members)

    def map(self, state: State, fn: Callable[..., Any], *args: Any, members: Any = None) -> Any:
        """Any function ``fn(params, key, [member,] *args)`` of the perturbed parameters.

        Returns its outputs, each leaf with a leading axis [population].
        """
        checks.fitness(self._seen, fn)
        return programs.map(self.placed(state), state, fn, args, members)

    def update(self, state: State, values: Any, groups: Any = None) -> tuple[State, Metrics]:
        """The second half of a generation: from scores, wherever they come from.

        Args:
          state: the state that the members were made from.
          values: ``[population]`` or ``[population, tasks]``; a list may hold None. A score that is
            not finite, or None, drops its pair (for that task) and is counted.
          groups: as in :meth:`step`.
        """
        values = checks.scores(values, self.population, self.noise.integer)
        return self._told(programs.update(self.placed(state), state, values, groups))

    tell = update

    def gradient(self, state: State, values: Any, groups: Any = None) -> Any:
        """The gradient estimate alone: the tree of the parameters, None where nothing is trained."""
        values = checks.scores(values, self.population, self.noise.integer)
        return programs.gradient(self.placed(state), state, values, groups)

    def apply_gradient(
        self, state: State, grads: Any, pairs: int | Int[Array, ""] | None = None
    ) -> tuple[State, Metrics]:
        """The rest of :meth:`update`; its metrics know no fitness (NaN).

        Args:
          state: the state that the gradient is of.
          grads: of :meth:`gradient`, or from elsewhere.
          pairs: for int8 parameters, how many pairs did not end in a tie; all of them by default.
        """
        pairs = jnp.asarray(self.population // 2 if pairs is None else pairs, jnp.int32)
        return self._told(programs.apply_gradient(self.placed(state), state, grads, pairs))

    def optimize(
        self,
        state: State,
        fitness: Callable[..., Any],
        generations: int,
        *args: Any,
        members: Any = None,
        groups: Any = None,
        callback: Callable[[State, Metrics], Any] | None = None,
    ) -> State:
        """Runs generations; with a callback, one at a time, until it returns something true."""
        checks.generations(generations)
        if callback is None:
            checks.fitness(self._seen, fitness)
            es = self.placed(state)
            return programs.optimize(
                es, state, fitness, jnp.int32(generations), args, members, groups
            )
        for _ in range(generations):
            state, metrics = self.step(state, fitness, *args, members=members, groups=groups)
            if callback(state, metrics):
                break
        return state

    def describe(
        self,
        params: Any,
        fitness: Callable[..., Any] | None = None,
        *args: Any,
        members: Any = None,
    ) -> str:
        """A table of every parameter's treatment; with a fitness, what would be built and why."""
        plan = self.plan_of(params)
        context = Context(on_dense="ignore")
        if fitness is not None:

            def trace(params: Any, member: Any, args: tuple) -> Any:
                words = jnp.zeros(2, jnp.uint32)
                drawn = draw(plan, self.noise, words, jnp.int32(0), jnp.int32(0))
                one = jnp.ones((), generation.sign_type(plan))
                lazy = perturb(plan, params, drawn, 1.0 if plan.integer else one, one)
                extra = () if members is None else (member,)
                return interpret(fitness, context)(lazy, generation.typed_key(words), *extra, *args)

            member = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), members)
            jax.eval_shape(trace, params, member, args)
        return table.describe(plan, context.built)

    # ------------------------------------------------------------ parts

    def plan_of(self, params: Any) -> plans.Plan:
        """The treatment of every parameter."""
        plan = self.plan(params, self.rank)
        integer_generation.check_plan(plan, self.noise.integer)
        # Parameters come first in a state.
        specs = specs_of(params, self.mesh) if self.specs is None else self.specs
        return plan if specs is None else plan.placed(specs[: len(plan.leaves)])

    def placed(self, state: State) -> "EvolutionStrategy":
        """This strategy for states that lie on the mesh as this one does, which its programs keep."""
        specs = specs_of(state, self.mesh)
        if specs is None:
            return self
        if specs not in self._placed:
            es = copy.copy(self)
            object.__setattr__(es, "specs", specs)
            self._placed[specs] = es
        return self._placed[specs]

    def exchange_costs(self, params: Any, tasks: int = 1) -> exchanges.Costs:
        """What devices send and compute by either ``exchange``, to be printed.

        Args:
          params: the parameters, as they lie on the mesh.
          tasks: scores of a member.
        """
        rates = self.exchange if isinstance(self.exchange, exchanges.Auto) else None
        return exchanges.costs(self.plan_of(params), self.population, self.mesh, tasks, rates)

    def exchanged(self, plan: plans.Plan) -> str:
        """What devices send each other: "update" or "fitness"."""
        if self.exchange in ("update", "fitness"):
            return self.exchange
        rates = self.exchange if isinstance(self.exchange, exchanges.Auto) else None
        return exchanges.costs(plan, self.population, self.mesh, rates=rates).choice

    def epoch(self, state: State) -> Int[Array, ""]:
        """What noise is keyed by: the generation, unless noise is reused."""
        return state.generation // self.noise_reuse

    def sigma_of(self, state: State) -> Float[Array, ""]:
        """The standard deviation of the noise in the coming generation."""
        sigma = self.sigma(state.generation) if callable(self.sigma) else self.sigma
        if np.shape(sigma):
            raise ValueError(
                f"sigma's schedule gives the shape {list(np.shape(sigma))}; one number is right"
            )
        return jnp.asarray(sigma, jnp.float32)

    def noise_sigma(self, state: State) -> Any:
        """The same for the arithmetic of a generation: that of integers has no float in it."""
        return self.sigma if self.noise.integer else self.sigma_of(state)

    def _told(self, done: tuple[State, Any]) -> tuple[State, Metrics]:
        """Metrics of integers are floats, and so computed outside the program of the update."""
        state, told = done
        if isinstance(told, integer_generation.Outcome):
            told = programs.report(self, told)
        return state, told
