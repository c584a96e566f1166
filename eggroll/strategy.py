"""EvolutionStrategy: its settings and its public methods."""

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
from eggroll import inputs
from eggroll import members as member_runs
from eggroll import noise as noises
from eggroll._calling import Function, one_of
from eggroll._settings import Settings
from eggroll.arithmetic import Outcome
from eggroll.factors import Factors
from eggroll.interpret import Context
from eggroll.members import Task
from eggroll.plan import Nodes, Plan, table
from eggroll.population.placement import Specs, specs_of, spread
from eggroll.state import Metrics, State, trainable_of

Groups = Sequence[int] | np.ndarray | Array | None
# Wider than the documented types: `_checks` refuses a wrong value with a message.
Values = Any
Member = Any


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class EvolutionStrategy(Settings):
    """Evolution strategies with low-rank noise, for any JAX function of any parameters.

    Members 2p and 2p + 1 of the population form pair p: they see the noise ``+E_p`` and ``-E_p``.
    Fitness is always maximised. All randomness is a function of (seed, generation, pair, leaf
    path).

    Attributes:
      optimizer: an optax transform. It minimises, and receives the gradient estimate
        ``-(1/N) sum_i w_i E_i / sigma`` (arXiv 2511.16652, section 4).
      population: number of members; even.
      sigma: standard deviation of the noise, or an optax schedule over generations.
      rank: rank of the noise of matrices, or "full" for dense ES (OpenES, arXiv 1703.03864).
      perturb: "weights": a member is a set of parameters. "nodes": noise is added to what comes out of
        every product with a parameter, anew for every row (a token, an example, a step), and every row
        is a member of its own; overrides of the plan mix both. The fitness returns scores ``[rows]``.
      rows: the number of scores of a member, which is the length of the loop or the axis that they belong
        to, or :class:`eggroll.Rows`; None takes the number that the fitness returns.
      credit: what a row is given of the scores of later rows (:mod:`eggroll.credit`); None is
        ``causal(1)``, which leaves nothing out that rows do to each other.
      shaping: maps scores to weights (:mod:`eggroll.shaping`); None uses the scores as weights. The default
        is :func:`eggroll.shaping.zscore`, and None for node noise.
      plan: chooses the treatment of every parameter (:mod:`eggroll.plan`).
      noise: the source of samples (:mod:`eggroll.noise`).
      chunk: number of members that a device evaluates at a time; None for all of its members. A
        chunk bounds memory and changes the result by rounding alone.
      mesh: a mesh with Auto axis types. Its axis "population" divides the members. Weights that are
        sharded over other axes (tensor parallelism) keep their sharding, and so do their noise,
        gradient and optimizer state.
      exchange: the data that devices send each other for an update. "update": each device sums the
        noise of its own members, and the sums are added. "fitness": devices send scores alone, and
        each sums the noise of all members. :func:`eggroll.exchange.auto`: the faster of the two
        ("auto" uses its default rates). The choice changes the result by rounding alone.
      deterministic: gives the same bits on any number of devices, for floats too (int8 models
        always do). Members are evaluated in chunks of ``chunk``, or of at most an eighth of the
        population, and the sums of eight fixed parts are added in order. This is slower, and holds
        eight copies of the update in memory, or as many as there are devices.
      noise_reuse: number of generations that share the same noise; 1 draws new noise every
        generation.
      on_dense: "warn", "error" or "ignore": the response when an operation has to build a low-rank
        matrix for every member.
      agreement: also measure the cosine between the estimates of two halves of the population. This
        costs a second estimate.
      shared_keys: whether both members of a pair receive the same key (common random numbers).
      master_weights: keep float32 copies of narrower parameters, which would round small updates
        away. "int8": of int8 parameters keep what rounding left instead, in 254ths of a step (arXiv
        2602.03120): two bytes a weight with the parameter, instead of five; parts of an update below
        1/508 of a step are lost.
      factor_memory: the largest number of bytes a device that a step keeps of its noise from the
        evaluation to the update; more noise is drawn twice. The result is the same. Once the noise
        exceeds a CPU's cache, drawing it twice is faster. Under node noise the same number of bytes may
        hold the inputs of products and their noise, where all members are evaluated at a time; more is
        computed again. In models without loops, keeping them saves a quarter to a third of a step.
      specs: the partition specs of a state's leaves. :meth:`placed` sets them; None otherwise.

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

    # `_seen` serves the warning about new fitness objects; `_placed` caches the results of
    # `placed`.
    _seen: dict[Any, tuple[int, int]] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )
    _placed: dict[Specs, "EvolutionStrategy"] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    # ------------------------------------------------------------ the state and its parameters

    def init(self, params: PyTree, key: Array | int | np.integer) -> State:
        """Makes the state before the first generation.

        Args:
          params: any tree of arrays. Float leaves are trained; leaves of other dtypes pass through.
            In a tree without float leaves, int8 leaves are trained with the noise of
            :mod:`eggroll.integer`. Beside float leaves, an int8 leaf is trained only if the plan
            names it, with float noise in units of its quantisation step.
          key: ``jax.random.key(seed)``, or a seed: an integer from 0 to 2^64 - 1.

        Returns:
          A state with copies of the parameters.

        Raises:
          ValueError: a leaf is not an array, is complex, or holds NaN or infinity (-128 for int8);
            the seed is out of range; or no leaf is trained.
        """
        plan = self.plan_of(params)
        checks.parameters(plan, params)
        checks.quantised(plan, self.master_weights)
        # Optimizers start from host constants; a user's transfer guard is not meant for those.
        with jax.transfer_guard_host_to_device("allow"):
            # Copies, so that donating the state never deletes the caller's parameters.
            params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
            master = {}
            if self.master_weights:
                for leaf, value in zip(plan.leaves, jax.tree.leaves(params), strict=True):
                    if leaf.keeps_copy:
                        rest = self.master_weights == "int8" and leaf.dtype == jnp.int8
                        master[leaf.path] = (
                            jnp.zeros_like(value) if rest else value.astype(jnp.float32)
                        )
            optimizer = self.optimizer.init(trainable_of(plan, params, master))
            seed = noises.seed_words(checks.seed(key))
            state = State(params, master, optimizer, jnp.zeros((), jnp.int32), seed)
            return spread(state, self.mesh)

    def params(self, state: State) -> PyTree:
        """The mean of the population: the trained parameters, in the dtypes given to `init`."""
        return checks.state(state).params

    def member(self, state: State, i: Member) -> PyTree:
        """Builds the parameters of member ``i`` of the coming generation.

        Args:
          state: the state before that generation.
          i: an index from 0 to population - 1; may be traced.

        Returns:
          The tree of the parameters. Perturbed leaves of dtypes narrower than float32 are float32,
          since rounding would lose the noise.

        Raises:
          ValueError: ``i`` is not an integer or is out of range, or a parameter has node noise.
        """
        self._check_members(state)
        members = checks.members(i, self.population, axes=0)
        return programs.member(self, checks.state(state), members)

    def ask(self, state: State, indices: Sequence[int] | Int[Array, "members"]) -> PyTree:
        """Builds the parameters of several members; each leaf gets a leading axis [members].

        Args:
          state: the state before the coming generation.
          indices: integers ``[members]`` from 0 to population - 1; may be traced.

        Raises:
          ValueError: ``indices`` is not a list of integers in range.
        """
        self._check_members(state)
        members = checks.members(indices, self.population, axes=1)
        return programs.ask(self, checks.state(state), members)

    def factors(self, state: State, i: Member) -> dict[str, Factors]:
        """The noise of member ``i`` of the coming generation, as the factors of an adapter.

        Args:
          state: the state before that generation.
          i: an index from 0 to population - 1; may be traced.

        Returns:
          By path, the factors of every perturbed parameter: the member has ``scale * sum_r a[r] * b[r]``
          added to the mean, which is not built.

        Raises:
          ValueError: ``i`` is not an integer or is out of range, or a parameter has noise without
            factors: dense noise, node noise, or the noise of int8 parameters.

        Example:
          >>> import optax
          >>> es = EvolutionStrategy(optimizer=optax.sgd(0.1), population=8, sigma=0.1, rank=2)
          >>> state = es.init({"w": jnp.zeros((64, 32))}, 0)
          >>> a, b, scale = es.factors(state, 3)["w"]
          >>> a.shape, b.shape
          ((2, 64, 1), (2, 1, 32))
          >>> bool(jnp.allclose(es.member(state, 3)["w"], scale * (a * b).sum(0), atol=1e-6))
          True
        """
        self._check_members(state)
        members = checks.members(i, self.population, axes=0)
        return programs.factors(self, checks.state(state), members)

    def _check_members(self, state: State) -> None:
        """Raises ValueError if a parameter has node noise."""
        for leaf in self.plan_of(checks.state(state).params).leaves:
            if isinstance(leaf.treatment, Nodes):
                raise ValueError(
                    f"parameter {leaf.path!r} has node noise, which is added to the outputs of its "
                    "products, so there is no member to build: must be run by es.map(state, fn, ...)"
                )

    # ------------------------------------------------------------ a generation

    def step(
        self,
        state: State,
        fitness: Function,
        *args: PyTree,
        members: PyTree = None,
        groups: Groups = None,
    ) -> tuple[State, Metrics]:
        """Runs one generation: evaluates the population and updates the parameters.

        Args:
          state: the result of :meth:`init` or of the step before.
          fitness: ``fitness(params, key, [member,] *args)`` returns a score ``[]`` or scores
            ``[tasks]``, alone or as ``(scores, aux)``; this method drops aux. Pass the same
            function object every generation: a new object is compiled again.
          *args: trees of arrays that every member receives.
          members: a tree with leading axis [population]; each member receives its own entry as
            ``member``.
          groups: int ``[population]``, for shapings that compare members within groups.

        Returns:
          The next state and the metrics of this generation.

        Raises:
          ValueError: the fitness returns no scores, or an argument has a wrong shape or dtype.
        """
        checks.fitness(self._seen, fitness)
        es, groups = self.placed(state), checks.groups(groups, self.population)
        return self._with_metrics(programs.step(es, state, fitness, args, members, groups))

    def evaluate(
        self, state: State, fitness: Function, *args: PyTree, members: PyTree = None
    ) -> PyTree:
        """Evaluates all members; arguments as in :meth:`step`.

        Returns:
          Scores ``[population]`` or ``[population, tasks]``. If the fitness returns
          ``(scores, aux)``, this returns ``(values, aux)``, where each leaf of aux has a leading
          axis [population].
        """
        checks.fitness(self._seen, fitness)
        return programs.evaluate(self.placed(state), state, fitness, args, members)

    def map(
        self,
        state: State,
        fn: Function,
        *args: PyTree,
        members: PyTree = None,
        pairs: Sequence[int] | Int[Array, "some"] | None = None,
    ) -> PyTree:
        """Maps any function ``fn(params, key, [member,] *args)`` over the perturbed parameters.

        Args:
          state: as in :meth:`step`.
          fn: the function.
          *args: trees of arrays that every member receives.
          members: a tree with the data of each member that is run, as in :meth:`step`.
          pairs: numbers of the pairs to run, from 0 to population / 2 - 1; may be traced. Members 2p and
            2p + 1 are pair p. All by default. A population whose outputs do not fit into memory at
            once is run some pairs at a time.

        Returns:
          The outputs of ``fn``, each leaf with a leading axis [population], or [2 * some].

        Raises:
          ValueError: ``pairs`` is not a list of integers in range, or ``members`` has a wrong shape.

        Example:
          >>> import optax
          >>> es = EvolutionStrategy(optimizer=optax.sgd(0.1), population=6, sigma=0.1)
          >>> state = es.init(jnp.ones(3), 0)
          >>> everything = es.map(state, lambda params, key: params.sum())
          >>> last = es.map(state, lambda params, key: params.sum(), pairs=[2])
          >>> last.tolist() == everything[4:].tolist()
          True
        """
        checks.fitness(self._seen, fn)
        if pairs is not None:
            pairs = checks.pairs(pairs, self.population)
        return programs.map(self.placed(state), state, fn, args, members, pairs)

    def update(
        self,
        state: State,
        values: Values,
        fitness: Function | Groups = None,
        *args: PyTree,
        members: PyTree = None,
        groups: Groups = None,
    ) -> tuple[State, Metrics]:
        """Updates the parameters from scores: the second half of a generation.

        Args:
          state: the state that the members were evaluated from.
          values: scores ``[population]`` or ``[population, tasks]`` from any source; a list may
            hold None. A score that is None or not finite drops its pair for that task, and is
            counted.
          fitness: the function that was evaluated, for the second pass of node noise; weight noise
            needs none.
          *args: its arguments, as in :meth:`evaluate`.
          members: the data of members, as in :meth:`evaluate`.
          groups: as in :meth:`step`.

        Returns:
          The next state and the metrics of this generation.

        Raises:
          ValueError: ``values`` or ``groups`` has a wrong shape or dtype.
        """
        given = self._second_half(state, values, fitness, args, members, groups)
        return self._with_metrics(programs.update(*given))

    tell = update

    def gradient(
        self,
        state: State,
        values: Values,
        fitness: Function | Groups = None,
        *args: PyTree,
        members: PyTree = None,
        groups: Groups = None,
    ) -> PyTree:
        """The gradient estimate alone: the tree of the parameters, with None for frozen leaves.

        Leaves are float32 (float64 for float64 parameters), or int32 for integer noise. Arguments
        as in :meth:`update`.
        """
        return programs.gradient(*self._second_half(state, values, fitness, args, members, groups))

    def value_and_gradient(
        self,
        state: State,
        fitness: Function,
        *args: PyTree,
        members: PyTree = None,
        groups: Groups = None,
    ) -> tuple[PyTree, PyTree]:
        """:meth:`evaluate` and :meth:`gradient` in one program; arguments as in :meth:`step`.

        Under node noise, the second pass takes the inputs of products from the first one if they fit into
        ``factor_memory``.

        Returns:
          The results of :meth:`evaluate` and of :meth:`gradient`.

        Example:
          >>> import optax
          >>> es = EvolutionStrategy(optimizer=optax.sgd(0.1), population=8, sigma=0.1)
          >>> state = es.init({"w": jnp.ones(3)}, 0)
          >>> fitness = lambda params, key: -jnp.sum(params["w"] ** 2)
          >>> scores, gradient = es.value_and_gradient(state, fitness)
          >>> scores.shape, gradient["w"].shape
          ((8,), (3,))
        """
        checks.fitness(self._seen, fitness)
        es, groups = self.placed(state), checks.groups(groups, self.population)
        return programs.value_and_gradient(es, state, fitness, args, members, groups)

    def _second_half(
        self,
        state: State,
        values: Values,
        fitness: Function | Groups,
        args: tuple,
        members: PyTree,
        groups: Groups,
    ) -> tuple[Any, ...]:
        """The checked arguments of the programs that follow an evaluation."""
        if fitness is not None and not callable(fitness):
            # Groups stood in the place of the fitness in version 0.1.
            fitness, groups = None, fitness
        es, checked = self.placed(state), checks.groups(groups, self.population)
        values = checks.scores(values, self.population, self.noise.integer)
        return es, state, values, checked, fitness, args, members

    def apply_gradient(
        self,
        state: State,
        grads: PyTree,
        pairs: int | Int[Array, ""] | None = None,
        value: float | Num[Array, ""] | None = None,
    ) -> tuple[State, Metrics]:
        """Steps the optimizer with a gradient estimate: the rest of :meth:`update`.

        Args:
          state: the state that the gradient was estimated at.
          grads: the result of :meth:`gradient`, or any tree of the same structure and shapes.
          pairs: for int8 parameters, the number of pairs without a tie; all pairs by default.
          value: minus the mean fitness, for optimizers that take ``value``.

        Returns:
          The next state and metrics, whose statistics of the fitness are None.

        Raises:
          ValueError: ``grads`` has another structure, or a leaf of another shape.
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
        """Runs generations of :meth:`step` and returns the last state.

        Args:
          state: the state to start from.
          fitness: as in :meth:`step`.
          generations: the number of generations; at least 0.
          *args: as in :meth:`step`.
          members: as in :meth:`step`.
          groups: as in :meth:`step`.
          callback: ``callback(state, metrics)`` runs after every generation; a true result ends the
            loop. Without a callback, all generations run in one compiled loop.

        Raises:
          ValueError: ``generations`` is not an integer of at least 0.
        """
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
        """A table of the treatment of every parameter.

        With a fitness, the table also names the parameters that would be built for every member,
        and the operations that would build them; and for node noise the nodes of a row, their fan-in and
        the gain over weight noise that they promise. The fitness is traced and not run.

        Example:
          >>> import optax
          >>> es = EvolutionStrategy(optimizer=optax.sgd(0.1), population=8, sigma=0.1)
          >>> print(es.describe({"w": jnp.zeros((64, 32)), "b": jnp.zeros(32)}))
          parameter  shape          treatment                    rank  noise/member  why
          -----------------------------------------------------------------------------------
          b          32 float32     dense                        full  128 B         vector
          w          64x32 float32  low rank, rows 0, columns 1  1     384 B         by shape
          noise a pair of members: 512 B, where dense noise would take 8.125 KiB
        """
        context, sites = Context(on_dense="ignore"), []
        g = inputs.generation_of(self, params, jnp.int32(0), jnp.zeros(2, jnp.uint32))
        if fitness is not None:
            task = Task(fitness, args)
            sites = member_runs.trace(g, context, params, task, one_of(members))
        return table.describe(g.plan, context.built, sites)

    # ------------------------------------------------------------ parts

    def plan_of(self, params: PyTree) -> Plan:
        """The plan of the parameters: the treatment of every leaf."""
        return inputs.plan_of(self, params)

    def placed(self, state: State) -> "EvolutionStrategy":
        """This strategy for states with the sharding of ``state``, which programs preserve."""
        specs = specs_of(checks.state(state), self.mesh)
        if specs is None:
            return self
        if specs not in self._placed:
            es = copy.copy(self)
            object.__setattr__(es, "specs", specs)
            self._placed[specs] = es
        return self._placed[specs]

    def exchange_costs(self, params: PyTree, tasks: int = 1) -> exchanges.Costs:
        """The bytes that devices send and the operations that they compute, by ``exchange``.

        Args:
          params: the parameters, with their sharding on the mesh.
          tasks: number of scores of a member.

        Returns:
          The costs; ``print`` shows them as a table.
        """
        rates = self.exchange if isinstance(self.exchange, exchanges.Auto) else None
        return exchanges.costs(self.plan_of(params), self.population, self.mesh, tasks, rates)

    def exchanged(self, plan: Plan) -> str:
        """The data that devices send each other under this plan: "update" or "fitness"."""
        return "fitness" if self.sends_scores_alone(plan) else "update"

    # ------------------------------------------------------------ deprecated, until version 0.3

    def epoch(self, state: State) -> Int[Array, ""]:
        """Deprecated: use ``state.generation // es.noise_reuse``, the counter that keys noise."""
        _deprecated("epoch(state)", "state.generation // es.noise_reuse")
        return state.generation // self.noise_reuse

    def sigma_of(self, state: State) -> Float[Array, ""]:
        """Deprecated: use ``metrics.sigma``, the standard deviation of the noise."""
        _deprecated("sigma_of(state)", "metrics.sigma")
        return inputs.sigma_of(self, state.generation)

    def _with_metrics(self, done: tuple[State, Outcome | Metrics]) -> tuple[State, Metrics]:
        """Adds metrics to a state if the program of the update returned an outcome instead."""
        state, result = done
        return state, programs.metrics(self, result) if isinstance(result, Outcome) else result


def _deprecated(old: str, new: str) -> None:
    warnings.warn(f"es.{old} is deprecated; use {new}", DeprecationWarning, stacklevel=3)
