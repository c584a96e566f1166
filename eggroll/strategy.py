"""EvolutionStrategy: evaluate a population, weigh it, estimate a gradient, step an optimizer."""

import dataclasses
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh
from jaxtyping import Float, Int

from eggroll import generation, integer_generation
from eggroll import noise as noises
from eggroll import plan as plans
from eggroll import shaping as shapings
from eggroll.interpreter import Context, interpret
from eggroll.lowrank import is_narrow
from eggroll.perturbation import built_member, draw, perturb
from eggroll.population import check_mesh, devices
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
      chunk: members evaluated at a time on a device; None for all. Bounds memory, changes nothing.
      mesh: divides members over its axis "population".
      noise_reuse: generations that the same noise is used for; 1 is fresh noise every generation.
      on_dense: "warn", "error" or "ignore" where a low-rank matrix has to be built for every member.
      agreement: also measure how far two halves of the population agree (costs a second estimate).
      shared_keys: whether the two members of a pair get one key (common random numbers).
      master_weights: keep float32 copies of narrower parameters, which would lose small updates.
      factor_memory: bytes on a device up to which a step keeps its noise from the evaluation for
        the update instead of drawing it again. The result is the same.

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

    # Wider types than the docstring's where __post_init__ says in a sentence what would be right.
    optimizer: Any
    population: int
    sigma: float | optax.Schedule
    rank: int | str = 1
    shaping: shapings.Shaping | None = dataclasses.field(default_factory=shapings.zscore)
    plan: plans.Planner = dataclasses.field(default_factory=plans.by_shape)
    noise: Any = dataclasses.field(default_factory=noises.counter)
    chunk: int | None = None
    mesh: Mesh | None = None
    noise_reuse: int = 1
    on_dense: str = "warn"
    agreement: bool = False
    shared_keys: bool = True
    master_weights: bool = True
    factor_memory: int = 256 * 2**20
    _seen: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        def require(ok: bool, field: str, right: str) -> None:
            if not ok:
                raise ValueError(f"{field}={getattr(self, field)!r}: {right}")

        whole = lambda x: isinstance(x, int | np.integer) and not isinstance(x, bool)
        require(
            whole(self.population) and self.population >= 2 and self.population % 2 == 0,
            "population",
            "members come in pairs with opposite noise, so an even number of at least 2 is right",
        )
        require(
            callable(self.sigma) or (math.isfinite(self.sigma) and self.sigma > 0),
            "sigma",
            "a positive number or a schedule over generations is right",
        )
        require(
            self.rank == "full" or (whole(self.rank) and int(self.rank) >= 1),
            "rank",
            "a whole number of at least 1, or 'full' for dense noise, is right",
        )
        require(
            self.chunk is None or (whole(self.chunk) and self.chunk >= 2 and self.chunk % 2 == 0),
            "chunk",
            "an even number of members of at least 2, or None for all at once, is right",
        )
        require(
            whole(self.noise_reuse) and self.noise_reuse >= 1,
            "noise_reuse",
            "a whole number of generations of at least 1 is right",
        )
        require(
            self.on_dense in ("error", "warn", "ignore"),
            "on_dense",
            "'error', 'warn' or 'ignore' is right",
        )
        require(
            isinstance(self.optimizer, optax.GradientTransformation),
            "optimizer",
            "an optax transform such as optax.adam(1e-2) is right",
        )
        for field, module in (("shaping", shapings), ("plan", plans), ("noise", noises)):
            value = getattr(self, field)
            name = getattr(value, "__name__", "")
            require(
                not name or getattr(module, name, None) is not value,
                field,
                f"this is the function that makes one; {name}() is right",
            )
        if self.noise.integer:
            integer_generation.check_settings(self)
        check_mesh(self.mesh)

    # ------------------------------------------------------------ the state and what is in it

    def init(self, params: Any, key: Any) -> State:
        """The state before the first generation.

        Args:
          params: any tree of arrays; floats are trained, other types pass through. In a tree without
            floats those in int8 are trained, by the noise of :mod:`eggroll.integer`.
          key: ``jax.random.key(seed)``, or a seed as a whole number.

        Raises:
          ValueError: for a leaf that is no array, NaN or infinity (or -128) in a leaf, or nothing to
            train.
        """
        plan = self.plan_of(params)
        known = {
            leaf.path: value
            for leaf, value in zip(plan.leaves, jax.tree.leaves(params), strict=True)
            if (plans.is_float(value) or (plan.integer and value.dtype == jnp.int8))
            and not isinstance(value, jax.core.Tracer)
        }
        # Constants are looked at also where init itself is traced.
        with jax.ensure_compile_time_eval():
            counts = _unfit(known)
        for path, bad in counts.items():
            if bad:
                what = (
                    "are -128; start from -127 to 127"
                    if plan.integer
                    else ("are not finite; start from finite numbers")
                )
                raise ValueError(
                    f"parameter {path!r} has {bad} of {known[path].size} entries that {what}"
                )
        if isinstance(key, int | np.integer):
            key = jax.random.key(key)
        # Fresh arrays, so that a donated state never takes the caller's parameters with it.
        params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
        master = {}
        if self.master_weights:
            for leaf, value in zip(plan.leaves, jax.tree.leaves(params), strict=True):
                if leaf.trainable and is_narrow(leaf.dtype):
                    master[leaf.path] = value.astype(jnp.float32)
        trainable = trainable_of(plan, params, master)
        return State(
            params,
            master,
            self.optimizer.init(trainable),
            jnp.zeros((), jnp.int32),
            noises.seed_words(key),
        )

    def params(self, state: State) -> Any:
        """The current mean of the population: the trained parameters."""
        return state.params

    def member(self, state: State, i: Any) -> Any:
        """Parameters of member ``i`` of the coming generation, built; ``i`` may be traced.

        Perturbed leaves of a narrower type come in float32: rounding would lose the noise.

        Raises:
          ValueError: for a member that the population does not have.
        """
        if not isinstance(i, jax.core.Tracer) and not 0 <= int(i) < self.population:
            raise ValueError(
                f"member {i} of a population of {self.population}: 0 to {self.population - 1} is right"
            )
        i = jnp.asarray(i, jnp.int32)
        plan = self.plan_of(state.params)
        sign = (1 - 2 * (i % 2)).astype(generation.sign_type(plan))
        drawn = draw(plan, self.noise, state.seed, self.epoch(state), i // 2)
        return built_member(plan, state.params, drawn, self.noise_sigma(state), sign)

    def ask(self, state: State, indices: Sequence[int] | Int[Array, "members"]) -> Any:
        """Parameters of several members, built, each leaf with a leading axis."""
        return _ask(self, state, jnp.asarray(indices, jnp.int32))

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
        self._note(fitness)
        return self._told(_step(self, state, fitness, args, members, groups))

    def evaluate(
        self, state: State, fitness: Callable[..., Any], *args: Any, members: Any = None
    ) -> Any:
        """Scores of all members, ``[population]`` or ``[population, tasks]``.

        Gives ``(values, aux)``, aux with a leading axis [population], where the fitness gives
        ``(scores, aux)``. Arguments as in :meth:`step`.
        """
        self._note(fitness)
        return _evaluate(self, state, fitness, args, members)

    def map(self, state: State, fn: Callable[..., Any], *args: Any, members: Any = None) -> Any:
        """Any function ``fn(params, key, [member,] *args)`` of the perturbed parameters.

        Returns its outputs, each leaf with a leading axis [population].
        """
        self._note(fn)
        return _map(self, state, fn, args, members)

    def update(self, state: State, values: Any, groups: Any = None) -> tuple[State, Metrics]:
        """The second half of a generation: from scores, wherever they come from.

        Args:
          state: the state that the members were made from.
          values: ``[population]`` or ``[population, tasks]``; a list may hold None. A score that is
            not finite, or None, drops its pair (for that task) and is counted.
          groups: as in :meth:`step`.
        """
        return self._told(_update(self, state, self._values(values), groups))

    tell = update

    def gradient(self, state: State, values: Any, groups: Any = None) -> Any:
        """The gradient estimate alone: the tree of the parameters, None where nothing is trained."""
        return _gradient(self, state, self._values(values), groups)

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
        return self._told(_apply_gradient(self, state, grads, pairs))

    def optimize(
        self,
        state: State,
        fitness: Callable[..., Any],
        generations: int,
        *args: Any,
        members: Any = None,
        callback: Callable[[State, Metrics], Any] | None = None,
    ) -> State:
        """Runs generations; with a callback, one at a time, until it returns something true."""
        if callback is None:
            self._note(fitness)
            return _optimize(self, state, fitness, jnp.int32(generations), args, members)
        for _ in range(generations):
            state, metrics = self.step(state, fitness, *args, members=members)
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
        return plans.describe(plan, context.built)

    # ------------------------------------------------------------ parts

    def plan_of(self, params: Any) -> plans.Plan:
        """The treatment of every parameter."""
        plan = self.plan(params, self.rank)
        integer_generation.check_plan(plan, self.noise.integer)
        return plan

    def epoch(self, state: State) -> Int[Array, ""]:
        """What noise is keyed by: the generation, unless noise is reused."""
        return state.generation // self.noise_reuse

    def sigma_of(self, state: State) -> Float[Array, ""]:
        """The standard deviation of the noise in the coming generation."""
        sigma = self.sigma(state.generation) if callable(self.sigma) else self.sigma
        return jnp.asarray(sigma, jnp.float32)

    def noise_sigma(self, state: State) -> Any:
        """The same for the arithmetic of a generation: that of integers has no float in it."""
        return self.sigma if self.noise.integer else self.sigma_of(state)

    def _told(self, done: tuple[State, Any]) -> tuple[State, Metrics]:
        """Metrics of integers are floats, and so computed outside the program of the update."""
        state, told = done
        if isinstance(told, integer_generation.Outcome):
            told = _report(self, told)
        return state, told

    def _values(self, values: Any) -> Array:
        if isinstance(values, list | tuple):
            rows = [[v] if v is None or np.ndim(v) == 0 else list(v) for v in values]
            width = {len(row) for row in rows}
            if len(width) > 1:
                raise ValueError(
                    f"values hold rows of lengths {sorted(width)}; one score a task for every member is right"
                )
            whole = all(isinstance(v, int | np.integer) for row in rows for v in row)
            table = np.array(
                [[np.nan if v is None else v for v in row] for row in rows],
                np.int32 if whole and self.noise.integer else np.float32,
            )
            flat = all(v is None or np.ndim(v) == 0 for v in values)
            values = table[:, 0] if flat else table
        values = jnp.asarray(values)
        if values.ndim not in (1, 2) or values.shape[0] != self.population:
            raise ValueError(
                f"values have the shape {list(values.shape)}; [population] or [population, tasks] with "
                f"population={self.population} is right"
            )
        return values

    def _note(self, fitness: Callable[..., Any]) -> None:
        """Warns where every generation brings a new fitness object of the same code."""
        code = getattr(fitness, "__code__", None)
        if code is None:
            return
        last, count = self._seen.get(code, (None, 0))
        if last is not None and last() is fitness:
            return
        self._seen[code] = (weakref.ref(fitness), count + 1)
        if count + 1 == 4:
            warnings.warn(
                f"fitness {getattr(fitness, '__qualname__', fitness)!r} is a new object for the fourth "
                "time and is compiled anew each time; define it once and pass what changes as arguments",
                stacklevel=3,
            )


# ---------------------------------------------------------------- what is compiled
#
# The strategy and the fitness are static: they are compared by identity, so a loop that passes the
# same two objects compiles once.


@jax.jit
def _unfit(leaves: dict[str, Array]) -> dict[str, Array]:
    bad = lambda x: ~jnp.isfinite(x) if plans.is_float(x) else x == -128
    return {path: jnp.sum(bad(value)) for path, value in leaves.items()}


@functools.partial(jax.jit, static_argnums=(0, 2))
def _map(es: EvolutionStrategy, state: State, fn: Callable, args: tuple, members: Any) -> Any:
    return generation.map_members(es, state, fn, args, members, None)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _evaluate(
    es: EvolutionStrategy, state: State, fitness: Callable, args: tuple, members: Any
) -> Any:
    values, aux, with_aux = generation.scores_of(
        es, generation.map_members(es, state, fitness, args, members, None)
    )
    return (values, aux) if with_aux else values


@functools.partial(jax.jit, static_argnums=(0, 2))
def _step(
    es: EvolutionStrategy, state: State, fitness: Callable, args: tuple, members: Any, groups: Any
) -> tuple[State, Any]:
    plan, pairs = es.plan_of(state.params), es.population // 2
    draws = None
    if plan.noise_bytes * -(-pairs // devices(es.mesh)) <= es.factor_memory:
        draws = generation.all_draws(es, plan, state)
    out = generation.map_members(es, state, fitness, args, members, draws)
    values, _, _ = generation.scores_of(es, out)
    return _finish(es, state, values, groups, draws)


def _finish(
    es: EvolutionStrategy, state: State, values: Array, groups: Any, draws: Any
) -> tuple[State, Any]:
    if es.noise.integer:
        return integer_generation.finish(es, state, values, draws)
    return generation.finish(es, state, values, groups, draws)


@functools.partial(jax.jit, static_argnums=(0,))
def _update(es: EvolutionStrategy, state: State, values: Array, groups: Any) -> tuple[State, Any]:
    return _finish(es, state, values, groups, None)


@functools.partial(jax.jit, static_argnums=(0,))
def _report(es: EvolutionStrategy, outcome: integer_generation.Outcome) -> Metrics:
    return integer_generation.report(es, outcome)


@functools.partial(jax.jit, static_argnums=(0,))
def _gradient(es: EvolutionStrategy, state: State, values: Array, groups: Any) -> Any:
    plan = es.plan_of(state.params)
    if es.noise.integer:
        signs = integer_generation.pair_signs(values)
        grads = integer_generation.gradient(es, plan, state, signs, None)
    else:
        weights, members, _ = generation.weigh(es, values, groups)
        grads, _ = generation.estimate(es, plan, state, weights, members, None)
    return jax.tree.unflatten(jax.tree.structure(state.params), grads)


@functools.partial(jax.jit, static_argnums=(0,))
def _apply_gradient(
    es: EvolutionStrategy, state: State, grads: Any, pairs: Array
) -> tuple[State, Any]:
    plan = es.plan_of(state.params)
    found: Any = jax.tree.structure(grads)
    expected: Any = jax.tree.structure(trainable_of(plan, state.params, state.master))
    if found != expected:
        raise ValueError(
            f"grads have the structure {found}; that of es.gradient, {expected}, is right"
        )
    for (path, g), w in zip(
        jax.tree_util.tree_flatten_with_path(grads)[0],
        jax.tree.leaves(trainable_of(plan, state.params, state.master)),
        strict=True,
    ):
        if g.shape != w.shape:
            raise ValueError(
                f"grads{jax.tree_util.keystr(path)} has the shape {list(g.shape)}; {list(w.shape)} is right"
            )
    # Not jax.tree.leaves: parameters may hold None themselves (as eqx.partition leaves them).
    tree: Any = jax.tree.structure(state.params)
    flat = tree.flatten_up_to(grads)
    moved = functools.reduce(jnp.logical_or, [jnp.any(g != 0) for g in jax.tree.leaves(grads)])
    if es.noise.integer:
        new, squares = integer_generation.apply(es, plan, state, flat, moved, pairs)
        return new, integer_generation.Outcome(state.generation, None, moved, squares)
    state, norm = generation.apply(es, plan, state, flat, moved)
    nan, zero = jnp.float32(jnp.nan), jnp.int32(0)
    before = state.generation - 1
    sigma = es.sigma_of(state._replace(generation=before))
    return state, Metrics(before, nan, nan, nan, nan, zero, zero, moved, norm, nan, sigma)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _optimize(
    es: EvolutionStrategy,
    state: State,
    fitness: Callable,
    generations: Array,
    args: tuple,
    members: Any,
) -> State:
    return lax.fori_loop(
        0, generations, lambda _, s: _step(es, s, fitness, args, members, None)[0], state
    )


@functools.partial(jax.jit, static_argnums=(0,))
def _ask(es: EvolutionStrategy, state: State, indices: Array) -> Any:
    return jax.vmap(lambda i: es.member(state, i))(indices)
