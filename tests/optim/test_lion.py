"""Lion is optax's, to rounding; what makes it fast changes nothing else."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optim

PARAMS = {"w": jnp.ones((6, 5)), "b": jnp.zeros(5)}


def gradients(seed: int, dtype: Any = jnp.float32) -> Any:
    keys = jax.random.split(jax.random.key(seed), 2)
    draw = lambda key, x: jax.random.normal(key, x.shape, dtype)
    return {name: draw(key, x) for key, (name, x) in zip(keys, PARAMS.items(), strict=True)}


def both(ours: Any, theirs: Any, steps: int, params: Any = PARAMS) -> Any:
    a, b = ours.init(params), theirs.init(params)
    for seed in range(steps):
        g = gradients(seed)
        u, a = ours.update(g, a, params)
        v, b = theirs.update(g, b, params)
        yield g, (u, a), (v, b)


@pytest.mark.parametrize(
    ("b1", "b2"),
    [(0.9, 0.99), (0.95, 0.98), (0.5, 0.5), (0.9, 0.3), (0.0, 0.9), (0.9, 0.0), (1.0, 1.0)],
)
@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16])
def test_signs_and_moments_are_those_of_optax(b1: float, b2: float, mu_dtype: Any) -> None:
    ours, theirs = (
        optim.scale_by_lion(b1, b2, mu_dtype),
        optax.scale_by_lion(b1, b2, mu_dtype=mu_dtype),
    )
    before = previous = theirs.init(PARAMS).mu
    for g, (u, a), (v, b) in both(ours, theirs, 6):
        for name in PARAMS:
            x, y = (np.asarray(t[name], np.float64) for t in (before, g))
            c = b1 * x + (1 - b1) * y
            # optax multiplies a narrow average by b1 and b2 in its own dtype, and rounds twice.
            eps = float(jnp.finfo(mu_dtype or jnp.float32).eps)
            near = np.abs(c) < 8 * eps * (b1 * np.abs(x) + (1 - b1) * np.abs(y))
            np.testing.assert_array_equal(np.where(near, 0, u[name]), np.where(near, 0, v[name]))
            assert u[name].dtype == v[name].dtype
            assert a.mu[name].dtype == b.mu[name].dtype
            found, right = (np.asarray(t.mu[name], np.float64) for t in (a, b))
            mine = b2 * np.asarray(previous[name], np.float64) + (1 - b2) * y
            np.testing.assert_allclose(found, mine, rtol=eps, atol=1e-7)
            np.testing.assert_allclose(found, right, rtol=4 * eps, atol=4 * eps * np.abs(y).max())
        before, previous = b.mu, a.mu
        assert int(a.count) == int(b.count)


# Terms that cancel but for their last digits are where the form matters.
@given(st.integers(0, 2**32 - 1), st.floats(-1e-6, 1e-6))
def test_signs_differ_only_within_rounding_of_zero(seed: int, gap: float) -> None:
    chance = np.random.default_rng(seed)
    mu = chance.normal(size=32).astype(np.float32)
    g = (-9 * mu * (1 + gap * chance.normal(size=32))).astype(np.float32)  # .9 mu + .1 g is about 0
    state = optim.ScaleByLionState(jnp.int32(3), jnp.asarray(mu))
    u, _ = update(jnp.asarray(g), state)
    c = 0.9 * mu.astype(np.float64) + (1 - 0.9) * g.astype(np.float64)
    clear = np.abs(c) > 4 * np.finfo(np.float32).eps * np.abs(mu)
    np.testing.assert_array_equal(np.asarray(u)[clear], np.sign(c)[clear])


update = jax.jit(optim.scale_by_lion().update)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3, optax.linear_schedule(0.5, 0.1, 3)])
@pytest.mark.parametrize("mask", [None, {"w": True, "b": False}])
def test_the_alias_is_that_of_optax(weight_decay: Any, mask: Any) -> None:
    ours = optim.lion(0.01, weight_decay=weight_decay, mask=mask)
    theirs = optax.lion(0.01, weight_decay=weight_decay, mask=mask)
    for _, (u, _), (v, _) in both(ours, theirs, 4):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), u, v)


def test_zero_gradients_at_the_start_do_not_move() -> None:
    solver = optim.scale_by_lion()
    u, _ = solver.update(jax.tree.map(jnp.zeros_like, PARAMS), solver.init(PARAMS))
    assert all((x == 0).all() for x in jax.tree.leaves(u))


def test_cautious_keeps_what_agrees_and_scales_it() -> None:
    solver = optim.scale_by_lion(cautious=True)
    mu, g = jnp.array([10.0, 10.0, -1.0, 0.0]), jnp.array([1.0, -1.0, -2.0, 3.0])
    u, state = solver.update(g, optim.ScaleByLionState(jnp.int32(1), mu))
    # The second entry's sign is against its gradient: three of four are kept, times 4 / (3 + 1).
    assert u.tolist() == [1.0, 0.0, -1.0, 1.0]
    np.testing.assert_allclose(state.mu, 0.99 * mu + 0.01 * g, rtol=1e-6)


def test_cautious_steps_go_down() -> None:
    f = lambda x: jnp.sum(jnp.cosh(x))
    solver = optim.lion(0.02, weight_decay=0.0, cautious=True)
    x, state = jnp.linspace(-2, 2, 7), solver.init(jnp.zeros(7))
    for _ in range(60):
        g = jax.grad(f)(x)
        u, state = solver.update(g, state, x)
        assert float(jnp.vdot(u, g)) <= 0
        x = optax.apply_updates(x, u)
    assert f(x) < 7.5


@pytest.mark.parametrize("solver", [optim.lion(0.1), optim.lion_k(0.1, optim.kappa.huber(0.1))])
def test_no_copy_of_the_moment_is_made(solver: optax.GradientTransformation) -> None:
    """The compiled step holds no temporary of the size of the parameters, which optax's does."""
    x = jnp.ones(2**16)

    def temporaries(solver: optax.GradientTransformation) -> int:
        def step(x: Any, state: Any, g: Any) -> Any:
            updates, state = solver.update(g, state, x)
            return optax.apply_updates(x, updates), state

        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(x, solver.init(x), x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(solver) < x.nbytes / 4
