"""The sums behind the projection, however they are taken."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optim
from optim import projection


def arrays(*shape: int, count: int = 4, dtype: Any = jnp.float32) -> list[jax.Array]:
    chance = np.random.default_rng(sum(shape))
    return [jnp.asarray(chance.normal(size=shape), dtype) for _ in range(count)]


# Blocks of one row, of several, with rows left over, and of more rows than there are.
@pytest.mark.parametrize("shape", [(7, 5), (3, 3, 4, 6), (5, 9000), (2051, 8), (2, 3)])
def test_sums_by_rows_are_the_sums(shape: tuple[int, ...]) -> None:
    step = lambda m, v: m / (jnp.abs(v) + 0.1)
    g, x, m, v = arrays(*shape)
    found = jax.jit(lambda *a: projection._sums_by_rows(step, *a))(g, x, m, v)
    products = (g * x, g * g, x * x, x * step(m, v))
    for a, product in zip(found, products, strict=True):
        right = np.asarray(product, np.float64).reshape(-1, shape[-1]).sum(0)
        assert a.shape == (1,) * (len(shape) - 1) + shape[-1:]
        np.testing.assert_allclose(a.ravel(), right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("solver", [optim.adamp(0.1, weight_decay=0.1), optim.sgdp(0.1, 0.9)])
def test_both_ways_give_one_step(solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params, g = {"w": arrays(6, 5)[0], "b": arrays(5)[0]}, {"w": arrays(6, 5)[1], "b": arrays(5)[1]}
    # Orthogonal column by column, so that something is taken out.
    g["w"] -= params["w"] * (g["w"] * params["w"]).sum(0) / (params["w"] ** 2).sum(0)

    def after_two() -> Any:
        x, state = params, solver.init(params)
        for _ in range(2):
            updates, state = solver.update(g, state, x)
            x = optax.apply_updates(x, updates)
        return x

    right = after_two()
    asked = []
    monkeypatch.setattr(projection, "_rows_are_faster", lambda *_: asked.append(1) or True)
    found = after_two()
    assert len(asked) == 2  # of the matrix at each step; the vector has no sums
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, right)


def test_rows_are_for_large_matrices_on_one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = (jnp.zeros(s) for s in ((1024, 1024), (8, 8)))
    faster = lambda x, axis=1, batch=0: projection._rows_are_faster(x, axis, batch)
    assert jax.device_count() > 1 and not faster(large)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert faster(large)
    assert not faster(small)
    assert not faster(large, axis=0)
    assert not faster(large, batch=1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not faster(large)
