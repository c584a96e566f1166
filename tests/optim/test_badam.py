"""BAdam against its rule in plain NumPy, and what it holds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim

SIZES = {"embed": (5, 2), "layer_0": (3, 4), "layer_1": (3, 4), "layer_2": (3, 4)}
RATE, GAP, DECAY = 0.05, 3, 0.1


def start() -> dict[str, np.ndarray]:
    chance = np.random.default_rng(0)
    return {name: chance.normal(size=shape) for name, shape in SIZES.items()}


def reference(steps: int, order: list[str]) -> dict[str, np.ndarray]:
    """One block at a time, its moments from zero; nothing else moves or decays."""
    x = start()
    for step in range(steps):
        name, t = order[step // GAP % len(order)], step % GAP + 1
        if t == 1:
            mu, nu = np.zeros(SIZES[name]), np.zeros(SIZES[name])
        g = np.cos(3 * x[name] + step)
        mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g**2
        adam = mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - 0.999**t)) + 1e-8)
        decay = 0 if name == "embed" else DECAY
        x[name] = x[name] - RATE * (adam + decay * x[name])
    return x


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_against_the_rule(order: Any) -> None:
    mask = {name: name != "embed" for name in SIZES}
    with jax.enable_x64(True):
        solver = optim.badam(RATE, GAP, weight_decay=DECAY, mask=mask, order=order)
        x = jax.tree.map(jnp.asarray, start())
        state, update, turns = solver.init(x), jax.jit(solver.update), []
        for step in range(15):
            g = jax.tree.map(lambda a, step=step: jnp.cos(3 * a + step), x)
            updates, state = update(g, state, x)
            x = optax.apply_updates(x, updates)
            turns.append(list(SIZES)[int(state[0].projection.active[0])])
    assert set(turns[: 4 * GAP]) == set(SIZES) and turns[0] == turns[GAP - 1] != turns[GAP]
    if order != "shuffled":
        assert turns[::GAP] == [*list(SIZES)[:: 1 if order == "ascending" else -1], turns[0]]
    right = reference(15, turns[::GAP][:4] if turns[0] == turns[-1] else turns[::GAP])
    for name in SIZES:
        np.testing.assert_allclose(x[name], right[name], rtol=1e-9, atol=1e-11)


def test_the_state_is_that_of_the_largest_block() -> None:
    params = {f"layer_{i}": {"w": jnp.ones((8, 8)), "b": jnp.ones(8)} for i in range(12)}
    state = jax.eval_shape(optim.badam(0.1).init, params)
    assert sum(x.size for x in jax.tree.leaves(state[0].part)) == 2 * 72 + 1
    assert optim.state_bytes(optim.badam(0.1), params).total < 8 * 72 + 150


def test_a_scheduled_decay_goes_on_over_blocks() -> None:
    """The schedule counts all updates, though the block's own count starts again."""
    x, zero = [jnp.ones(2)], [jnp.zeros(2)]
    solver = optim.badam(1.0, 2, weight_decay=lambda count: jnp.where(count == 3, 0.5, 0.0))
    state = solver.init(x)
    moved = []
    for _ in range(5):
        updates, state = solver.update(zero, state, x)
        moved.append(float(updates[0][0]))
    np.testing.assert_allclose(moved, [0, 0, 0, -0.5, 0])


def test_layers_of_a_stack_take_turns() -> None:
    params = {"w": jnp.ones((4, 2, 3))}
    spec = optax.contrib.MuonDimensionNumbers(1, 2)
    solver = optim.badam(0.1, 1, dimension_numbers=spec)
    state, moved = solver.init(params), []
    for _ in range(4):
        updates, state = solver.update(params, state, params)
        moved.append([bool(jnp.any(layer != 0)) for layer in updates["w"]])
    assert np.array(moved).sum(0).tolist() == np.array(moved).sum(1).tolist() == [1] * 4
