"""EvolutionStrategy: evaluate a population, weigh it, estimate a gradient, step an optimizer."""

import dataclasses
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int, UInt32

from eggroll import estimator, noise as noises, plan as plans, shaping as shapings
from eggroll.interpreter import Context, interpret
from eggroll.lowrank import is_narrow
from eggroll.perturbation import built_member, draw, draw_once, perturb
from eggroll.population import AXIS, check_mesh, devices, map_pairs, split_pairs

# Roles 0 to 2 of the noise streams are factors and dense noise.
FITNESS_KEY_ROLE = 3


class State(NamedTuple):
    """All that a run carries from generation to generation: arrays only, no random state.

    Attributes:
      params: the mean, in the types that it was given in.
      master: float32 copies of the leaves of a narrower type, by path.
      optimizer: the state of the optax optimizer.
      generation: int32 scalar, generations done.
      seed: two words that all randomness comes from.
    """

    params: Any
    master: dict[str, Array]
    optimizer: Any
    generation: Int[Array, ""]
    seed: UInt32[Array, "2"]


class Metrics(NamedTuple):
    """What one update says of itself; scalars.

    Attributes:
      generation: the generation that was evaluated.
      fitness_mean: mean over the members with a finite score.
      fitness_best: the best of them.
      fitness_worst: the worst of them.
      fitness_std: their standard deviation.
      invalid: members with a score that is not finite (their pairs are dropped).
      identical_pairs: valid pairs whose two members scored the same: they say nothing.
      updated: False where no pair said anything: parameters and optimizer state stay as they were.
      update_norm: Euclidean norm of the change of the parameters.
      agreement: cosine between the estimates of two halves of the population, NaN unless asked for.
        With cosine c, the whole's cosine to the true gradient is about sqrt(2 c / (1 + c)).
      sigma: the standard deviation of the noise.
    """

    generation: Int[Array, ""]
    fitness_mean: Float[Array, ""]
    fitness_best: Float[Array, ""]
    fitness_worst: Float[Array, ""]
    fitness_std: Float[Array, ""]
    invalid: Int[Array, ""]
    identical_pairs: Int[Array, ""]
    updated: Bool[Array, ""]
    update_norm: Float[Array, ""]
    agreement: Float[Array, ""]
    sigma: Float[Array, ""]


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
    noise: noises.Noise = dataclasses.field(default_factory=noises.counter)
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

        whole = lambda x: isinstance(x, int | np.integer) and not isinstance(x, bool)  # noqa: E731
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
            self.rank == "full" or (whole(self.rank) and self.rank >= 1),
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
        check_mesh(self.mesh)

    # ------------------------------------------------------------ the state and what is in it

    def init(self, params: Any, key: Any) -> State:
        """The state before the first generation.

        Args:
          params: any tree of arrays; floats are trained, other types pass through.
          key: ``jax.random.key(seed)``, or a seed as a whole number.

        Raises:
          ValueError: for a leaf that is no array, NaN or infinity in a leaf, or nothing to train.
        """
        plan = self._plan(params)
        for leaf, value in zip(plan.leaves, jax.tree.leaves(params), strict=True):
            if plans.is_float(value) and not isinstance(value, jax.core.Tracer):
                bad = int(jnp.sum(~jnp.isfinite(value)))
                if bad:
                    raise ValueError(
                        f"parameter {leaf.path!r} has {bad} of {value.size} entries that are not "
                        "finite; start from finite numbers"
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
        trainable = _trainable(plan, params, master)
        return State(
            params, master, self.optimizer.init(trainable), jnp.zeros((), jnp.int32), noises.seed_words(key)
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
            raise ValueError(f"member {i} of a population of {self.population}: 0 to {self.population - 1} is right")
        i = jnp.asarray(i, jnp.int32)
        plan = self._plan(state.params)
        sign = 1.0 - 2.0 * (i % 2).astype(jnp.float32)
        drawn = draw(plan, self.noise, state.seed, self._epoch(state), i // 2)
        return built_member(plan, state.params, drawn, self._sigma(state), sign)

    def ask(self, state: State, indices: Sequence[int] | Int[Array, "members"]) -> Any:
        """Parameters of several members, built, each leaf with a leading axis."""
        return _ask(self, state, jnp.asarray(indices, jnp.int32))

    # ------------------------------------------------------------ a generation

    def step(
        self, state: State, fitness: Callable[..., Any], *args: Any, members: Any = None, groups: Any = None
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
        return _step(self, state, fitness, args, members, groups)

    def evaluate(self, state: State, fitness: Callable[..., Any], *args: Any, members: Any = None) -> Any:
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
        return _update(self, state, self._values(values), groups)

    tell = update

    def gradient(self, state: State, values: Any, groups: Any = None) -> Any:
        """The gradient estimate alone: the tree of the parameters, None where nothing is trained."""
        return _gradient(self, state, self._values(values), groups)

    def apply_gradient(self, state: State, grads: Any) -> tuple[State, Metrics]:
        """The rest of :meth:`update`; its metrics know no fitness (NaN)."""
        return _apply_gradient(self, state, grads)

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

    def describe(self, params: Any, fitness: Callable[..., Any] | None = None, *args: Any, members: Any = None) -> str:
        """A table of every parameter's treatment; with a fitness, what would be built and why."""
        plan = self._plan(params)
        context = Context(on_dense="ignore")
        if fitness is not None:

            def trace(params: Any, member: Any, args: tuple) -> Any:
                words = jnp.zeros(2, jnp.uint32)
                drawn = draw(plan, self.noise, words, jnp.int32(0), jnp.int32(0))
                lazy = perturb(plan, params, drawn, jnp.float32(1), jnp.float32(1))
                extra = () if members is None else (member,)
                return interpret(fitness, context)(lazy, _typed_key(words), *extra, *args)

            one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), members)
            jax.eval_shape(trace, params, one, args)
        return plans.describe(plan, context.built)

    # ------------------------------------------------------------ parts

    def _plan(self, params: Any) -> plans.Plan:
        return self.plan(params, self.rank)

    def _epoch(self, state: State) -> Int[Array, ""]:
        return state.generation // self.noise_reuse

    def _sigma(self, state: State) -> Float[Array, ""]:
        sigma = self.sigma(state.generation) if callable(self.sigma) else self.sigma
        return jnp.asarray(sigma, jnp.float32)

    def _values(self, values: Any) -> Array:
        if isinstance(values, list | tuple):
            rows = [[v] if v is None or np.ndim(v) == 0 else list(v) for v in values]
            width = {len(row) for row in rows}
            if len(width) > 1:
                raise ValueError(f"values hold rows of lengths {sorted(width)}; one score a task for every member is right")
            table = np.array([[np.nan if v is None else float(v) for v in row] for row in rows], np.float32)
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


def _typed_key(words: UInt32[Array, "2"]) -> Array:
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def _map_members(
    es: EvolutionStrategy, state: State, fn: Callable[..., Any], args: tuple, members: Any, draws: Any
) -> Any:
    """``fn`` of every member; ``draws`` of all pairs, or None to draw them as they are used."""
    plan, epoch, sigma = es._plan(state.params), es._epoch(state), es._sigma(state)
    pairs = es.population // 2
    for keys, leaf in jax.tree_util.tree_flatten_with_path(members)[0]:
        if jnp.shape(leaf)[:1] != (es.population,):
            raise ValueError(
                f"members{jax.tree_util.keystr(keys)} has the shape {list(jnp.shape(leaf))}; a leading axis "
                f"of population={es.population} is right"
            )
    by_pair = jax.tree.map(lambda x: x.reshape(pairs, 2, *x.shape[1:]), members)
    # One interpretation reports a built matrix once, however often it is traced.
    context = Context(on_dense=es.on_dense)
    lazy_fn = interpret(fn, context)

    def of_pair(pair: Array, data: Any) -> Any:
        drawn, own = data
        if drawn is None:
            drawn = draw_once(plan, es.noise, state.seed, epoch, pair)
        words = noises.stream(state.seed, "", state.generation, pair, FITNESS_KEY_ROLE)

        def of_member(sign: Array, which: Array, own: Any) -> Any:
            lazy = perturb(plan, state.params, drawn, sigma, sign)
            key = _typed_key(words)
            if not es.shared_keys:
                key = jax.random.fold_in(key, which)
            extra = () if members is None else (own,)
            return lazy_fn(lazy, key, *extra, *args)

        signs = jnp.array([1.0, -1.0], jnp.float32)
        return jax.vmap(of_member)(signs, jnp.arange(2), own)

    return map_pairs(of_pair, pairs, (draws, by_pair), es.chunk, es.mesh)


def _scores(es: EvolutionStrategy, out: Any) -> tuple[Array, Any, bool]:
    """(values, aux, whether there was aux), or a ValueError that says what the fitness gave."""
    with_aux = isinstance(out, tuple) and len(out) == 2
    values, aux = out if with_aux else (out, None)
    leaves = jax.tree.leaves(values)
    if len(leaves) != 1 or leaves[0] is not values:
        raise ValueError(
            f"the fitness returned {jax.tree.structure(values)}; a score [], scores [tasks], or "
            "(scores, aux) is right"
        )
    if values.ndim > 2:
        raise ValueError(
            f"the fitness returned scores of the shape {list(values.shape[1:])}; [] or [tasks] is right"
        )
    if not jnp.issubdtype(values.dtype, jnp.number) and values.dtype != jnp.bool_:
        raise ValueError(f"the fitness returned scores of the type {values.dtype}; a number is right")
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(jnp.float32)
    return values, aux, with_aux


@functools.partial(jax.jit, static_argnums=(0, 2))
def _map(es: EvolutionStrategy, state: State, fn: Callable, args: tuple, members: Any) -> Any:
    return _map_members(es, state, fn, args, members, None)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _evaluate(es: EvolutionStrategy, state: State, fitness: Callable, args: tuple, members: Any) -> Any:
    values, aux, with_aux = _scores(es, _map_members(es, state, fitness, args, members, None))
    return (values, aux) if with_aux else values


@functools.partial(jax.jit, static_argnums=(0, 2))
def _step(
    es: EvolutionStrategy, state: State, fitness: Callable, args: tuple, members: Any, groups: Any
) -> tuple[State, Metrics]:
    plan, pairs = es._plan(state.params), es.population // 2
    draws = None
    if plan.noise_bytes * -(-pairs // devices(es.mesh)) <= es.factor_memory:
        draws = _all_draws(es, plan, state)
    out = _map_members(es, state, fitness, args, members, draws)
    values, _, _ = _scores(es, out)
    return _generation(es, state, values, groups, draws)


def _all_draws(es: EvolutionStrategy, plan: plans.Plan, state: State) -> Any:
    """The draws of all pairs, each made on the device that evaluates the pair."""
    pairs = es.population // 2
    share = -(-pairs // devices(es.mesh))

    def on_device(ids: Any, valid: Any, data: Any) -> Any:
        return jax.vmap(lambda pair: draw_once(plan, es.noise, state.seed, es._epoch(state), pair))(ids)

    drawn = split_pairs(on_device, pairs, None, share, es.mesh, jax.P(AXIS))
    return jax.tree.map(lambda x: x[:pairs], drawn)


@functools.partial(jax.jit, static_argnums=(0,))
def _update(es: EvolutionStrategy, state: State, values: Array, groups: Any) -> tuple[State, Metrics]:
    return _generation(es, state, values, groups, None)


@functools.partial(jax.jit, static_argnums=(0,))
def _gradient(es: EvolutionStrategy, state: State, values: Array, groups: Any) -> Any:
    plan = es._plan(state.params)
    weights, members, _ = _weights(es, values, groups)
    grads, _ = _estimate(es, plan, state, weights, members, None)
    return jax.tree.unflatten(jax.tree.structure(state.params), grads)


@functools.partial(jax.jit, static_argnums=(0,))
def _apply_gradient(es: EvolutionStrategy, state: State, grads: Any) -> tuple[State, Metrics]:
    plan = es._plan(state.params)
    found = jax.tree.structure(grads)
    expected = jax.tree.structure(_trainable(plan, state.params, state.master))
    if found != expected:
        raise ValueError(f"grads have the structure {found}; that of es.gradient, {expected}, is right")
    for (path, g), w in zip(
        jax.tree_util.tree_flatten_with_path(grads)[0],
        jax.tree.leaves(_trainable(plan, state.params, state.master)),
        strict=True,
    ):
        if g.shape != w.shape:
            raise ValueError(
                f"grads{jax.tree_util.keystr(path)} has the shape {list(g.shape)}; {list(w.shape)} is right"
            )
    # Not jax.tree.leaves: parameters may hold None themselves (as eqx.partition leaves them).
    flat = jax.tree.structure(state.params).flatten_up_to(grads)
    moved = functools.reduce(jnp.logical_or, [jnp.any(g != 0) for g in jax.tree.leaves(grads)])
    state, norm = _apply(es, plan, state, flat, moved)
    nan, zero = jnp.float32(jnp.nan), jnp.int32(0)
    before = state.generation - 1
    sigma = es._sigma(state._replace(generation=before))
    return state, Metrics(before, nan, nan, nan, nan, zero, zero, moved, norm, nan, sigma)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _optimize(
    es: EvolutionStrategy, state: State, fitness: Callable, generations: Array, args: tuple, members: Any
) -> State:
    return lax.fori_loop(0, generations, lambda _, s: _step(es, s, fitness, args, members, None)[0], state)


@functools.partial(jax.jit, static_argnums=(0,))
def _ask(es: EvolutionStrategy, state: State, indices: Array) -> Any:
    return jax.vmap(lambda i: es.member(state, i))(indices)


# ---------------------------------------------------------------- from values to parameters


class _Counts(NamedTuple):
    mean: Array
    best: Array
    worst: Array
    std: Array
    invalid: Array
    identical: Array


def _weights(es: EvolutionStrategy, values: Array, groups: Any) -> tuple[Array, Array, _Counts]:
    """Differences of the pairs' weights ``[pairs]``, the number of valid members, statistics."""
    table = values if values.ndim == 2 else values[:, None]
    if not jnp.issubdtype(table.dtype, jnp.floating) or is_narrow(table.dtype):
        table = table.astype(jnp.float32)
    finite = jnp.isfinite(table)
    paired = finite.reshape(-1, 2, table.shape[1]).all(1)
    valid = jnp.repeat(paired, 2, axis=0)
    clean = jnp.where(valid, table, 0)
    if groups is not None:
        groups = jnp.asarray(groups)
        if groups.shape != (es.population,):
            raise ValueError(
                f"groups have the shape {list(groups.shape)}; one group a member, [{es.population}], is right"
            )
    shaped = clean if es.shaping is None else es.shaping(clean, valid, groups)
    weights = jnp.where(valid, shaped, 0).mean(1)
    d = weights[0::2] - weights[1::2]

    # Statistics are over each member's own finite scores, pairs or not.
    counts = finite.sum(1)
    score = jnp.where(finite, table, 0).sum(1) / jnp.maximum(counts, 1)
    has = counts > 0
    n = has.sum()
    mean = jnp.where(has, score, 0).sum() / n
    std = jnp.sqrt(jnp.where(has, (score - mean) ** 2, 0).sum() / n)
    best = jnp.where(n > 0, jnp.where(has, score, -jnp.inf).max(), jnp.nan)
    worst = jnp.where(n > 0, jnp.where(has, score, jnp.inf).min(), jnp.nan)
    pair_valid = paired.any(1)
    same = jnp.where(paired, clean[0::2] == clean[1::2], True).all(1) & pair_valid
    f32 = lambda x: x.astype(jnp.float32)  # noqa: E731
    stats = _Counts(
        f32(mean), f32(best), f32(worst), f32(std),
        (~finite.all(1)).sum(dtype=jnp.int32), same.sum(dtype=jnp.int32),
    )  # fmt: skip
    return d, 2 * pair_valid.sum(dtype=jnp.int32), stats


def _estimate(
    es: EvolutionStrategy, plan: plans.Plan, state: State, d: Array, members: Array, draws: Any
) -> tuple[list[Array | None], Array]:
    """The gradient estimate of every leaf, and how far two halves of the pairs agree on it."""
    sums = functools.partial(
        estimator.weighted_noise, plan, es.noise, state.seed, es._epoch(state), kept=draws, mesh=es.mesh
    )
    if not es.agreement:
        total, agreement = sums(d), jnp.float32(jnp.nan)
    else:
        first = jnp.arange(d.shape[0]) < d.shape[0] // 2
        halves = [estimator.gradient(plan, sums(jnp.where(h, d, 0)), es._sigma(state), members) for h in (first, ~first)]
        dot = lambda x, y: sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))  # noqa: E731
        a, b = halves
        size = jnp.sqrt(dot(a, a) * dot(b, b))
        agreement = (dot(a, b) / jnp.where(size > 0, size, 1)).astype(jnp.float32)
        return jax.tree.map(jnp.add, a, b), agreement
    return estimator.gradient(plan, total, es._sigma(state), members), agreement


def _generation(
    es: EvolutionStrategy, state: State, values: Array, groups: Any, draws: Any
) -> tuple[State, Metrics]:
    plan = es._plan(state.params)
    d, members, stats = _weights(es, values, groups)
    grads, agreement = _estimate(es, plan, state, d, members, draws)
    moved = jnp.any(d != 0)
    new, norm = _apply(es, plan, state, grads, moved)
    return new, Metrics(
        state.generation, stats.mean, stats.best, stats.worst, stats.std, stats.invalid,
        stats.identical, moved, norm, agreement, es._sigma(state),
    )  # fmt: skip


def _trainable(plan: plans.Plan, params: Any, master: dict[str, Array]) -> Any:
    """The tree that the optimizer sees: None where nothing is trained, master copies where kept."""
    leaves, tree = jax.tree.flatten(params)
    seen = [
        master.get(leaf.path, w) if leaf.trainable else None
        for leaf, w in zip(plan.leaves, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, seen)


def _apply(
    es: EvolutionStrategy, plan: plans.Plan, state: State, grads: list[Array | None], moved: Array
) -> tuple[State, Array]:
    """Steps the optimizer, unless nothing ``moved``; the generation always advances."""
    tree = jax.tree.structure(state.params)
    old = _trainable(plan, state.params, state.master)
    grads = [
        None if g is None else g.astype(w.dtype)
        for g, w in zip(grads, tree.flatten_up_to(old), strict=True)
    ]
    updates, optimizer = es.optimizer.update(
        jax.tree.unflatten(tree, grads), state.optimizer, old
    )
    new = optax.apply_updates(old, updates)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(moved, new, old))
    new, optimizer = keep(new, old), keep(optimizer, state.optimizer)
    squares = jax.tree.map(lambda a, b: jnp.sum((a - b).astype(jnp.float32) ** 2), new, old)
    norm = jnp.sqrt(sum(jax.tree.leaves(squares)))

    master, params = {}, []
    for leaf, value, before in zip(
        plan.leaves,
        tree.flatten_up_to(new),
        jax.tree.leaves(state.params),
        strict=True,
    ):
        if leaf.path in state.master:
            master[leaf.path] = value
        params.append(before if value is None else value.astype(leaf.dtype))
    return (
        State(jax.tree.unflatten(tree, params), master, optimizer, state.generation + 1, state.seed),
        norm,
    )
