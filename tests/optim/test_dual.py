"""Multipliers: the published checks of each rule, and what any optax transform has to bear."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optim
from optim import dual

SOLVERS = {
    "sign": dual.sign(1e-2),
    "sigmoid": dual.squashed(),
    "tanh": dual.squashed(link=dual.tanh()),
    "exponentiated": dual.exponentiated(0.1),
    "latent adam": dual.latent(optax.adam(0.1), dual.softmax()),
}
each = pytest.mark.parametrize("name", list(SOLVERS))
START = {"a": jnp.array([0.25, 0.5, 0.25]), "b": {"c": jnp.array([[0.5], [0.5]]), "d": None}}


def after(
    solver: optax.GradientTransformation, multipliers: Any, gradient: Any, steps: int
) -> jax.Array:
    """The multipliers after some steps down ``gradient(multipliers)``."""

    def step(_: Any, carry: Any) -> Any:
        multipliers, state = carry
        updates, state = solver.update(gradient(multipliers), state, multipliers)
        return optax.apply_updates(multipliers, updates), state

    return jax.lax.fori_loop(0, steps, step, (multipliers, solver.init(multipliers)))[0]


# ---------------------------------------------------------------- routing biases


def test_biases_move_against_the_excess_load() -> None:
    load = jnp.array([10.0, 2.0, 6.0, 6.0])
    solver = dual.sign()
    updates, _ = solver.update(load - load.mean(), solver.init(load))
    np.testing.assert_allclose(updates, [-1e-3, 1e-3, 0, 0])


def router(seed: int) -> tuple[Any, Any]:
    """(excess load of each expert as a function of the biases, the largest over the mean)."""
    tokens, preference = jax.random.split(jax.random.key(seed))
    score = jax.nn.softmax(
        jax.random.normal(tokens, (512, 8)) + 0.7 * jax.random.normal(preference, (8,))
    )

    def excess(bias: jax.Array) -> jax.Array:
        chosen = jax.lax.top_k(score + bias, 2)[1]
        load = jnp.bincount(chosen.ravel(), length=8).astype(jnp.float32)
        return load - load.mean()

    return excess, lambda bias: float(excess(bias).max() / (512 * 2 / 8))


@pytest.mark.parametrize("seed", range(2))
def test_a_router_of_512_tokens_and_8_experts_is_balanced(seed: int) -> None:
    excess, overload = router(seed)
    start = jnp.zeros(8)
    assert overload(start) > 0.5
    curve = [overload(after(dual.sign(1e-3), start, excess, steps)) for steps in (100, 300, 600)]
    assert overload(start) > curve[0] > curve[2]
    assert curve[2] <= 0.05
    # In proportion to the excess, decreasing: the rule of the theory.
    decreasing = optax.sgd(lambda n: 1e-3 / (1 + n / 20))
    assert overload(after(decreasing, start, excess, 300)) <= 0.05


# ---------------------------------------------------------------- constrained rewards


def test_the_lagrangian_of_two_constraints() -> None:
    multipliers = dual.sigmoid().forward(jnp.array([0.0, 1.0]))
    mixed = dual.lagrangian(multipliers, jnp.array(0.4), jnp.array([1.0, -0.5]))
    np.testing.assert_allclose(mixed, 0.442047, atol=1e-6)


def test_below_its_threshold_a_multiplier_rises() -> None:
    for link, start in ((dual.sigmoid(), 0.5), (dual.tanh(), 0.0)):
        x = jnp.full(2, start)
        gradient = lambda _: jnp.array([0.3 - 0.8, 0.9 - 0.8])  # value less threshold
        once = after(dual.squashed(link=link), x, gradient, 1)
        assert once[0] > start > once[1]
    # Equality may push down as well as up; at least never does.
    assert once[1] < 0


def test_squashed_is_sgd_with_momentum_on_the_latent_variable() -> None:
    x, moving = np.array([0.3, -0.2]), np.zeros(2)
    multipliers = jnp.asarray(1 / (1 + np.exp(-x)))
    solver = dual.squashed(learning_rate=0.1, momentum=0.1)
    state = solver.init(multipliers)
    for t in range(20):
        g = np.array([np.sin(t), np.cos(t)])
        updates, state = solver.update(jnp.asarray(g), state, multipliers)
        multipliers = optax.apply_updates(multipliers, updates)
        s = 1 / (1 + np.exp(-x))
        moving = 0.1 * moving + g * s * (1 - s)
        x = x - 0.1 * moving
        np.testing.assert_allclose(multipliers, 1 / (1 + np.exp(-x)), rtol=1e-5)


def test_a_saddle_point_is_found() -> None:
    """max -(x - 2)^2 subject to x <= 1, as 1 - x >= 0: the policy answers each multiplier at once."""

    def excess(multiplier: jax.Array) -> jax.Array:
        # The best x of (1 - lam) (-(x - 2)^2) + lam (1 - x).
        x = 2 - multiplier / (2 * (1 - multiplier))
        return 1 - x

    found = after(dual.squashed(0.5), jnp.array([0.1]), excess, 300)
    np.testing.assert_allclose(found, 2 / 3, atol=1e-3)
    np.testing.assert_allclose(excess(found), 0, atol=1e-2)


# ---------------------------------------------------------------- weights of rewards


def test_weights_by_influence() -> None:
    g = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    influence = (g @ g.T).sum(1)
    assert influence.tolist() == [2, 2, 4]
    weights = after(dual.exponentiated(1e-6 / 1e-5), jnp.full(3, 1 / 3), lambda _: -influence, 1)
    np.testing.assert_allclose(weights, [0.310424, 0.310424, 0.379152], atol=1e-6)


@given(st.integers(0, 2**32 - 1))
def test_exponentiated_steps_multiply_and_normalise(seed: int) -> None:
    chance = np.random.default_rng(seed)
    w = chance.dirichlet(np.ones(5))
    gradients = chance.normal(size=(4, 5))
    solver = dual.exponentiated(0.3)
    weights, state = jnp.asarray(w), solver.init(jnp.asarray(w))
    for g in gradients:
        updates, state = solver.update(jnp.asarray(g), state, weights)
        weights = optax.apply_updates(weights, updates)
        w = w * np.exp(-0.3 * g)
        w /= w.sum()
        np.testing.assert_allclose(weights, w, rtol=1e-4, atol=1e-7)


def test_hedging_has_the_regret_it_promises() -> None:
    """Exponentiated gradient with sqrt(8 ln K / T) loses at most sqrt(T ln K / 2) to the best expert."""
    losses = np.random.default_rng(0).uniform(size=(400, 6))
    losses[:, 2] *= 0.7
    solver = dual.exponentiated(float(np.sqrt(8 * np.log(6) / 400)))

    def step(carry: Any, loss: jax.Array) -> Any:
        weights, state = carry
        updates, state = solver.update(loss, state, weights)
        return (optax.apply_updates(weights, updates), state), weights @ loss

    start = jnp.full(6, 1 / 6)
    (weights, _), lost = jax.lax.scan(step, (start, solver.init(start)), jnp.asarray(losses))
    assert lost.sum() - losses.sum(0).min() <= np.sqrt(400 * np.log(6) / 2)
    assert weights.argmax() == 2


def test_weights_that_vanished_come_back() -> None:
    """float32 holds no weight of e^-200; the latent variable does."""
    weights, state = jnp.array([0.5, 0.5]), None
    solver = dual.exponentiated(1.0)
    state = solver.init(weights)
    for g in (-200.0, 200.0):
        updates, state = solver.update(jnp.array([g, 0.0]), state, weights)
        weights = optax.apply_updates(weights, updates)
    np.testing.assert_allclose(weights, 0.5, atol=1e-6)


def test_sums_along_an_axis() -> None:
    start = jnp.full((3, 4), 0.25)
    weights = after(
        dual.exponentiated(1.0, axis=1), start, lambda w: jnp.arange(12.0).reshape(3, 4), 3
    )
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(weights[0], weights[2], rtol=1e-5)


# ---------------------------------------------------------------- as any transform of optax


@each
def test_jit_vmap_and_one_compilation(name: str) -> None:
    solver = SOLVERS[name]
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(grads: Any, state: Any, multipliers: Any) -> Any:
        updates, state = solver.update(grads, state, multipliers)
        return optax.apply_updates(multipliers, updates), state

    multipliers, state = START, solver.init(START)
    plain, plain_state = START, solver.init(START)
    for seed in range(3):
        grads = jax.tree.map(lambda x, s=seed: jnp.cos(3 * x + s), START)
        multipliers, state = step(grads, state, multipliers)
        updates, plain_state = solver.update(grads, plain_state, plain)
        plain = optax.apply_updates(plain, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), multipliers, plain)
    both = jnp.stack([START["a"], START["a"][::-1]])
    states = jax.vmap(solver.init)(both)
    stacked, _ = jax.vmap(solver.update)(jnp.sin(both), states, both)
    alone, _ = solver.update(jnp.sin(both[1]), solver.init(both[1]), both[1])
    np.testing.assert_allclose(stacked[1], alone, rtol=1e-5, atol=1e-7)


@each
def test_in_every_place_of_optax(name: str, tmp_path: Path) -> None:
    solver = SOLVERS[name]
    # Of both signs: equal steps of all entries leave weights that sum to 1 where they are.
    grads = jax.tree.map(lambda x: jnp.sin(x) - 0.3, START)
    parts = {"ours": solver, "still": optax.set_to_zero()}
    split = optax.partition(parts, {"a": "ours", "b": "still"})
    updates, _ = split.update(grads, split.init(START), START)
    assert (updates["a"] != 0).any() and (updates["b"]["c"] == 0).all()
    guarded = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), solver), 2)
    state = guarded.init(START)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), START)
    updates, state = guarded.update(bad, state, START)
    assert all((u == 0).all() for u in jax.tree.leaves(updates))
    updates, state = guarded.update(grads, state, START)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    same = optax.tree.map_params(solver, lambda x: x, solver.init(START))
    chex.assert_trees_all_equal(same, solver.init(START))
    assert solver.update({}, solver.init({}), {})[0] == {}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        again = checkpointer.restore(tmp_path / "state", shapes)
    chex.assert_trees_all_equal(again, state)


@each
def test_narrow_multipliers_keep_wide_latent_variables(name: str) -> None:
    solver = SOLVERS[name]
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), START)
    state = solver.init(narrow)
    updates, later = solver.update(narrow, state, narrow)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, narrow)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, later)
    if isinstance(state, dual.LatentState):
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.latent))


def test_learning_rates_are_injected_and_scheduled() -> None:
    for factory in (dual.sign, dual.squashed, dual.exponentiated):
        injected = optax.inject_hyperparams(factory)(learning_rate=0.1)
        plain = factory(learning_rate=0.1)
        x, g = START["a"], jnp.array([1.0, -2.0, 0.5])
        a, _ = injected.update(g, injected.init(x), x)
        b, _ = plain.update(g, plain.init(x), x)
        np.testing.assert_allclose(a, b, rtol=1e-5)
        still = factory(learning_rate=optax.constant_schedule(0.0))
        np.testing.assert_allclose(still.update(g, still.init(x), x)[0], 0, atol=1e-7)


@pytest.mark.parametrize("factory", [dual.squashed, lambda: dual.exponentiated(0.1)])
def test_the_multipliers_are_needed(factory: Any) -> None:
    solver = factory()
    with pytest.raises(
        ValueError, match="You are using a transformation that requires the current"
    ):
        solver.update(START, solver.init(START))


def test_dual_is_part_of_the_package() -> None:
    assert optim.dual.sign is dual.sign
