"""Lion-K by the theory of arXiv 2310.05898: duality, both phases, and the problems that it solves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

import optim
from optim import kappa
from optim.kappa import Kappa

KAPPAS: dict[str, Kappa] = {
    "l1": kappa.l1(), "l2": kappa.l2(), "lp(1.5)": kappa.lp(1.5), "lp(3)": kappa.lp(3.0), "soft": kappa.soft(0.3),
    "topk": kappa.topk(2), "huber": kappa.huber(0.2), "smooth": kappa.smooth(0.1), "nuclear": kappa.nuclear(exact=True),
}  # fmt: skip
# Compiled once a shape, not traced at each of many calls.
KAPPAS = {name: Kappa(*map(jax.jit, k[:4]), k.problem) for name, k in KAPPAS.items()}
each_kappa = pytest.mark.parametrize("name", list(KAPPAS))


@pytest.fixture(autouse=True)
def float64():  # type: ignore[no-untyped-def]
    with jax.enable_x64(True):
        yield


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def shrunk(k: Kappa, y: jax.Array) -> jax.Array:
    """A point inside the domain of the conjugate."""
    while float(k.distance(y)) > 0:
        y = y * 0.8
    return y * 0.999


@each_kappa
def test_value_subgradient_and_conjugate_belong_together(name: str) -> None:
    k = KAPPAS[name]
    for seed in range(8):
        z, w = normal(seed, 3, 4), normal(100 + seed, 3, 4)
        u = k.subgradient(z)
        # A subgradient supports the function everywhere, and meets Fenchel-Young with equality.
        assert k.value(w) >= k.value(z) + jnp.sum(u * (w - z)) - 1e-9
        np.testing.assert_allclose(
            k.value(z) + k.conjugate(u), jnp.sum(u * z), rtol=1e-6, atol=1e-9
        )
        # Anything in the domain is below it.
        y = shrunk(k, w)
        assert k.value(z) + k.conjugate(y) >= jnp.sum(y * z) - 1e-9
        assert np.isfinite(k.conjugate(y))
        # Even, and 0 at 0.
        np.testing.assert_allclose(k.value(-z), k.value(z), rtol=1e-12)
        np.testing.assert_allclose(k.subgradient(-z), -u, atol=1e-12)
    zero = jnp.zeros((3, 4))
    assert k.value(zero) == 0
    assert (k.subgradient(zero) == 0).all()


@each_kappa
def test_distance_is_that_of_the_domain(name: str) -> None:
    k = KAPPAS[name]
    for seed in range(5):
        y = 2 * normal(seed, 3, 4)
        d = float(k.distance(y))
        assert (d == 0) == bool(np.isfinite(k.conjugate(y)))
        if d > 0:
            # No point of the domain is nearer, and one (found from many directions) nearly as near.
            inside = [shrunk(k, y + d * normal(1000 * seed + i, 3, 4)) for i in range(20)]
            assert min(float(jnp.linalg.norm(y - x)) for x in inside) >= d - 1e-9
            # Moving by the gradient of the distance ends on the boundary.
            g = jax.jit(jax.grad(k.distance))(y)
            if np.isfinite(g).all() and abs(float(jnp.linalg.norm(g)) - 1) < 1e-3:
                assert float(k.distance(y - d * g)) < 1e-3 * d


def test_subgradients_in_closed_form() -> None:
    z = jnp.array([3.0, -0.2, 0.0, -4.0])
    assert kappa.soft(0.3).subgradient(z).tolist() == [1, 0, 0, -1]
    assert kappa.topk(1).subgradient(z).tolist() == [0, 0, 0, -1]
    assert kappa.topk(9).subgradient(z).tolist() == [1, -1, 0, -1]
    # Of equal entries the first ones count: exactly k.
    assert kappa.topk(2).subgradient(jnp.ones(4)).tolist() == [1, 1, 0, 0]
    np.testing.assert_allclose(kappa.huber(0.4).subgradient(z), [1, -0.5, 0, -1])
    np.testing.assert_allclose(kappa.l2().subgradient(z[:1] * 0 + 5), [1])
    np.testing.assert_allclose(kappa.lp(3.0).subgradient(1e200 * z), kappa.lp(3.0).subgradient(z))


def test_newton_schulz_is_the_singular_value_decomposition() -> None:
    exact, fast = kappa.nuclear(exact=True), kappa.nuclear()
    for shape in ((5, 5), (3, 8), (8, 3), (2, 4, 4), (6,)):
        z = normal(sum(shape), *shape)
        np.testing.assert_allclose(fast.subgradient(z), exact.subgradient(z), atol=1e-6)
    singular = jnp.linalg.svd(fast.subgradient(normal(1, 6, 9)), compute_uv=False)
    np.testing.assert_allclose(singular, 1, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kappa.lp(1.0), "p must be above 1, got 1.0"),
        (lambda: kappa.topk(0), "k must be at least 1, got 0"),
        (lambda: kappa.soft(0.0), "e must be above 0, got 0.0"),
        (lambda: kappa.huber(-1.0), "e must be above 0, got -1.0"),
        (lambda: kappa.smooth(0.0), "e must be above 0, got 0.0"),
    ],
)
def test_wrong_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- dynamics

A = np.diag(np.linspace(0.2, 2.0, 6))
CENTRE = np.array([2.0, -1.5, 0.4, 0.1, -3.0, 1.0])
SMOOTHNESS = 2.0  # the largest eigenvalue of A


def loss(x: Any) -> Any:
    d = jnp.ravel(x) - CENTRE
    return 0.5 * d @ A @ d


def trajectory(
    k: Kappa, rate: float, decay: float, steps: int, x: jax.Array, b1=0.9, b2=0.99
) -> Any:  # type: ignore
    solver = optim.lion_k(rate, k, b1, b2, weight_decay=decay)

    @jax.jit
    def run(x: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            x, state = carry
            updates, after = solver.update(jax.grad(loss)(x), state, x)
            return (optax.apply_updates(x, updates), after), (x, state[0].mu)

        return jax.lax.scan(step, (x, solver.init(x)), length=steps)[1]

    return run(x)


@each_kappa
@pytest.mark.parametrize("decay", [0.5, 2.0])
@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.99), (0.95, 0.95)])
def test_the_discrete_lyapunov_inequality(name: str, decay: float, b1: float, b2: float) -> None:
    """Every step obeys H+ - H <= -eta (1 + c lam) V.(mt - K*'(lam x+)) - ... + L/2 eta^2 |V|^2."""
    k, rate = KAPPAS[name], 0.01
    xs, mus = trajectory(k, rate, decay, 400, shrunk(k, normal(0, 2, 3)) / decay, b1, b2)
    eta = rate / (1 - rate * decay)  # explicit decay is implicit decay with this step
    c = eta * b1 / (eta * decay * (1 - b1) + (1 - b2))
    energy = lambda x, mu: optim.lyapunov(
        optim.ScaleByLionState(jnp.int32(0), mu), x, loss,
        learning_rate=rate, weight_decay=decay, b1=b1, b2=b2, kappa=k,
    )  # fmt: skip

    def bound(x: Any, mu: Any, after: Any, mu_after: Any) -> Any:
        m, m_after, g = -mu, -mu_after, jax.grad(loss)(x)
        m_tilde = b1 * m - (1 - b1) * g
        u = k.subgradient(m_tilde)
        v = u - decay * after
        # V.(mt - y) for the y in the subdifferential of K* at lam x+ is least by Fenchel-Young:
        # u is in that of K at mt, so u.mt = K(mt) + K*(u), and y.(u - lam x+) <= K*(u) - K*(lam x+).
        first = k.value(m_tilde) + k.conjugate(decay * after) - decay * jnp.sum(after * m_tilde)
        second = jnp.sum((u - k.subgradient(m_after)) * (m_tilde - m_after)) if b2 > b1 else 0.0
        weight = c * (1 - b2) / (b2 - b1) if b2 > b1 else 0.0
        return (
            -eta * (1 + c * decay) * first
            - weight * second
            + SMOOTHNESS / 2 * eta**2 * jnp.sum(v**2)
        )

    values = jax.jit(jax.vmap(energy))(xs, mus)
    assert np.isfinite(values).all()
    limits = jax.jit(jax.vmap(bound))(xs[:-1], mus[:-1], xs[1:], mus[1:])
    assert (values[1:] - values[:-1] <= limits + 1e-12).all()
    assert values[-1] < values[0]


@each_kappa
@pytest.mark.parametrize("rate", [0.1, 0.01])
def test_phase_one_contracts(name: str, rate: float) -> None:
    k, decay = KAPPAS[name], 0.8
    xs, _ = trajectory(k, rate, decay, 200, 20 * normal(1, 2, 3))
    far = jax.jit(jax.vmap(lambda x: optim.constraint_violation({"x": x}, decay, k)))(xs)
    assert float(far[0]) > 1
    assert (np.asarray(far[1:]) <= (1 - rate * decay) * np.asarray(far[:-1]) + 1e-9).all()


@each_kappa
def test_phase_two_stays_inside(name: str) -> None:
    k, decay = KAPPAS[name], 1.3
    xs, _ = trajectory(k, 0.05, decay, 300, shrunk(k, normal(2, 2, 3)) / decay)
    far = jax.vmap(lambda x: optim.constraint_violation(x, decay, k))(xs)
    assert float(far.max()) < 1e-6


def reference(name: str, decay: float) -> np.ndarray:
    """The solution of the constrained problem by SciPy's general solver, x = p - n with p, n >= 0 so
    that absolute values are smooth."""

    def value(z: np.ndarray) -> float:
        x, size = z[:6] - z[6:], z.sum()
        bend = 0.1 * (1 - np.sqrt(np.maximum(1 - (decay * x) ** 2, 1e-14))).sum() / decay
        extra = {"soft": 0.3 * size, "huber": 0.1 * decay * (x @ x), "smooth": bend}.get(name, 0.0)
        return 0.5 * (x - CENTRE) @ A @ (x - CENTRE) + extra + 1e-9 * size

    constraint: Any = {
        "l2": lambda z: 1 / decay**2 - ((z[:6] - z[6:]) ** 2).sum(),
        "lp(1.5)": lambda z: 1 / decay**3 - (np.abs(z[:6] - z[6:]) ** 3).sum(),
        "topk": lambda z: 2 / decay - z.sum(),
        "1-norm ball": lambda z: 1 / decay - z.sum(),
    }.get(name)
    found = optimize.minimize(
        value, np.full(12, 0.01 / decay), bounds=optimize.Bounds(0, 1 / decay), method="SLSQP",
        constraints=[{"type": "ineq", "fun": constraint}] if constraint else [],
        options={"maxiter": 1000, "ftol": 1e-13},
    )  # fmt: skip
    assert found.success, found.message
    return found.x[:6] - found.x[6:]


def limit(k: Kappa, decay: float, start: jax.Array) -> jax.Array:
    """Where Lion-K ends, with steps that go to 0."""
    solver = optim.lion_k(optax.cosine_decay_schedule(0.02, 6000), k, weight_decay=decay)

    @jax.jit
    def run(x: Any) -> Any:
        def step(_: Any, carry: Any) -> Any:
            x, state = carry
            updates, state = solver.update(jax.grad(loss)(x), state, x)
            return optax.apply_updates(x, updates), state

        return jax.lax.fori_loop(0, 6000, step, (x, solver.init(x)))[0]

    return run(start)


@pytest.mark.parametrize(
    "name", ["l1", "l2", "lp(1.5)", "soft", "huber", "topk", "smooth", "1-norm ball"]
)
@pytest.mark.parametrize("decay", [0.7, 2.0])
def test_the_limit_is_the_solution_of_the_constrained_problem(name: str, decay: float) -> None:
    k = kappa.topk(1) if name == "1-norm ball" else KAPPAS[name]
    x = limit(k, decay, jnp.zeros(6))
    np.testing.assert_allclose(x, reference(name, decay), atol=0.01)
    score = optim.kkt_score(jax.grad(loss)(x), 0.9999 * x, decay, k)
    start = optim.kkt_score(jax.grad(loss)(x * 0), x * 0, decay, k)
    assert -1e-6 <= float(score) < 0.02 * float(start)


@pytest.mark.parametrize("decay", [0.7, 2.0])
def test_the_limit_of_nuclear_is_in_the_spectral_ball(decay: float) -> None:
    """Against projected gradient descent, which cuts the singular values off."""
    right = np.zeros((2, 3))
    for _ in range(2000):
        right = right - (A @ (right.ravel() - CENTRE)).reshape(2, 3) / SMOOTHNESS
        u, s, v = np.linalg.svd(right, full_matrices=False)
        right = (u * np.minimum(s, 1 / decay)) @ v
    assert np.linalg.norm(right, 2) > 0.99 / decay  # the bound counts
    x = limit(KAPPAS["nuclear"], decay, jnp.zeros((2, 3)))
    np.testing.assert_allclose(x, right, atol=0.01)
    fast = limit(kappa.nuclear(), decay, jnp.zeros((2, 3)))
    np.testing.assert_allclose(fast, right, atol=0.01)


def test_lion_is_lion_k_of_the_1_norm() -> None:
    x, g = normal(3, 4, 2), normal(4, 4, 2)
    ours, lion = optim.lion_k(0.1), optim.lion(0.1)
    a, b = ours.init(x), lion.init(x)
    for _ in range(3):
        u, a = ours.update(g, a, x)
        v, b = lion.update(g, b, x)
        np.testing.assert_allclose(u, v, rtol=1e-12)


def test_ones_own_kappa() -> None:
    square = Kappa(
        value=lambda z: 0.5 * (z**2).sum(), subgradient=lambda z: z, conjugate=lambda y: 0.5 * (y**2).sum(),
        distance=lambda y: jnp.zeros((), y.dtype), problem="minimise f + (wd/2) |x|^2",
    )  # fmt: skip
    x = trajectory(square, 0.02, 0.5, 1500, jnp.zeros(6))[0][-1]
    ridge = np.linalg.solve(A + 0.5 * np.eye(6), A @ CENTRE)
    np.testing.assert_allclose(x, ridge, atol=1e-3)


def test_lyapunov_needs_a_state_of_lion() -> None:
    with pytest.raises(ValueError, match="state must be that of lion or lion_k, got a"):
        optim.lyapunov(
            optax.sgd(0.1).init(jnp.ones(3)), jnp.ones(3), loss, learning_rate=0.1, weight_decay=0.1
        )
