"""GaLore against pytorch-optimizer and against optax's own, where their mathematics agree."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import optim


def separated(shape: tuple[int, int], step: int) -> np.ndarray:
    """A gradient whose singular values are far from each other: its singular vectors are stable."""
    chance = np.random.default_rng(step)
    r = min(shape)
    left = np.linalg.qr(chance.normal(size=(shape[0], r)))[0]
    right = np.linalg.qr(chance.normal(size=(shape[1], r)))[0]
    return ((left * 2.0 ** -np.arange(r)) @ right.T).astype(np.float32)


def ours(solver: Any, shape: tuple[int, int], steps: int, refreshes: set[int] | None) -> np.ndarray:
    x = jnp.ones(shape)
    state = solver.init(x)
    update = jax.jit(solver.update, static_argnames="refresh")
    for step in range(steps):
        told = {} if refreshes is None else {"refresh": step in refreshes}
        updates, state = update(jnp.asarray(separated(shape, step)), state, x, **told)
        x = optax.apply_updates(x, updates)
    return np.asarray(x)


@pytest.mark.parametrize(
    ("side", "shape"),
    [
        ("std", (8, 5)),
        ("std", (5, 8)),
        ("reverse_std", (8, 5)),
        ("reverse_std", (5, 8)),
        ("left", (8, 5)),
        ("right", (5, 8)),
        ("full", (8, 5)),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_against_pytorch_optimizer(side: Any, shape: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("pytorch_optimizer")
    x = torch.nn.Parameter(torch.ones(shape))
    # From both sides, two vectors would give off the diagonal, where the gradient has nothing at a refresh, the
    # rounding of either program, which Adam makes steps of.
    rank = 1 if side == "full" else 2
    group = {
        "params": [x], "rank": rank, "update_proj_gap": 3, "scale": 0.25, "projection_type": side,
    }  # fmt: skip
    # Its epsilon is added before the bias is corrected: small ones agree.
    solver = theirs.GaLore([group], lr=0.1, eps=1e-12)
    for step in range(7):
        x.grad = torch.tensor(separated(shape, step))
        solver.step()
    # It counts from 1, so that its refreshes are those of steps 0, 2, 5.
    base = optax.scale_by_adam(eps=1e-12)
    found = ours(optim.galore(0.1, rank, None, base_optimizer=base, side=side), shape, 7, {0, 2, 5})
    np.testing.assert_allclose(found, x.detach().numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "base"),
    [
        ((8, 5), optax.scale_by_adam()),
        ((5, 8), optim.scale_by_lion()),
        ((4, 4), optax.scale_by_adam()),
    ],
)
def test_against_optax(shape: tuple[int, int], base: Any) -> None:
    theirs = optax.contrib.galore(
        0.1, rank=2, update_proj_gap=3, scale=0.5, base_optimizer=base, weight_decay=0.1
    )
    mine = optim.galore(0.1, 2, 3, 0.5, base, weight_decay=0.1, side="reverse_std")
    right = ours(theirs, shape, 7, None)
    np.testing.assert_allclose(ours(mine, shape, 7, None), right, rtol=1e-4, atol=1e-5)


def test_axes_of_attention_weights_are_those_of_optax() -> None:
    """(embedding, heads, head size) as a matrix, with optax's own dimension numbers."""
    x = jnp.asarray(separated((6, 8), 0)).reshape(6, 2, 4)
    spec = optax.contrib.MuonDimensionNumbers(0, (1, 2))
    mine = optim.galore(0.1, 2, scale=1.0, side="reverse_std", weight_dimension_numbers=spec)
    flat = optim.galore(0.1, 2, scale=1.0, side="reverse_std")
    found, state = mine.update(x, mine.init(x), x)
    right, _ = flat.update(x.reshape(6, 8), flat.init(x.reshape(6, 8)), x.reshape(6, 8))
    np.testing.assert_allclose(found.reshape(6, 8), right, rtol=1e-4, atol=1e-6)
    assert state[0].part.mu.shape == (6, 2)


@pytest.mark.parametrize(
    ("side", "floats"), [("std", 2 * 16 * 512 + 16 * 64), ("reverse_std", 2 * 16 * 64 + 16 * 512)]
)
def test_bytes_of_the_state(side: Any, floats: int) -> None:
    state = jax.eval_shape(optim.galore(0.1, 16, side=side).init, jnp.ones((64, 512)))[0]
    leaves = jax.tree.leaves((state.projection, state.part.mu, state.part.nu))
    assert sum(x.size * 4 for x in leaves) == 4 * floats


def test_the_rank_is_at_most_that_of_the_matrix() -> None:
    state = optim.galore(0.1).init({"w": jnp.ones((3, 7)), "b": jnp.ones(3)})[0]
    assert state.part.mu["w"].shape == (3, 7) and state.whole.mu["b"].shape == (3,)


def test_square_matrices_are_projected_on_the_side_of_their_inputs() -> None:
    """As in the authors' program, whose matrices are the transposes of ours."""
    g = jnp.asarray(separated((6, 6), 0))
    state = optim.galore(0.1, 2, scale=1.0).init(g)[0]
    assert state.projection.left.shape == (6, 2) and state.projection.right is None
    assert state.part.mu.shape == (2, 6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"update_gap": None}, {"update_proj_gap": None}),
        ({"base": optax.scale_by_sign()}, {"base_optimizer": optax.scale_by_sign()}),
        (
            {"dimension_numbers": optax.contrib.MuonDimensionNumbers(1, 0)},
            {"weight_dimension_numbers": optax.contrib.MuonDimensionNumbers(1, 0)},
        ),
    ],
)
def test_old_names_are_taken_with_a_warning(old: dict[str, Any], new: dict[str, Any]) -> None:
    (before,), (after,) = old, new
    with pytest.warns(DeprecationWarning, match=f"^{before} is deprecated: use {after}$"):
        solver = optim.galore(0.1, 2, **old)
    x = jnp.asarray(separated((8, 5), 0))
    found, _ = solver.update(x, solver.init(x), x)
    renamed = optim.galore(0.1, 2, **new)
    right, _ = renamed.update(x, renamed.init(x), x)
    np.testing.assert_array_equal(found, right)


def test_positions_are_those_of_optax() -> None:
    """The same call, as far as optax's goes."""
    names = lambda make: list(inspect.signature(make).parameters)
    theirs = names(optax.contrib.galore)
    assert names(optim.galore)[: len(theirs)] == theirs
