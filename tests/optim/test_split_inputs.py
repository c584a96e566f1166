"""FRUGAL, GaLore and BAdam on inputs that optax's own optimizers take: dtypes, shapes, keys, arguments."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import optim
from optim import projector

MAKERS = {
    "frugal": lambda **more: optim.frugal(0.1, update_gap=2, **more),
    "frugal-columns": lambda **more: optim.frugal(
        0.1, projector=projector.columns(), update_gap=2, **more
    ),
    "frugal-random": lambda **more: optim.frugal(
        0.1, projector=projector.random(), update_gap=2, **more
    ),
    "galore": lambda **more: optim.galore(0.1, rank=2, update_proj_gap=2, **more),
    "badam": lambda **more: optim.badam(0.1, update_gap=2, **more),
}
each = pytest.mark.parametrize("name", list(MAKERS))


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    chance = np.random.default_rng(seed)
    values = chance.normal(size=shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = values + 1j * chance.normal(size=shape)
    return jnp.asarray(values, dtype)


def run(solver: Any, params: Any, grads: Any, steps: int = 3) -> tuple[Any, Any, Any]:
    """Parameters, updates and state after some steps with one gradient that grows."""
    state, updates = solver.init(params), None
    update = jax.jit(solver.update)
    for step in range(steps):
        g = jax.tree.map(lambda x, by=step + 1: x * by, grads)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, updates, state


@each
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_gradients_of_another_dtype(name: str, dtypes: tuple[str, str]) -> None:
    """As optax.adamw takes them: the state has the dtypes that the parameters gave it."""
    own, other = map(jnp.dtype, dtypes)
    params = {"w": normal(6, 8, dtype=own), "b": normal(8, dtype=own)}
    grads = {"w": normal(6, 8, seed=1, dtype=other), "b": normal(8, seed=1, dtype=other)}
    solver = MAKERS[name]()
    _, updates, state = run(solver, params, grads)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
    before = jax.eval_shape(solver.init, params)
    chex.assert_trees_all_equal_dtypes(before, state)
    if own == jnp.float32:
        exact, _, _ = run(solver, params, jax.tree.map(lambda x: x.astype(own), grads))
        found, _, _ = run(solver, params, grads)
        chex.assert_trees_all_close(found, exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("make", [projector.random, projector.svd])
def test_bases_of_complex_matrices_are_unitary_and_split_exactly(make: Any, side: Any) -> None:
    g = normal(6, 9, dtype=jnp.complex64)
    project = make(3, side)
    bases = project.refresh(jax.random.key(0), jnp.int32(0), g, project.init(g, 0.5))
    for x in jax.tree.leaves(bases):
        np.testing.assert_allclose(x.conj().T @ x, np.eye(3), atol=1e-5)
    compact, rest = project.down(g, bases)
    part = project.up(compact, bases, g)
    np.testing.assert_allclose(part + rest, g, atol=1e-5)
    again, none = project.down(part, bases)
    np.testing.assert_allclose(again, compact, atol=1e-5)
    np.testing.assert_allclose(none, np.zeros_like(none), atol=1e-5)
    if make is projector.svd and side != "full":
        values = np.linalg.svd(np.asarray(g), compute_uv=False)
        left = np.linalg.norm(rest)
        np.testing.assert_allclose(left, np.linalg.norm(values[3:]), rtol=1e-4)


def test_the_whole_space_of_complex_matrices_is_gradient_descent() -> None:
    params, g = (normal(4, 6, seed=seed, dtype=jnp.complex64) for seed in (0, 1))
    right, _, _ = run(optax.sgd(0.1), params, g)
    for side in ("std", "reverse_std", "full"):
        solver = optim.galore(0.1, 6, scale=1.0, base_optimizer=optax.identity(), side=side)
        found, _, _ = run(solver, params, g)
        np.testing.assert_allclose(found, right, atol=1e-4)


@each
def test_complex_leaves_beside_real_ones(name: str) -> None:
    """What is imaginary in one leaf touches no other."""
    params = {"c": normal(4, 6, dtype=jnp.complex64), "r": normal(4, 6, seed=1)}
    grads = {"c": normal(4, 6, seed=2, dtype=jnp.complex64), "r": normal(4, 6, seed=3)}
    found, updates, _ = run(MAKERS[name](), params, grads)
    chex.assert_trees_all_equal_dtypes(updates, params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    # A complex matrix without imaginary part moves as the real one.
    twin = {"c": params["r"].astype(jnp.complex64), "r": params["r"]}
    gradient = {"c": grads["r"].astype(jnp.complex64), "r": grads["r"]}
    if name in ("galore", "frugal-columns"):
        keeps_all = {"rank": 6} if name == "galore" else {"density": 1.0}
        make = optim.galore if name == "galore" else optim.frugal
        found, _, _ = run(make(0.1, **keeps_all), twin, gradient)
        np.testing.assert_allclose(found["c"].real, found["r"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["c"].imag, 0, atol=1e-4)


@each
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), (2, 0, 3)])
def test_empty_leaves(name: str, shape: tuple[int, ...]) -> None:
    params = {"layers_0": {"empty": jnp.zeros(shape), "w": jnp.ones((4, 4))}}
    found, updates, _ = run(MAKERS[name](), params, params, 1)
    assert updates["layers_0"]["empty"].shape == shape
    assert np.isfinite(found["layers_0"]["w"]).all()
    assert (found["layers_0"]["w"] != 1).all()


@each
def test_leaves_of_numpy_and_python(name: str) -> None:
    params = {"w": np.ones((4, 6), np.float32), "scale": 1.5, "b": np.float32(2.0)}
    solver = MAKERS[name]()
    updates, _ = solver.update(params, solver.init(params), params)
    alike = jax.tree.map(jnp.asarray, params)
    right, _ = solver.update(alike, solver.init(alike), alike)
    chex.assert_trees_all_close(updates, right, rtol=1e-5)


@each
@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_generators_of_random_numbers(name: str, impl: str) -> None:
    params = {"w": normal(4, 6), "layer_0": normal(4, 6, seed=1)}
    right, _, _ = run(MAKERS[name](), params, params)
    with jax.default_prng_impl(impl):
        found, _, _ = run(MAKERS[name](), params, params)
        chex.assert_trees_all_equal(found, right)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_any_kind_and_old_ones(impl: str) -> None:
    params = normal(8, 8)
    with jax.default_prng_impl(impl):
        words = [
            np.asarray(optim.scale_by_frugal(key=key).init(params).key)
            for key in (jax.random.key(3), jax.random.PRNGKey(3), jax.random.key(4), 3, 4)
        ]
    assert words[0].tolist() == words[1].tolist()
    assert len({tuple(w) for w in (words[0], words[2])}) == 2
    assert words[3].tolist() != words[4].tolist()


def wants_value() -> optax.GradientTransformationExtraArgs:
    """A transform without a default for the value, as reduce_on_plateau and those of line searches."""

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **extra: Any) -> Any:
        return jax.tree.map(lambda g: g * value, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


@pytest.mark.parametrize("name", ["frugal", "galore", "badam"])
@pytest.mark.parametrize(
    "inner", [wants_value(), optax.contrib.reduce_on_plateau(patience=1)], ids=["value", "plateau"]
)
def test_extra_arguments_reach_the_full_optimizer(name: str, inner: Any) -> None:
    argument = {"frugal": "state_full", "galore": "base_optimizer", "badam": "base"}[name]
    solver = MAKERS[name](**{argument: inner})
    params = {"w": normal(4, 6), "b": normal(6)}
    state = solver.init(params)
    updates, _ = solver.update(params, state, params, value=jnp.float32(2.0), unknown="thing")
    assert any((u != 0).any() for u in jax.tree.leaves(updates))
    with pytest.raises(TypeError, match="value"):
        solver.update(params, state, params)


def test_the_base_of_badam_sees_the_parameters() -> None:
    """Also where weights decay: the decay is no business of the base optimizer."""
    params = {"layer_0": normal(3, 4), "layer_1": normal(3, 4, seed=1)}
    to_zero = optax.stateless(lambda updates, params: jax.tree.map(lambda x: x, params))
    solver = optim.badam(1.0, 1, to_zero, order="ascending")
    state, x = solver.init(params), params
    for _ in range(2):
        updates, state = solver.update(params, state, x)
        x = optax.apply_updates(x, updates)
    chex.assert_trees_all_close(x, jax.tree.map(jnp.zeros_like, x), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "float64"])
@pytest.mark.parametrize("shape", [(64, 48), (33, 257)])
@pytest.mark.parametrize("make", [projector.svd, projector.random])
def test_no_step_from_rounding_residue(make: Any, shape: tuple[int, int], dtype: str) -> None:
    """Of a gradient in the subspace nothing is left, whatever the order of its entries."""
    rank = 3
    with jax.enable_x64(dtype == "float64"):
        for seed, side in enumerate(("std", "reverse_std", "full")):
            project = make(rank, side)
            a, b = normal(shape[0], rank, seed=seed), normal(rank, shape[1], seed=9)
            spread = 10.0 ** jnp.linspace(-3, 3, shape[0])[:, None]
            g = (spread * a @ b).astype(dtype)
            bases = project.refresh(jax.random.key(seed), jnp.int32(0), g, project.init(g, 0.5))
            if make is projector.random:  # a gradient in the span of the bases
                g = project.up(project.down(g, bases)[0], bases, g)
            _, rest = project.down(g, bases)
            assert (rest == 0).all()
            # Of another gradient all but few entries are left.
            _, rest = project.down(normal(*shape, seed=7).astype(dtype), bases)
            assert (rest != 0).mean() > 0.95


def test_the_rest_of_other_gradients_stays() -> None:
    g = normal(64, 48).at[3, 5].set(jnp.nan)
    project = projector.random(4)
    bases = project.refresh(jax.random.key(0), jnp.int32(0), g, project.init(g, 0.5))
    _, rest = project.down(g, bases)
    assert (rest != 0).mean() > 0.999 and jnp.isnan(rest).any()
    # With no vectors at all everything is the rest, small entries too.
    g = normal(8, 8).at[0, 0].set(1e-12)
    empty = project.init(g, 0.0)._replace(left=jnp.zeros((8, 0)))
    np.testing.assert_array_equal(project.down(g, empty)[1], g)


def peak(solver: Any, params: Any) -> int:
    """Bytes in use at once in a step that writes over parameters and state."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = solver.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    shapes = jax.eval_shape(solver.init, params), params
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, *shapes).compile()
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes


@pytest.mark.parametrize("is_stacked", [True, False])
def test_a_step_of_galore_peaks_below_adamw(is_stacked: bool) -> None:
    """Decompositions are made one after the other, in a stack too."""
    shape = jax.ShapeDtypeStruct((128, 256), jnp.float32)
    params: Any = {f"layer_{i}": {"w": shape} for i in range(12)}
    if is_stacked:
        params = {"layers": {"w": jax.ShapeDtypeStruct((12, 128, 256), jnp.float32)}}
    found = peak(optim.galore(0.1, rank=32), params)
    assert found < peak(optax.adamw(0.1), params)
