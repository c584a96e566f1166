"""Ours step by step beside other people's programs, in float64 PyTorch on the same gradients.

lion-pytorch and pytorch-optimizer; AdamP and SGDP of their authors are in test_adamp.py. Skipped where these
are not installed (make oracles).
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim

SHAPES = [(), (5,), (1, 6), (6, 1), (4, 7), (3, 2, 3, 3)]  # output channels first
STEPS = 8


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def arrays(seed: int) -> list[np.ndarray]:
    chance = np.random.default_rng(seed)
    return [np.asarray(chance.normal(size=shape)) for shape in SHAPES]


def gradients(params: list[np.ndarray], step: int) -> list[np.ndarray]:
    """By turns orthogonal to each channel (where that has more than one number), to the leaf, to nothing."""
    found = []
    for i, (x, g) in enumerate(zip(params, arrays(100 + step), strict=True)):
        if x.ndim > 1 and (step + i) % 3 < 2:
            view = (x.shape[0], -1) if (step + i) % 3 == 0 and x.size > x.shape[0] else (1, -1)
            rows, w = g.reshape(view), x.reshape(view)
            along = (rows * w).sum(1, keepdims=True) / (w * w).sum(1, keepdims=True)
            g = (rows - along * w).reshape(x.shape)
        found.append(g)
    return found


def rate(step: Any) -> Any:
    return 0.05 / (1 + 0.3 * step)


def ours(solver: optax.GradientTransformation) -> list[list[np.ndarray]]:
    """The parameters after every step."""
    params, state = [jnp.asarray(x) for x in arrays(0)], solver.init(arrays(0))
    update, found = jax.jit(solver.update), []
    for step in range(STEPS):
        grads = gradients([np.asarray(x) for x in params], step)
        updates, state = update([jnp.asarray(g) for g in grads], state, params)
        params = optax.apply_updates(params, updates)
        found.append([np.asarray(x) for x in params])
    return found


def theirs(make: Callable[[Any], Any]) -> list[list[np.ndarray]]:
    torch = pytest.importorskip("torch")
    params = [torch.nn.Parameter(torch.tensor(x)) for x in arrays(0)]
    solver, found = make(params), []
    for step in range(STEPS):
        for group in solver.param_groups:
            group["lr"] = rate(step)
        grads = gradients([x.detach().numpy() for x in params], step)
        for x, g in zip(params, grads, strict=True):
            x.grad = torch.tensor(g)
        solver.step()
        found.append([x.detach().numpy().copy() for x in params])
    return found


def same(a: list[list[np.ndarray]], b: list[list[np.ndarray]]) -> None:
    for step, (left, right) in enumerate(zip(a, b, strict=True)):
        for shape, x, y in zip(SHAPES, left, right, strict=True):
            np.testing.assert_allclose(
                x, y, rtol=1e-9, atol=1e-11, err_msg=f"{shape} after {step + 1}"
            )


# Beside the defaults: a look-ahead of nothing, and a b1 above b2.
@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.99), (0.95, 0.98), (0.8, 0.8), (0.99, 0.6)])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lion_is_that_of_lion_pytorch(b1: float, b2: float, decay: float) -> None:
    lion = pytest.importorskip("lion_pytorch")
    right = theirs(lambda p: lion.Lion(p, lr=0.05, betas=(b1, b2), weight_decay=decay))
    same(ours(optim.lion(rate, b1, b2, weight_decay=decay)), right)


def test_lion_pytorchs_decoupled_decay_is_a_decay_over_the_first_rate() -> None:
    lion = pytest.importorskip("lion_pytorch")
    right = theirs(lambda p: lion.Lion(p, lr=0.05, weight_decay=0.02, decoupled_weight_decay=True))
    same(ours(optim.lion(rate, weight_decay=0.02 / 0.05)), right)


def test_cautious_lion_is_that_of_pytorch_optimizer() -> None:
    library = pytest.importorskip("pytorch_optimizer")
    right = theirs(
        lambda p: library.Lion(p, weight_decay=0.1, weight_decouple=True, cautious=True, foreach=False)
    )  # fmt: skip
    same(ours(optim.lion(rate, weight_decay=0.1, cautious=True)), right)


def test_cautious_lion_of_lion_pytorch_scales_by_the_mean() -> None:
    """Algorithm 2 of the paper: entries over those kept; ours, algorithm 1, adds one to those."""
    torch = pytest.importorskip("torch")
    cautious = pytest.importorskip("lion_pytorch.cautious_lion")
    g, mu = np.random.default_rng(1).normal(size=(2, 40))
    x = torch.nn.Parameter(torch.zeros(40, dtype=torch.float64))
    x.grad = torch.tensor(g)
    solver = cautious.Lion([x], lr=1.0)
    solver.state[x]["exp_avg"] = torch.tensor(mu)
    solver.step()
    transform = optim.scale_by_lion(cautious=True)
    u, _ = transform.update(jnp.asarray(g), optim.ScaleByLionState(jnp.int32(1), jnp.asarray(mu)))
    kept = int((u != 0).sum())
    assert 0 < kept < 40
    np.testing.assert_allclose(-x.detach().numpy(), u * (kept + 1) / kept, rtol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("settings", [{}, {"dampening": 0.3, "delta": 0.9, "wd_ratio": 0.3}])
def test_sgdp_is_that_of_pytorch_optimizer(nesterov: bool, settings: dict[str, float]) -> None:
    """Which leaves the momentum alone, as the paper and ours do."""
    library = pytest.importorskip("pytorch_optimizer")
    all_settings: dict[str, Any] = dict(
        momentum=0.9, weight_decay=0.01, nesterov=nesterov, **settings
    )
    right = theirs(lambda p: library.SGDP(p, **all_settings))
    same(ours(optim.sgdp(rate, channel_axis=0, **all_settings)), right)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_adamp_is_that_of_its_authors_also_off_the_defaults(nesterov: bool) -> None:
    adamp = pytest.importorskip("adamp")
    settings: dict[str, Any] = dict(weight_decay=0.2, delta=0.5, wd_ratio=0.3, nesterov=nesterov)
    right = theirs(lambda p: adamp.AdamP(p, betas=(0.8, 0.95), eps=1e-5, **settings))
    same(ours(optim.adamp(rate, 0.8, 0.95, 1e-5, channel_axis=0, **settings)), right)


@pytest.mark.parametrize("name", ["AdamP", "SGDP"])
@pytest.mark.filterwarnings("ignore")
def test_rows_of_zeros_and_tiny_weights_are_as_with_the_authors(name: str) -> None:
    torch, adamp = pytest.importorskip("torch"), pytest.importorskip("adamp")
    x, g = arrays(7)[4], arrays(8)[4]
    x[0], x[1], g[2] = 0, 1e-9 * x[1], 1e-12 * g[2]
    g[3:] -= x[3:] * (g[3:] * x[3:]).sum(1, keepdims=True) / (x[3:] ** 2).sum(1, keepdims=True)
    w = torch.nn.Parameter(torch.tensor(x))
    w.grad = torch.tensor(g)
    # A threshold that every channel passes, so that all of them are projected.
    settings: dict[str, Any] = dict(weight_decay=0.1, delta=9.0)
    getattr(adamp, name)([w], lr=0.05, **settings).step()
    solver = {"AdamP": optim.adamp, "SGDP": optim.sgdp}[name](0.05, channel_axis=0, **settings)
    updates, _ = solver.update(jnp.asarray(g), solver.init(jnp.asarray(x)), jnp.asarray(x))
    found = np.asarray(x + updates)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, w.detach().numpy(), rtol=1e-9, atol=1e-15)
