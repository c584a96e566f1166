"""Every transform for every dtype and every size of gradients, against the same in complex128.

The reference sees the rounded inputs. Real numbers are complex ones without an imaginary part, so that one
compiled reference serves all dtypes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms import TRANSFORMS, WHOLE

import optim
from optim import kappa

# dtype of gradients, dtype of parameters, the relative error allowed.
TYPES = {
    "float16": (jnp.float16, jnp.float16, 1e-2),
    "bfloat16 gradients": (jnp.bfloat16, jnp.float32, 2e-2),
    "bfloat16 parameters": (jnp.float32, jnp.bfloat16, 2e-2),
    "float32": (jnp.float32, jnp.float32, 2e-4),
    "complex64": (jnp.complex64, jnp.complex64, 2e-4),
}
SHAPES = {"matrix": (6, 4), "tall": (4, 2, 3), "vector": (5,), "scalar": (), "empty": (0, 4)}


def sizes(dtype: Any, largest: float) -> list[float]:
    """Largest entries of gradients: none, tiny, ordinary, huge."""
    if dtype == jnp.float16:
        return [0.0, 1e-2, 1.0, 2e4]  # a step of a thousandth is to be a normal number
    return [0.0, 1e-30, 1.0, largest]


def draw(seed: int, is_complex: bool, shape: tuple[int, ...]) -> np.ndarray:
    """Entries of separate moduli from .3 to 1, so that no sign, order or decision hangs on rounding."""
    chance = np.random.default_rng(seed)
    count = int(np.prod(shape))
    moduli = chance.permutation(np.linspace(0.3, 1.0, count)).reshape(shape)
    turn = (
        chance.uniform(0, 2 * np.pi, shape) if is_complex else np.pi * chance.integers(0, 2, shape)
    )
    return moduli * np.exp(1j * turn)


def inputs(g_type: Any, p_type: Any, scales: list[float]) -> tuple[Any, Any]:
    """Parameters, and gradients with a leading axis of the scales; the matrix' are orthogonal to it."""
    is_complex = jnp.issubdtype(g_type, jnp.complexfloating)
    params = {k: draw(i, is_complex, s) for i, (k, s) in enumerate(SHAPES.items())}
    grads = {k: draw(10 + i, is_complex, s) for i, (k, s) in enumerate(SHAPES.items())}
    w, g = params["matrix"], grads["matrix"]
    grads["matrix"] = g - w * (w.conj() * g).sum(0).real / (abs(w) ** 2).sum(0)

    def rounded(x: np.ndarray, dtype: Any) -> jax.Array:
        return jnp.asarray(x if is_complex else x.real, dtype)

    stacked = {k: np.stack([scale * g for scale in scales]) for k, g in grads.items()}
    return (
        {k: rounded(x, p_type) for k, x in params.items()} | {"nothing": None},
        {k: rounded(g, g_type) for k, g in stacked.items()} | {"nothing": None},
    )


def two_updates(solver: optax.GradientTransformation) -> Any:
    """For every scale the updates of two steps, of gradients g and .7 g."""

    @jax.jit
    def run(params: Any, grads: Any) -> Any:
        def one(g: Any) -> Any:
            first, state = solver.update(g, solver.init(params), params)
            second = jax.tree.map(lambda x: (0.7 * x).astype(x.dtype), g)
            return first, solver.update(second, state, params)[0]

        return jax.vmap(one)(grads)

    return run


def as_complex(x: Any) -> jax.Array:
    return jnp.asarray(np.asarray(x).astype(np.complex128))


def check(found: Any, right: Any, tolerance: float, what: str) -> None:
    """Close to the largest entry of each scale, finite, and 0 where that is 0."""
    found, right = np.asarray(found).astype(complex), np.asarray(right)
    assert np.isfinite(found).all(), what
    for a, b in zip(found, right, strict=True):
        size = np.abs(b).max(initial=0)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * size, err_msg=what)


@pytest.mark.parametrize("name", WHOLE)
def test_steps_are_those_of_complex128(name: str) -> None:
    factory, settings = TRANSFORMS[name]
    run = two_updates(factory(**settings))
    reference = two_updates(factory(**settings))
    squares = name.startswith("adamp")
    for label, (g_type, p_type, tolerance) in TYPES.items():
        params, grads = inputs(g_type, p_type, sizes(g_type, 1e15 if squares else 1e30))
        found = run(params, grads)
        with jax.enable_x64(True):
            right = reference(*jax.tree.map(as_complex, (params, grads)))
        both = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(right), strict=True)
        for (path, a), b in both:
            check(a, b, tolerance, f"{name}, {label}{jax.tree_util.keystr(path)}")


@pytest.mark.parametrize("name", ["adamp", "adamp-nesterov"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_adamp_steps_by_about_the_rate_where_squares_overflow(name: str, dtype: Any) -> None:
    """Both moments are cut off there, so that their ratio stays near that of the true ones."""
    factory, settings = TRANSFORMS[name]
    params, grads = inputs(dtype, dtype, [1e30])
    found = two_updates(factory(**settings))(params, grads)
    with jax.enable_x64(True):
        right = two_updates(factory(**settings))(*jax.tree.map(as_complex, (params, grads)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        check(a, b, 0.25, name)


KAPPAS = {
    "l1": kappa.l1(), "l2": kappa.l2(), "lp(1.5)": kappa.lp(1.5), "lp(3)": kappa.lp(3.0),
    "soft": kappa.soft(0.3), "topk": kappa.topk(5), "huber": kappa.huber(0.2),
    "smooth": kappa.smooth(0.1), "nuclear": kappa.nuclear(), "nuclear svd": kappa.nuclear(exact=True),
}  # fmt: skip


@pytest.mark.parametrize("name", list(KAPPAS))
def test_kappas_are_those_of_complex128(name: str) -> None:
    k = KAPPAS[name]

    def functions(z: Any) -> Any:
        return k.subgradient(z), k.value(z), k.distance(z), k.conjugate(z)

    run, reference = jax.jit(jax.vmap(functions)), jax.jit(jax.vmap(functions))
    for label, (dtype, _, tolerance) in TYPES.items():
        _, grads = inputs(dtype, dtype, sizes(dtype, 1e30))
        z = grads["matrix"]
        found = run(z)
        assert found[0].dtype == dtype
        assert all(x.dtype == jnp.float32 for x in found[1:])
        with jax.enable_x64(True):
            right = reference(as_complex(z))
        check(found[0], right[0], tolerance, label)
        for a, b in zip(found[1:], right[1:], strict=True):
            # A conjugate is infinite outside its domain; float32 has nothing below 1e-38.
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-37)


def test_a_large_float16_matrix_moves() -> None:
    """Its squares sum to more than float16 holds."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(512, 256)), jnp.float16)
    u = np.asarray(kappa.nuclear().subgradient(z), np.float64)
    np.testing.assert_allclose(u.T @ u, np.eye(256), atol=0.02)
    norm = kappa.l2().subgradient(jnp.full(200_000, 300.0, jnp.float16))
    np.testing.assert_allclose(np.asarray(norm, np.float64), 200_000**-0.5, rtol=1e-3)


def real_view(z: Any) -> Any:
    return jnp.stack([z.real, z.imag])


@pytest.mark.parametrize("name", list(KAPPAS))
def test_complex_subgradients_are_gradients_in_real_and_imaginary_parts(name: str) -> None:
    """Of the value as a function of both parts, which is smooth at a random point."""
    k = KAPPAS[name]
    with jax.enable_x64(True):
        z = jnp.asarray(2 * draw(3, True, (4, 3)))
        slope = jax.jit(jax.grad(lambda parts: k.value(jax.lax.complex(*parts))))(real_view(z))
        np.testing.assert_allclose(real_view(k.subgradient(z)), slope, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda axis: optim.sgdp(1.0, 0.9, weight_decay=0.01, channel_axis=axis),
        lambda axis: optim.sgdp(1.0, 0.9, True, channel_axis=axis),
        lambda axis: optim.lion_k(0.1, kappa.l2()),
    ],
    ids=["sgdp", "sgdp nesterov", "lion_k l2"],
)
def test_complex_steps_are_those_of_real_and_imaginary_parts(make: Any) -> None:
    """Of both parts stacked before a channel, where the transform knows no modulus of an entry."""
    solver = make(-1)
    w = draw(0, True, (8, 3))
    grads = [draw(i, True, (8, 3)) for i in (1, 2, 3)]
    grads = [g - w * (w.conj() * g).sum(0).real / (abs(w) ** 2).sum(0) for g in grads]
    grads[0] = grads[0] + 0.7 * w  # the momentum keeps a radial part
    with jax.enable_x64(True):
        update = jax.jit(solver.update)
        x, y = jnp.asarray(w), jnp.concatenate(real_view(jnp.asarray(w)))
        a, b = solver.init(x), solver.init(y)
        for g in map(jnp.asarray, grads):
            u, a = update(g, a, x)
            v, b = update(jnp.concatenate(real_view(g)), b, y)
            np.testing.assert_allclose(jnp.concatenate(real_view(u)), v, atol=1e-12)


@pytest.mark.parametrize("name", WHOLE)
def test_gradients_that_are_not_finite_are_not_hidden(name: str) -> None:
    """NaN gives NaN everywhere; an infinite gradient does where the step is not a sign."""
    factory, settings = TRANSFORMS[name]
    solver, x = factory(**settings), jnp.ones(3)
    update = jax.jit(lambda g: solver.update(g, solver.init(x), x)[0])
    assert np.isnan(update(jnp.array([1.0, jnp.nan, 1.0]))[1])
    if name.startswith(("adamp", "sgdp")):
        assert not np.isfinite(update(jnp.array([1.0, jnp.inf, 1.0]))[1])
