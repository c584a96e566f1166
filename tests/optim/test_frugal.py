"""FRUGAL: its identities, float64 NumPy written from the formulas, and the authors' own classes where they are."""

import functools
import inspect
import math
import os
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import optim
from optim import projector


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "block": {"kernel": normal(6, 8), "bias": normal(8, seed=1)},
    "embed": normal(5, 4, seed=2),
    "stack": normal(2, 4, 6, seed=3),
    "nothing": None,
}
# Of the stack nothing says which axis numbers layers, and it is left whole with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:stack .*left whole")
# The leading axis of the stack numbers layers.
STACKED = {**dict.fromkeys(PARAMS), "stack": MuonDimensionNumbers(1, 2)}


def gradient(params: Any, step: int) -> Any:
    return jax.tree.map(lambda x: jnp.cos(3 * x + step), params)


def train(solver: Any, steps: int, params: Any = PARAMS, **extra: Any) -> Iterator[tuple[Any, Any]]:
    """(parameters, state) after each step."""
    update = jax.jit(functools.partial(solver.update, **extra))
    state = solver.init(params)
    for step in range(steps):
        updates, state = update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


def last(solver: Any, steps: int, params: Any = PARAMS, **extra: Any) -> Any:
    return list(train(solver, steps, params, **extra))[-1][0]


def split_state(state: Any) -> Any:
    return state[0] if not hasattr(state, "projection") else state


FULL = {
    "adam": optax.scale_by_adam(),
    "lion": optim.scale_by_lion(),
    "momentum": optax.trace(0.9),
}


@pytest.mark.parametrize(
    ("full", "name"),
    [("adam", "columns"), ("adam", "rows"), ("lion", "blockwise"), ("momentum", "columns")],
)
def test_density_one_is_the_full_optimizer(full: str, name: str) -> None:
    solver = optim.frugal(
        0.01, 1.0, getattr(projector, name)(), None, FULL[full], dimension_numbers=STACKED
    )
    right = optax.chain(FULL[full], optax.scale_by_learning_rate(0.01))
    chex.assert_trees_all_close(last(solver, 4), last(right, 4), rtol=1e-6)


def test_density_zero_is_sign_descent_on_linear_weights() -> None:
    found = last(optim.frugal(0.01, 0.0, dimension_numbers=STACKED), 4)
    sign, adam = last(optax.sign_sgd(0.01), 4), last(optax.adam(0.01), 4)
    right = {
        "block": {"kernel": sign["block"]["kernel"], "bias": adam["block"]["bias"]},
        "embed": adam["embed"],
        "stack": sign["stack"],
        "nothing": None,
    }
    chex.assert_trees_all_close(found, right, rtol=1e-6)


def test_without_the_rest_it_is_adam_on_the_columns_kept() -> None:
    params = {"w": PARAMS["block"]["kernel"]}
    solver = optim.frugal(0.01, 0.5, projector.columns(), 100, state_free=None, weight_decay=0.1)
    *_, (found, state) = train(solver, 5, params)
    kept = np.asarray(split_state(state).projection["w"].kept)
    mask = np.isin(np.arange(8), kept)

    def masked(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda g: g * mask, updates), state

    right = optax.chain(
        optax.GradientTransformation(lambda _: optax.EmptyState(), masked),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.01),
    )
    chex.assert_trees_all_close(found, last(right, 5, params), rtol=1e-6)
    assert mask.sum() == 4


@pytest.mark.parametrize("name", ["columns", "rows", "svd"])
@pytest.mark.parametrize("on_refresh", ["reset", "keep"])
def test_against_float64_numpy(name: str, on_refresh: Any) -> None:
    """Adam, signs and decay from the formulas; the lines or basis are those of our state."""
    rate, decay, gap, free, proj = 0.02, 0.1, 3, 0.5, 0.7
    with jax.enable_x64(True):
        w = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)))
        solver = optim.frugal(
            rate, 0.5, getattr(projector, name)(), gap, weight_decay=decay, on_refresh=on_refresh,
            inactive_lr_scale=free, proj_lr_scale=proj,
        )  # fmt: skip
        x, count, moments = np.asarray(w), 0, None
        for step, (after, state) in enumerate(train(solver, 8, w)):
            split = split_state(state).projection
            if name == "svd":
                left = np.asarray(split.left)
                down, up = (lambda g, p=left: p.T @ g), (lambda c, p=left: p @ c)
            else:
                axis = 1 if name == "columns" else 0
                # Ones and zeros that pick lines.
                pick = np.eye(x.shape[axis])[:, np.asarray(split.kept)]
                down = (lambda g, p=pick: g @ p) if axis else (lambda g, p=pick: p.T @ g)
                up = (lambda c, p=pick: c @ p.T) if axis else (lambda c, p=pick: p @ c)
            g = np.cos(3 * x + step)
            small = down(g)
            if step == 0 or (step % gap == 0 and on_refresh == "reset"):
                count, moments = 0, np.zeros((2, *small.shape))
            count += 1
            moments[0] = 0.9 * moments[0] + 0.1 * small
            moments[1] = 0.999 * moments[1] + 0.001 * small**2
            adam = (moments[0] / (1 - 0.9**count)) / (
                np.sqrt(moments[1] / (1 - 0.999**count)) + 1e-8
            )
            rest = g - up(small)
            x = x * (1 - rate * decay) - rate * proj * (up(adam) + free * np.sign(rest))
            np.testing.assert_allclose(after, x, rtol=1e-9, atol=1e-11)


def test_refreshes_at_the_gap_and_only_there() -> None:
    states = [split_state(s) for _, s in train(optim.frugal(0.01, update_gap=3), 8)]
    assert [int(s.turn) for s in states] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert [int(s.count) for s in states] == list(range(1, 9))
    # With the state from zero: its own count starts again too.
    assert [int(s.part.count) for s in states] == [1, 2, 3, 1, 2, 3, 1, 2]
    assert [int(s.whole.count) for s in states] == list(range(1, 9))
    kept = [tuple(np.asarray(s.projection["block"]["kernel"].kept)) for s in states]
    assert kept[0] == kept[2] and kept[3] == kept[5] and kept[0] != kept[3] != kept[6]


def test_refreshes_by_hand() -> None:
    solver = optim.frugal(0.01, update_gap=None)
    state = solver.init(PARAMS)
    turns = []
    for told in ({}, {"refresh": True}, {"refresh": False}, {"refresh": jnp.bool_(True)}, {}):
        _, state = solver.update(PARAMS, state, PARAMS, **told)
        turns.append(int(state[0].turn))
    assert turns == [0, 1, 1, 2, 2]
    # At the same steps, it is the same training.
    gap = optim.frugal(0.01, update_gap=2)
    params, state = PARAMS, solver.init(PARAMS)
    for step in range(4):
        g = gradient(params, step)
        updates, state = solver.update(g, state, params, refresh=step % 2 == 0)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(params, last(gap, 4), rtol=1e-6)


def test_no_decomposition_under_vmap_without_a_refresh() -> None:
    solver = optim.scale_by_frugal(0.5, projector.svd())
    params = jnp.stack([PARAMS["block"]["kernel"], -2 * PARAMS["block"]["kernel"] + 0.1])
    states = jax.vmap(solver.init)(params)

    def text(**told: Any) -> str:
        update = lambda g, s: solver.update(g, s, **told)
        return str(jax.make_jaxpr(jax.vmap(update))(params, states))

    assert " svd[" in text() and " svd[" in text(refresh=True)
    assert " svd[" not in text(refresh=False)
    # By hand, it is one by one.
    for refresh in (True, False):
        updates, states = jax.vmap(functools.partial(solver.update, refresh=refresh))(
            params, states
        )
    for i in range(2):
        state = solver.init(params[i])
        for _ in range(2):
            right, state = solver.update(params[i], state)
        np.testing.assert_allclose(updates[i], right, rtol=1e-4, atol=1e-5)


def test_the_key_decides_and_nothing_else() -> None:
    seeds = [last(optim.frugal(0.01, key=key), 3) for key in (1, 1, 2, jax.random.key(1))]
    chex.assert_trees_all_equal(seeds[0], seeds[1])
    chex.assert_trees_all_equal(seeds[0], seeds[3])
    assert (seeds[0]["block"]["kernel"] != seeds[2]["block"]["kernel"]).any()
    # In a scan as in a loop.
    solver = optim.frugal(0.01, key=1)

    def step(carry: Any, i: Any) -> Any:
        params, state = carry
        updates, state = solver.update(gradient(params, i), state, params)
        return (optax.apply_updates(params, updates), state), None

    (found, _), _ = jax.lax.scan(step, (PARAMS, solver.init(PARAMS)), jnp.arange(3))
    chex.assert_trees_all_close(found, seeds[0], rtol=1e-5)


def test_reprojected_moments_stay_where_columns_do() -> None:
    params = {"w": normal(5, 12)}
    solver = optim.frugal(0.0, 0.5, projector.columns(), 4, on_refresh="reproject")
    states = [split_state(s) for _, s in train(solver, 5, params)]
    old, new = (s.projection["w"].kept for s in states[3:])
    stay = np.intersect1d(old, new)
    assert 0 < stay.size < 6
    g = gradient(params, 4)["w"]
    for field, decay, power in (("mu", 0.9, 1), ("nu", 0.999, 2)):
        before, after = (np.asarray(getattr(s.part, field)["w"]) for s in states[3:])
        for j, column in enumerate(np.asarray(new)):
            held = before[:, np.asarray(old) == column].sum(1)  # zero where it is new
            right = decay * held + (1 - decay) * g[:, column] ** power
            np.testing.assert_allclose(after[:, j], right, rtol=1e-4, atol=1e-7)
    assert int(states[-1].part.count) == 5


def test_reprojected_second_moments_are_not_negative() -> None:
    params = {"w": normal(5, 7)}
    solver = optim.frugal(0.01, 0.5, projector.svd(), 2, on_refresh="reproject")
    for params_, state in train(solver, 6, params):
        assert (split_state(state).part.nu["w"] >= 0).all()
        assert np.isfinite(params_["w"]).all()


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        # Of a 64 x 128 matrix at 1/4: what the projector holds, and how many numbers are compact.
        ("columns", (4 * 32 + 5 * 128, 64 * 32)),
        ("rows", (4 * 16 + 5 * 64, 16 * 128)),
        ("randk", (4 * 2048, 2048)),
        ("svd", (4 * 16 * 64, 16 * 128)),
        ("random", (4 * 16 * 64, 16 * 128)),
        ("blockwise", (4 * 2, 64 * 128)),
    ],
)
def test_bytes_of_the_state_are_those_of_the_formula(name: str, extra: tuple[int, int]) -> None:
    params = {"w": jnp.ones((64, 128)), "bias": jnp.ones(128)}
    state = jax.eval_shape(optim.scale_by_frugal(0.25, getattr(projector, name)()).init, params)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    index, compact = extra
    assert size(state.projection) == index
    # Two moments and a count; of the bias too.
    assert size(state.part) == 8 * compact + 4
    assert size(state.whole) == 8 * 128 + 4
    assert size((state.count, state.turn, state.key)) == 16


def test_buffers_can_be_donated() -> None:
    solver = optim.frugal(0.01)
    update = jax.jit(solver.update, donate_argnums=(0, 1))
    grads, state = jax.tree.map(jnp.copy, PARAMS), solver.init(PARAMS)
    right, kept = PARAMS, solver.init(PARAMS)
    for _ in range(2):
        right, kept = solver.update(right, kept, PARAMS)
    for _ in range(2):
        grads, state = update(grads, state, PARAMS)
    chex.assert_trees_all_close((grads, state), (right, kept), rtol=1e-6)


def test_any_stateless_transform_for_the_rest() -> None:
    params = {"w": PARAMS["block"]["kernel"]}
    named = last(optim.frugal(0.01, state_free="sgd", inactive_lr_scale=0.5), 3, params)
    given = last(optim.frugal(0.01, state_free=optax.scale(0.5)), 3, params)
    chex.assert_trees_all_close(named, given, rtol=1e-6)
    with pytest.raises(ValueError, match="state_free must be a transform without state, got"):
        optim.frugal(0.01, state_free=optax.trace(0.9)).init(params)


def test_what_is_split_can_be_told() -> None:
    shape = lambda **told: jax.eval_shape(optim.scale_by_frugal(0.5, **told).init, PARAMS)
    count = lambda state: len(jax.tree.leaves(state.part.mu))
    assert count(shape()) == 1
    assert count(shape(dimension_numbers=STACKED)) == 2
    which = {
        "block": {"kernel": True, "bias": False},
        "embed": True,
        "stack": True,
        "nothing": None,
    }
    assert count(shape(split=which)) == 3
    assert count(shape(split=lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree))) == 2
    with pytest.raises(ValueError, match=r"block/bias: expected a matrix .* got the shape \(8,\)"):
        shape(split=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 1.5}, "density must be a number from 0 to 1, got 1.5"),
        ({"density": jnp.float32(0.5)}, "density must be a plain number, .*got .*0.5.*static_args"),
        ({"update_gap": 0}, "update_gap must be an int of at least 1, or None .*, got 0"),
        ({"on_refresh": "drop"}, "on_refresh must be 'reset', 'keep' or 'reproject', got 'drop'"),
        (
            {"state_free": "lion"},
            "state_free must be 'sign', 'sgd', None or an optax transform, got 'lion'",
        ),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    # Without the checks of types, which come first in tests.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(optim.scale_by_frugal)(**settings)


@pytest.mark.parametrize("name", ["columns", "random", "blockwise"])
def test_it_learns_a_linear_map(name: str) -> None:
    x, w = normal(32, 6), normal(6, 4, seed=1)
    loss = lambda p: jnp.mean((x @ p["a"] @ p["b"] - x @ w) ** 2)
    params = {"a": normal(6, 8, seed=2) / 3, "b": normal(8, 4, seed=3) / 3}
    rate = optax.cosine_decay_schedule(0.03, 400)
    solver = optim.frugal(rate, 0.25, getattr(projector, name)(), 20)

    @jax.jit
    def run(params: Any) -> Any:
        def step(_: Any, carry: Any) -> Any:
            p, state = carry
            updates, state = solver.update(jax.grad(loss)(p), state, p)
            return optax.apply_updates(p, updates), state

        return jax.lax.fori_loop(0, 400, step, (params, solver.init(params)))[0]

    assert loss(run(params)) < 1e-3 * loss(params)


@pytest.mark.parametrize(
    ("choice", "make"), [("columns", projector.columns), ("rows", projector.rows)]
)
@pytest.mark.filterwarnings("ignore")
def test_against_the_authors_classes(
    choice: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.environ.get("FRUGAL_CHECKOUT")
    if path is None:
        pytest.skip("FRUGAL_CHECKOUT names no checkout of the authors' program")
    torch = pytest.importorskip("torch")
    # What their program imports and newer PyTorch no longer has.
    base = pytest.importorskip("torch.optim.optimizer")
    monkeypatch.setattr(base, "_dispatch_sqrt", math.sqrt, raising=False)
    monkeypatch.syspath_prepend(path)
    from frugal.adamw import CoordAdamW  # type: ignore[import-not-found]

    w = np.random.default_rng(0).normal(size=(6, 8))
    settings: dict[str, Any] = {"inactive_lr_scale": 0.5, "density": 0.5, "update_gap": 3}
    with jax.enable_x64(True):
        solver = optim.frugal(
            0.02, projector=make(), proj_lr_scale=0.7, weight_decay=0.1, **settings
        )
        ours = list(train(solver, 8, jnp.asarray(w)))
    lines = [np.asarray(split_state(state).projection.kept) for _, state in ours]
    drawn = iter(lines[::3])
    # Their lines are ours; they keep the first half of what they draw.
    monkeypatch.setattr(
        torch, "randperm", lambda n, **_: torch.tensor(np.r_[next(drawn), [0] * n])[:n]
    )
    x = torch.nn.Parameter(torch.tensor(w))
    theirs = CoordAdamW(
        [{"params": [x], "is_proj_params": True}], lr=0.02, weight_decay=0.1, coord_choice=choice,
        proj_params_lr_scale=0.7, no_deprecation_warning=True, **settings,
    )  # fmt: skip
    for step, (after, _) in enumerate(ours):
        x.grad = torch.cos(3 * x.detach() + step)
        theirs.step()
        np.testing.assert_allclose(after, x.detach().numpy(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "axis"),
    [("columns", 0), ("columns", 1), ("rows", 0), ("randk", 1), ("svd", 0), ("blockwise", 1)],
)
def test_explicitly_sharded_matrices(name: str, axis: int) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    solver = optim.frugal(0.1, 0.5, getattr(projector, name)(), 1)
    right, _ = solver.update(
        {"w": normal(8, 16)}, solver.init({"w": normal(8, 16)}), {"w": normal(8, 16)}
    )
    with jax.set_mesh(mesh):
        spec = jax.P("x", None) if axis == 0 else jax.P(None, "x")
        params = {"w": jax.device_put(normal(8, 16), jax.NamedSharding(mesh, spec))}
        state = solver.init(params)
        updates, after = jax.jit(solver.update)(params, state, params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        assert jax.typeof(updates["w"]) == jax.typeof(params["w"])
        np.testing.assert_allclose(updates["w"], right["w"], rtol=1e-4, atol=1e-6)
