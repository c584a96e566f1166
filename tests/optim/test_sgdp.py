"""SGDP in plain float64 NumPy: as the paper has it, which is ours, and with the momentum projected too."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim

RATE, MOMENTUM, DECAY, DELTA, RATIO, EPS = 0.05, 0.9, 0.01, 0.1, 0.1, 1e-8
SHAPES = [(5,), (4, 7), (1, 6), (6, 1), (3, 2, 3, 3)]  # output channels first


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def gradient(x: np.ndarray, step: int) -> np.ndarray:
    """By turns orthogonal to each channel (but of one number, where it would be 0), to the layer, to nothing."""
    g = np.random.default_rng(step).normal(size=x.shape)
    if x.ndim > 1 and step % 3 < 2:
        view = (x.shape[0], -1) if step % 3 == 0 and x.size > x.shape[0] else (1, -1)
        flat, w = g.reshape(view), x.reshape(view)
        g = (flat - w * (flat * w).sum(1, keepdims=True) / (w * w).sum(1, keepdims=True)).reshape(
            x.shape
        )
    return g


def projected(d: np.ndarray, g: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, float]:
    for view in ((x.shape[0], -1), (1, -1)) if x.ndim > 1 else ():
        rows, w, along = g.reshape(view), x.reshape(view), d.reshape(view)
        norm = np.linalg.norm(w, axis=1, keepdims=True)
        cosine = (rows * w).sum(1) / (np.linalg.norm(rows, axis=1) * norm[:, 0])
        if np.abs(cosine).max() < DELTA / np.sqrt(w.shape[1]):
            unit = w / (norm + EPS)
            out = along - unit * (unit * along).sum(1, keepdims=True)
            return out.reshape(x.shape), RATIO
    return d, 1.0


def reference(x: np.ndarray, steps: int, shared: bool, nesterov: bool = False) -> np.ndarray:
    """``shared``: the step and the momentum are one memory, so that both are projected."""
    buffer = np.zeros_like(x)
    for t in range(steps):
        g = gradient(x, t)
        buffer = MOMENTUM * buffer + g
        d, ratio = projected(g + MOMENTUM * buffer if nesterov else buffer, g, x)
        if shared:
            buffer = d
        x = x * (1 - RATE * DECAY * ratio / (1 - MOMENTUM)) - RATE * d
    return x


def ours(x: np.ndarray, steps: int, nesterov: bool = False) -> np.ndarray:
    solver = optim.sgdp(RATE, MOMENTUM, weight_decay=DECAY, nesterov=nesterov, channel_axis=0)
    update = jax.jit(solver.update)
    state: Any = solver.init(jnp.asarray(x))
    for t in range(steps):
        updates, state = update(jnp.asarray(gradient(x, t)), state, jnp.asarray(x))
        x = np.asarray(optax.apply_updates(jnp.asarray(x), updates))
    return x


def theirs(x: np.ndarray, steps: int) -> np.ndarray:
    torch = pytest.importorskip("torch")
    adamp = pytest.importorskip("adamp")
    w = torch.nn.Parameter(torch.tensor(x))
    solver = adamp.SGDP([w], lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    for t in range(steps):
        w.grad = torch.tensor(gradient(w.detach().numpy(), t))
        solver.step()
    return w.detach().numpy()


@pytest.fixture(params=SHAPES, ids=str)
def start(request: pytest.FixtureRequest) -> np.ndarray:
    return np.random.default_rng(sum(request.param)).normal(size=request.param)


@pytest.mark.parametrize("nesterov", [False, True])
def test_ours_is_that_of_the_paper(start: np.ndarray, nesterov: bool) -> None:
    right = reference(start, 7, shared=False, nesterov=nesterov)
    np.testing.assert_allclose(ours(start, 7, nesterov), right, rtol=1e-11, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_the_authors_program_projects_its_momentum(start: np.ndarray) -> None:
    found = theirs(start, 7)
    np.testing.assert_allclose(found, reference(start, 7, shared=True), rtol=1e-11, atol=1e-12)
    # Of vectors nothing is projected; one row, or one column, is a matrix.
    same = np.allclose(found, reference(start, 7, shared=False), rtol=1e-9)
    assert same == (start.ndim == 1)
