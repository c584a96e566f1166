"""Every kind of leaf, node and tree that optax's transforms take, through every transform."""

from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms import TRANSFORMS

import optim

each = pytest.mark.parametrize("name", list(TRANSFORMS))
MATRIX = np.cos(np.arange(12.0) ** 2).astype(np.float32).reshape(4, 3)
# As users have them: NumPy arrays and numbers, Python numbers, nothing, what optax has masked, empty arrays.
MIXED: dict[str, Any] = {
    "array": MATRIX,
    "empty": np.zeros((0, 4), np.float32),
    "empty rows": np.zeros((4, 0), np.float32),
    "masked": optax.MaskedNode(),
    "nothing": None,
    "number": 1.5,
    "numpy number": np.float32(0.5),
}


def make(name: str, **changes: Any) -> optax.GradientTransformation:
    factory, settings = TRANSFORMS[name]
    return factory(**{**settings, **changes})


@each
def test_leaves_that_are_no_jax_arrays_are_as_if_they_were(name: str) -> None:
    solver = make(name)
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), MIXED)

    def two(params: Any) -> Any:
        _, state = solver.update(params, solver.init(params), params)
        return solver.update(params, state, params)

    (found, state), (right, after) = two(MIXED), jax.jit(two)(arrays)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, arrays)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
        assert np.isfinite(a).all()
    assert any((np.asarray(x) != 0).any() for x in jax.tree.leaves(found))
    # Nothing in a state is weakly typed, which would be compiled again at the second step.
    assert not any(x.weak_type for x in jax.tree.leaves(state))


@each
def test_dtypes_of_updates_and_states_where_gradients_are_of_another(name: str) -> None:
    solver = make(name)
    for g_type, p_type in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)):
        params = {"w": jnp.ones((4, 3), p_type), "b": jnp.ones(3, p_type)}
        grads = jax.tree.map(lambda x, dtype=g_type: x.astype(dtype), params)
        state = jax.eval_shape(solver.init, params)
        updates, after = jax.eval_shape(solver.update, grads, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(updates))


@each
@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_other_generators_of_random_numbers(name: str, kind: str) -> None:
    with jax.default_prng_impl(kind):
        solver = make(name)
        params = {"w": jnp.ones((4, 3))}
        state = jax.eval_shape(solver.init, params)
        _, after = jax.eval_shape(solver.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)


@pytest.fixture(scope="module")
def model() -> Any:
    """A tree that can be called."""
    return eqx.filter(eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0)), eqx.is_array)


@each
def test_equinox_modules_are_trees(name: str, model: Any) -> None:
    """Parameters, and masks made of them by jax.tree.map, which can be called as well."""
    settings: dict[str, Any] = {}
    if name != "galore":
        settings = dict(mask=jax.tree.map(lambda x: x.ndim > 1, model), weight_decay=0.5)
    solver = make(name, **settings)
    zero = jax.tree.map(jnp.zeros_like, model)
    updates, _ = jax.jit(lambda g, x: solver.update(g, solver.init(x), x))(zero, model)
    assert jax.tree.structure(updates) == jax.tree.structure(model)
    # Without a gradient only the decay moves, and only what the mask selects; BAdam has one block of those.
    moved = [bool((u != 0).any()) for u in jax.tree.leaves(updates)]
    wanted = [x.ndim > 1 for x in jax.tree.leaves(model)]
    assert all(a <= b for a, b in zip(moved, wanted, strict=True))
    if settings and name != "badam":
        assert moved == wanted


@pytest.mark.parametrize("make", [optim.adamp, lambda **k: optim.sgdp(1e-3, 0.9, **k)])
def test_axes_may_be_callable_trees(make: Any, model: Any) -> None:
    """Equinox has (outputs, inputs): the axis of channels is 0."""
    grads = jax.tree.map(jnp.cos, model)
    run = lambda axis: jax.jit(
        lambda g, x: (lambda s: s.update(g, s.init(x), x)[0])(make(channel_axis=axis))
    )(grads, model)
    chex.assert_trees_all_equal(run(jax.tree.map(lambda _: 0, model)), run(0))


def test_a_channel_axis_that_is_not_there_is_named() -> None:
    params = {"layer": {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}}
    solver = optim.adamp(channel_axis=2)
    with pytest.raises(ValueError, match="must be an axis of layer/w, of shape .4, 3., got 2"):
        solver.update(params, solver.init(params), params)


# ---------------------------------------------------------------- calls that users of optax make


def test_arguments_stand_where_optax_has_them() -> None:
    params = {"w": jnp.asarray(MATRIX)}
    grads = jax.tree.map(jnp.cos, params)

    def after(solver: optax.GradientTransformation) -> Any:
        update = jax.jit(solver.update)
        x, state = params, solver.init(params)
        for _ in range(3):
            updates, state = update(grads, state, x)
            x = optax.apply_updates(x, updates)
        return x, state

    # Nothing is orthogonal below a cosine of 0, so that SGDP is SGD and AdamP is AdamW.
    pairs = [
        (optim.sgdp(1e-2, 0.9, True, delta=0.0), optax.sgd(1e-2, 0.9, True)),
        (optim.sgdp(1e-2, None, delta=0.0), optax.sgd(1e-2, None)),
        (
            optim.sgdp(1e-2, 0.9, False, jnp.bfloat16, delta=0.0),
            optax.sgd(1e-2, 0.9, False, jnp.bfloat16),
        ),
        (
            optim.adamp(1e-2, 0.8, 0.9, 1e-3, eps_root=1e-2, weight_decay=0.1, delta=0.0),
            optax.adamw(1e-2, 0.8, 0.9, 1e-3, 1e-2, weight_decay=0.1),
        ),
        (
            optim.lion(1e-2, 0.8, 0.9, jnp.bfloat16, 0.1, {"w": True}),
            optax.lion(1e-2, 0.8, 0.9, jnp.bfloat16, 0.1, {"w": True}),
        ),
    ]
    for ours, theirs in pairs:
        (x, state), (y, _) = after(ours), after(theirs)
        # bfloat16 momentum is rounded once here and twice there.
        narrow = any(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(state))
        np.testing.assert_allclose(x["w"], y["w"], rtol=1e-3 if narrow else 1e-5)


def test_a_float_is_no_nesterov_and_no_kappa() -> None:
    """Arguments of optax in places that mean something else here."""
    with pytest.raises(
        ValueError, match="nesterov must be a bool, got 0.1; dampening is a keyword"
    ):
        optim.scale_by_sgdp.__wrapped__(0.9, 0.1)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="kappa must be an optim.kappa.Kappa such as l2"):
        optim.scale_by_lion_k.__wrapped__(0.9, 0.99)  # type: ignore[attr-defined]


def test_extra_arguments_reach_the_optimizer_of_latent_variables() -> None:
    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
    solver = optim.dual.latent(plateau, optim.dual.softmax())
    x = jnp.array([0.5, 0.5])
    state = solver.init(x)
    for _ in range(4):
        _, state = solver.update(jnp.array([1.0, -1.0]), state, x, value=1.0)
    assert float(optax.tree.get(state, "scale")) < 1


def test_complex_multipliers_are_refused() -> None:
    with pytest.raises(ValueError, match="multipliers must be real, got cost of complex64"):
        optim.dual.squashed().init({"cost": jnp.ones(2, jnp.complex64) / 2})


def test_diagnostics_take_every_leaf() -> None:
    """NumPy, narrow and complex leaves, and distances whose squares overflow."""
    params = {"far": np.float32(1e30), "empty": np.zeros((0, 2)), "near": jnp.ones(2, jnp.bfloat16)}
    np.testing.assert_allclose(optim.constraint_violation(params, 1.0), 1e30, rtol=1e-6)
    assert optim.constraint_violation({}, 1.0) == 0
    z, g = jnp.array([0.6 + 0.8j]), jnp.array([-1.2 - 1.6j])
    np.testing.assert_allclose(optim.kkt_score(g, z, 1.0), 0, atol=1e-6)  # at the bound, along -g
    np.testing.assert_allclose(optim.kkt_score(1j * g, z, 1.0), 2, atol=1e-6)
    assert optim.kkt_score(jnp.ones(2, jnp.bfloat16), jnp.zeros(2), 1.0).dtype == jnp.float32
