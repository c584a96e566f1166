"""The sums behind the projection, however they are taken."""

from typing import Any
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim
from optim import _radial


def arrays(*shape: int, count: int = 4, dtype: Any = jnp.float32) -> list[jax.Array]:
    chance = np.random.default_rng(sum(shape))
    return [jnp.asarray(chance.normal(size=shape), dtype) for _ in range(count)]


# Blocks of one row, of several, with rows left over, and of more rows than there are.
@pytest.mark.parametrize("shape", [(7, 5), (3, 3, 4, 6), (5, 9000), (2051, 8), (2, 3)])
def test_sums_by_rows_are_the_sums(shape: tuple[int, ...]) -> None:
    step = lambda g, m, v: m / (jnp.abs(v) + 0.1)
    g, x, m, v = arrays(*shape)
    _, found = jax.jit(lambda *a: _radial._sums_by_rows(step, None, *a))(g, x, m, v)
    products = (g * x, g * g, x * x, x * step(g, m, v))
    for a, product in zip(found, products, strict=True):
        right = np.asarray(product, np.float64).reshape(-1, shape[-1]).sum(0)
        assert a.shape == (1,) * (len(shape) - 1) + shape[-1:]
        np.testing.assert_allclose(a.ravel(), right, rtol=1e-4, atol=1e-3)


SOLVERS = {
    "adamp": optim.adamp(0.1, weight_decay=0.1),
    "adamp-nesterov": optim.adamp(0.1, nesterov=True),
    # Its first moment is cast after the step, which no row of the state could hold.
    "adamp-bfloat16": optim.adamp(0.1, mu_dtype=jnp.bfloat16),
    "sgdp": optim.sgdp(0.1, 0.9),
    "sgdp-nesterov": optim.sgdp(0.1, 0.9, weight_decay=0.1, nesterov=True),
}


# In turns of 3 rows: one is left over of 7.
@pytest.mark.parametrize("shape", [(6, 5), (7, 5), (3, 3, 5)])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=list(SOLVERS))
def test_both_ways_give_one_step(
    solver: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_radial, "BLOCK", 3 * shape[-1])
    w, g = arrays(*shape, count=2)
    # Orthogonal column by column, so that something is taken out.
    rows = tuple(range(len(shape) - 1))
    g -= w * (g * w).sum(rows) / (w**2).sum(rows)
    params, grads = ({"w": a, "b": b} for a, b in zip((w, g), arrays(5, count=2), strict=True))

    def after_two() -> Any:
        x, state = params, solver.init(params)
        for _ in range(2):
            updates, state = solver.update(grads, state, x)
            x = optax.apply_updates(x, updates)
        return x, state

    right = after_two()
    faster = mock.Mock(return_value=True)
    monkeypatch.setattr(_radial, "_rows_are_faster", faster)
    found = after_two()
    assert faster.call_count == 2  # of the matrix at each step; the vector has no sums
    chex.assert_trees_all_equal_structs(found, right)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_moments_are_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_radial, "_rows_are_faster", lambda *_: True)
    x = jnp.zeros((600, 1000))  # with rows left over
    solver = optim.adamp(0.1)

    def step(x: Any, state: Any, g: Any) -> Any:
        updates, state = solver.update(g, state, x)
        return optax.apply_updates(x, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(x, solver.init(x), x).compile()
    program = str(compiled.as_text())
    assert "while(" in program and "f32[600,1000]{1,0} fusion(" in program
    assert "f32[600,1000]{1,0} copy(" not in program


def test_rows_are_for_large_matrices_on_one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = (jnp.zeros(s) for s in ((1024, 1024), (8, 8)))
    faster = lambda x, axis=1, batch=0: _radial._rows_are_faster(x, axis, batch)
    assert jax.device_count() > 1 and not faster(large)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert faster(large)
    assert not faster(small)
    assert not faster(large, axis=0)
    assert not faster(large, batch=1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not faster(large)
