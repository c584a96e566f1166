"""State and updates are sharded as the parameters are, and never take more of a device than AdamW's."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from transforms import TRANSFORMS

import optim
from optim import projector

P = jax.P
SOLVERS = {name: make(**settings) for name, (make, settings) in TRANSFORMS.items()}
for name in ("columns", "randk", "random", "svd", "blockwise"):
    SOLVERS[f"frugal-{name}"] = optim.frugal(0.1, 0.25, getattr(projector, name)(), 2)


@functools.cache
def meshes(kind: AxisType) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh]:
    one = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    return one, jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def sharded(mesh: jax.sharding.Mesh, matrix: jax.P, vector: jax.P) -> Any:
    chance = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(chance.normal(size=shape), jnp.float32)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    layer = lambda: {"w": place(draw(64, 32), matrix), "bias": place(draw(64), vector)}
    return {"layer_0": layer(), "layer_1": layer()}


def on_a_device(tree: Any) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def is_as(x: jax.Array, like: jax.Array) -> bool:
    return x.sharding.is_equivalent_to(like.sharding, like.ndim)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_on_a_mesh_whose_axes_the_compiler_assigns(name: str) -> None:
    if name == "frugal-columns" and jax.__version_info__ >= (0, 11):
        pytest.skip("XLA of JAX 0.11 aborts where it divides a gather of columns over two axes")
    one, two = meshes(AxisType.Auto)
    solver = SOLVERS[name]
    for mesh, matrix in ((one, P(None, "x")), (two, P("x", "y"))):
        params = sharded(mesh, matrix, P("x"))
        state = solver.init(params)
        updates, after = jax.jit(solver.update)(params, state, params)
        assert jax.tree.all(jax.tree.map(is_as, updates, params))
        most = on_a_device(optax.adamw(0.1).init(params))
        # Counts, keys and the numbers of blocks and lines are a few words more.
        assert on_a_device(state) <= most + 64
        assert on_a_device(after) <= most + 64
        alone = jax.tree.map(lambda x: jax.device_put(np.asarray(x)), params)
        right, _ = jax.jit(solver.update)(alone, solver.init(alone), alone)
        for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_on_a_mesh_whose_axes_are_in_types(name: str) -> None:
    mesh, _ = meshes(AxisType.Explicit)
    solver = SOLVERS[name]
    with jax.set_mesh(mesh):
        params = sharded(mesh, P("x", None), P("x"))
        state = solver.init(params)
        updates, after = jax.jit(solver.update)(params, state, params)
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        assert on_a_device(after) <= on_a_device(optax.adamw(0.1).init(params)) + 64


@pytest.mark.parametrize("name", ["frugal", "galore", "badam"])
def test_without_compiling(name: str) -> None:
    mesh, _ = meshes(AxisType.Auto)
    params = sharded(mesh, P("x", None), P("x"))
    state = SOLVERS[name].init(params)
    updates, after = SOLVERS[name].update(params, state, params)
    assert jax.tree.all(jax.tree.map(is_as, updates, params))
    assert on_a_device(after) <= on_a_device(optax.adamw(0.1).init(params)) + 64


def test_a_compact_part_that_no_axis_divides_is_whole() -> None:
    mesh, _ = meshes(AxisType.Auto)
    x = jax.device_put(jnp.ones((8, 3)), NamedSharding(mesh, P("x")))
    state = optim.scale_by_frugal(0.5, projector.rows()).init(x)
    assert state.part.mu.shape == (4, 3) and state.part.mu.sharding.is_fully_replicated
