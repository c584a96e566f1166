"""AdamP and SGDP against the authors' own package in float64, and on weights that have no scale."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim
from optim._radial import project
from optim._trees import broadcast

# As PyTorch has them: output channels first.
SHAPES = [(), (5,), (1, 6), (6, 1), (4, 7), (3, 2, 3, 3), (2, 1)]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def start(seed: int) -> list[np.ndarray]:
    chance = np.random.default_rng(seed)
    return [chance.normal(size=shape) for shape in SHAPES]


def gradients(params: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Of the leaves in turn: orthogonal to the weights channel by channel, as a whole, or not at all."""
    chance = np.random.default_rng(1000 + seed)
    out = []
    for i, x in enumerate(params):
        g = chance.normal(size=x.shape)
        rows = (x.shape[0], -1) if x.ndim > 1 and (seed + i) % 3 == 0 else (1, -1)
        if x.ndim > 1 and (seed + i) % 3 < 2:
            flat, weights = g.reshape(rows), x.reshape(rows)
            along = (flat * weights).sum(1, keepdims=True) / (weights**2).sum(1, keepdims=True)
            g = (flat - along * weights).reshape(x.shape)
        out.append(np.asarray(g))
    return out


def ours(solver: optax.GradientTransformation, steps: int, zero: bool = False) -> list[np.ndarray]:
    params = [jnp.asarray(x) for x in start(0)]
    state, update = solver.init(params), jax.jit(solver.update)
    for seed in range(steps):
        grads = [
            jnp.asarray(g * (not zero)) for g in gradients([np.asarray(x) for x in params], seed)
        ]
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return [np.asarray(x) for x in params]


def theirs(kind: str, settings: dict[str, Any], steps: int, zero: bool = False) -> list[np.ndarray]:
    torch = pytest.importorskip("torch")
    adamp = pytest.importorskip("adamp")
    params = [torch.nn.Parameter(torch.tensor(x)) for x in start(0)]
    solver = getattr(adamp, kind)(params, **settings)
    for seed in range(steps):
        for x, g in zip(params, gradients([x.detach().numpy() for x in params], seed), strict=True):
            x.grad = torch.tensor(g * (not zero))
        solver.step()
    return [x.detach().numpy() for x in params]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("delta", [0.1, 0.9])
@pytest.mark.filterwarnings("ignore")
def test_adamp_is_that_of_its_authors(nesterov: bool, decay: float, delta: float) -> None:
    right = theirs("AdamP", dict(lr=0.05, weight_decay=decay, nesterov=nesterov, delta=delta), 6)
    found = ours(
        optim.adamp(0.05, weight_decay=decay, nesterov=nesterov, delta=delta, channel_axis=0), 6
    )
    for shape, a, b in zip(SHAPES, found, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10, err_msg=str(shape))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dampening", [0.0, 0.3])
@pytest.mark.filterwarnings("ignore")
def test_sgdp_is_that_of_its_authors(decay: float, dampening: float) -> None:
    settings: dict[str, Any] = dict(
        weight_decay=decay, momentum=0.9, dampening=dampening, nesterov=True
    )
    right = theirs("SGDP", dict(lr=0.05, **settings), 6)
    found = ours(optim.sgdp(0.05, channel_axis=0, **settings), 6)
    for shape, a, b in zip(SHAPES, found, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10, err_msg=str(shape))


@pytest.mark.filterwarnings("ignore")
def test_without_nesterov_the_authors_program_projects_its_momentum_and_ours_does_not() -> None:
    right = theirs("SGDP", dict(lr=0.05, momentum=0.9), 6)
    found = ours(optim.sgdp(0.05, momentum=0.9, channel_axis=0), 6)
    same = [np.allclose(a, b, rtol=1e-9) for a, b in zip(found, right, strict=True)]
    # What is never projected is equal; what is differs from the second step on.
    assert same[:2] == [True, True]
    assert not all(same)


@pytest.mark.filterwarnings("ignore")
def test_zero_gradients_count_as_orthogonal() -> None:
    right = theirs("AdamP", dict(lr=0.1, weight_decay=0.1), 1, zero=True)
    found = ours(optim.adamp(0.1, weight_decay=0.1, channel_axis=0), 1, zero=True)
    for a, b, x in zip(found, right, start(0), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
        np.testing.assert_allclose(a, x * (0.999 if x.ndim > 1 else 0.99), rtol=1e-12)


def test_channels_are_last_unless_told() -> None:
    chance = np.random.default_rng(3)
    step, x = chance.normal(size=(4, 5)), chance.normal(size=(4, 5))
    g = chance.normal(size=(4, 5))
    g -= x * (g * x).sum(0) / (x**2).sum(0)  # orthogonal column by column
    step, g, x = jnp.asarray(step), jnp.asarray(g), jnp.asarray(x)
    last, first = project(step, g, x), project(step.T, g.T, x.T, channel_axis=0)
    np.testing.assert_allclose(last.step, first.step.T, rtol=1e-12)
    np.testing.assert_allclose((last.step * x).sum(0), 0, atol=1e-6)
    assert float(last.decay.ravel()[0]) == pytest.approx(0.1)


def test_layers_of_a_stack_are_decided_one_by_one() -> None:
    chance = np.random.default_rng(4)
    step, x = chance.normal(size=(3, 4, 5)), chance.normal(size=(3, 4, 5))
    g = x * 1.0  # along the weights: not scale-invariant
    g[1] = chance.normal(size=(4, 5))
    g[1] -= x[1] * (g[1] * x[1]).sum(0) / (x[1] ** 2).sum(0)
    step, g, x = jnp.asarray(step), jnp.asarray(g), jnp.asarray(x)
    found = project(step, g, x, batch_axes=1)
    for i in range(3):
        alone = project(step[i], g[i], x[i])
        np.testing.assert_allclose(found.step[i], alone.step, rtol=1e-12)
        np.testing.assert_allclose(
            np.broadcast_to(found.decay, x.shape)[i], np.broadcast_to(alone.decay, x[i].shape)
        )
    assert (np.asarray(found.decay).ravel() == 0.1).tolist() == [False, True, False]
    # A stack of vectors is a stack of vectors.
    assert (project(step[0], g[0], x[0], batch_axes=1).step == step[0]).all()


def test_axes_may_be_given_for_every_leaf() -> None:
    params = {"a": jnp.asarray(start(0)[4]), "b": {"c": jnp.asarray(start(0)[5])}}
    grads = jax.tree.map(lambda x: x[::-1] - 0.3, params)
    spec = {"a": 0, "b": -1}
    solver = optim.adamp(0.1, channel_axis=spec)
    first = lambda solver: jax.jit(lambda g, x: solver.update(g, solver.init(x), x)[0])
    found = first(solver)(grads, params)
    for name, axis in (("a", 0), ("b", -1)):
        right = first(optim.adamp(0.1, channel_axis=axis))(grads[name], params[name])
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), found[name], right)
    assert broadcast(lambda tree: jax.tree.map(jnp.ndim, tree), params) == {"a": 2, "b": {"c": 4}}


def test_a_mask_says_what_is_decayed() -> None:
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    zero = jax.tree.map(jnp.zeros_like, params)
    for solver in (
        optim.adamp(0.5, weight_decay=0.1, mask={"kernel": True, "bias": False}),
        optim.sgdp(0.5, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    ):
        updates, _ = jax.jit(solver.update)(zero, solver.init(params), params)
        np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * 0.1)
        assert (updates["bias"] == 0).all()


def norm_after(solver: optax.GradientTransformation) -> float:
    """The norm of weights of -cos(w, t), which has no scale, after 2000 steps from norm 1."""
    chance = np.random.default_rng(0)
    t, w = (jnp.asarray(x / np.linalg.norm(x)) for x in chance.normal(size=(2, 1, 200)))

    def loss(w: Any) -> Any:
        return -jnp.sum(w * t) / jnp.linalg.norm(w)

    @jax.jit
    def run(w: Any) -> Any:
        def step(_: Any, carry: Any) -> Any:
            w, state = carry
            updates, state = solver.update(jax.grad(loss)(w), state, w)
            return optax.apply_updates(w, updates), state

        return jax.lax.fori_loop(0, 2000, step, (w, solver.init(w)))[0]

    return float(jnp.linalg.norm(run(w)))


@pytest.mark.parametrize(
    ("solver", "low", "high"),
    [
        # Around 1.049, 4.446, 1.049, 1.348, 1.719, 1.101 for another start.
        (optax.sgd(0.1), 1.0, 1.1),
        (optax.sgd(0.1, momentum=0.9), 3.0, 6.0),
        (optim.sgdp(0.1, channel_axis=0), 1.0, 1.1),
        (optim.sgdp(0.1, momentum=0.9, channel_axis=0), 1.1, 1.6),
        (optax.adam(0.01), 1.4, 2.2),
        (optim.adamp(0.01, channel_axis=0), 1.0, 1.25),
    ],
    ids=["sgd", "sgd momentum", "sgdp", "sgdp momentum", "adam", "adamp"],
)
def test_the_norm_of_weights_without_a_scale(solver: Any, low: float, high: float) -> None:
    assert low < norm_after(solver) < high


def test_steps_never_shrink_what_is_projected() -> None:
    """By Pythagoras: without decay, the norm cannot fall while the projection applies."""
    chance = np.random.default_rng(5)
    x = jnp.asarray(chance.normal(size=(4, 9)))
    solver = optim.adamp(0.05, channel_axis=0)
    state, update = solver.init(x), jax.jit(solver.update)
    for _ in range(20):
        g = chance.normal(size=x.shape)
        g -= np.asarray(x) * (g * x).sum(1, keepdims=True) / (x**2).sum(1, keepdims=True)
        updates, state = update(jnp.asarray(g), state, x)
        np.testing.assert_allclose((updates * x).sum(1), 0, atol=1e-7)
        after = optax.apply_updates(x, updates)
        assert (jnp.linalg.norm(after, axis=1) >= jnp.linalg.norm(x, axis=1)).all()
        x = after


def test_momentum_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum must be from 0 to below 1, got 1.0"):
        optim.sgdp(0.1, momentum=1.0)
