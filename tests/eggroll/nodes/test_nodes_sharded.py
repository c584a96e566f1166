"""Node noise in a fitness that divides its model over devices by a shard_map of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from eggroll import EvolutionStrategy, credit

P = jax.P
WIDTH, ROWS = 16, 32


def mesh():
    kind = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((4,), ("model",), axis_types=kind, devices=jax.devices()[:4])


def problem():
    k = jax.random.split(jax.random.key(0), 4)
    params = {
        "in": jax.random.normal(k[0], (6, WIDTH)) / 2.4,
        "out": jax.random.normal(k[1], (WIDTH, 3)) / 4,
        "bias": jnp.zeros(3),
    }
    return params, jax.random.normal(k[2], (ROWS, 6)), jax.random.normal(k[3], (ROWS, 3))


def tensor_parallel(params, key, x, y, check_vma=True):
    """A layer divided by its columns, the next one by its rows, summed over the devices."""

    def body(a, b, bias, x):
        return lax.psum(jnp.tanh(x @ a) @ b, "model") + bias

    specs = (P(None, "model"), P("model", None), P(), P())
    out = jax.shard_map(body, mesh=mesh(), in_specs=specs, out_specs=P(), check_vma=check_vma)
    return -((out(params["in"], params["out"], params["bias"], x) - y) ** 2).sum(-1)


def make():
    return EvolutionStrategy(
        optimizer=optax.sgd(0.1), population=2048, sigma=0.03, perturb="nodes", credit=credit.own()
    )


def test_tensor_parallel_layers_get_the_gradient():
    params, x, y = problem()
    es = make()
    state = es.init(params, 0)
    got = es.gradient(state, es.evaluate(state, tensor_parallel, x, y), tensor_parallel, x, y)
    exact = jax.grad(lambda p: -tensor_parallel(p, None, x, y).mean())(params)
    for name in params:
        a, b = np.ravel(got[name]), np.ravel(exact[name])
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.95, name
        assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=0.15), name


def test_shards_have_noise_of_their_own_and_copies_the_same():
    params, x, _ = problem()
    fn = lambda p, key, x: jax.shard_map(
        lambda a, b, x: (x @ a, x @ b),
        mesh=mesh(),
        in_specs=(P(None, "model"), P(), P()),
        out_specs=(P(None, "model"), P()),
    )(p["in"], p["out"], x)
    params = {"in": params["in"], "out": jnp.ones((6, 5))}
    es = make()
    outs, copies = es.map(es.init(params, 0), fn, x)
    noise = np.asarray(outs[0] - outs[1]) / 2
    shards = np.split(noise, 4, axis=1)
    assert abs(np.corrcoef(shards[0].ravel(), shards[1].ravel())[0, 1]) < 0.4
    assert np.std(noise) == pytest.approx(0.03, rel=0.2)
    # One noise for all copies: the output is the same on every device, as its spec promises.
    assert np.std(np.asarray(copies[0] - copies[1]) / 2) == pytest.approx(0.03, rel=0.2)
    for shard in copies.addressable_shards[1:]:
        np.testing.assert_array_equal(shard.data, copies.addressable_shards[0].data)


def test_what_tells_nothing_of_its_shards_is_refused():
    params, x, y = problem()
    fitness = lambda p, key, x, y: tensor_parallel(p, key, x, y, check_vma=False)
    with pytest.raises(
        ValueError, match="'bias' has node noise and enters a shard_map|check_vma=True"
    ):
        es = make()
        es.step(es.init(params, 0), fitness, x, y)
