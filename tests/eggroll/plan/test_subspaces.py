"""Subspaces: the division, members in one subspace each, the estimate, invariance, bad input."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eggroll import Dense, EvolutionStrategy, Matrix, Nodes, integer, noise
from eggroll.generation import all_draws
from eggroll.inputs import begin
from eggroll.integer.proof import float_operations
from eggroll.perturbation import subspaces_of
from eggroll.plan import by_shape, infer, only, relative, scaled, subspaces

STACK = Matrix(rows=1, columns=2, batch=0)
SEED = noise.seed_words(jax.random.key(0))


def make_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    params = {
        "layers": rng.normal(size=(3, 10, 10)),
        "tall": rng.normal(size=(10, 6)),
        "heads": rng.normal(size=(6, 3, 4)),
        "bias": rng.normal(size=7),
        "gain": rng.normal(size=()),
    }
    return {name: np.asarray(value / 3, dtype) for name, value in params.items()}


def fitness(params, key, x):
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    hidden = jax.lax.scan(layer, x, params["layers"])[0] @ params["tall"]
    out = jnp.einsum("bd,dhk->bhk", hidden, params["heads"]).sum(1)
    return -jnp.mean(jnp.square(out * params["gain"] - 1), axis=1) + params["bias"].sum()


X = np.random.default_rng(1).normal(size=(4, 10)).astype(np.float32)
PLAIN = by_shape({"layers": STACK})
PLANNERS = {"by_shape": PLAIN, "infer": infer(fitness, make_params(), X)}


def make(plan, **changes):
    base = dict(optimizer=optax.adam(1e-2), population=24, sigma=0.1, on_dense="error")
    return EvolutionStrategy(**{**base, **changes}, plan=plan)


def noise_of(es, params):
    """The noise of every member over sigma, leaves ``[population, *shape]`` in float64."""
    members = es.ask(es.init(params, 0), range(es.population))
    return jax.tree.map(lambda w, m: (np.asarray(w, np.float64) - m) / es.sigma, members, params)


# ---------------------------------------------------------------- the division


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def division(shape, treatment, count, path, epoch):
    plan = subspaces(by_shape({path: treatment}), count)({path: jnp.zeros(shape)}, 1)
    return subspaces_of(plan[path], SEED, epoch)


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize(
    ("shape", "treatment", "axes", "batch"),
    [
        ((8, 20), Matrix(0, 1), (1,), ()),
        ((20, 8), Matrix(0, 1), (0,), ()),
        ((9, 9), Matrix(1, 0), (0,), ()),
        ((5, 6, 4), Matrix((0, 1), 2), (0, 1), ()),
        ((3, 9, 20), Matrix(1, 2, 0), (2,), (0,)),
        ((20, 3, 9), Matrix(0, 2, 1), (0,), (1,)),
        ((5, 7), Dense(), (0, 1), ()),
        ((2,), Dense(), (0,), ()),
        ((), Dense(), (), ()),
    ],
    ids=str,
)
def test_every_matrix_is_divided_in_equal_parts_along_its_longer_side(
    shape, treatment, axes, batch, count
):
    groups = np.asarray(division(shape, treatment, count, "w", 3))
    assert groups.shape == tuple(
        n if axis in (*axes, *batch) else 1 for axis, n in enumerate(shape)
    )
    assert groups.max(initial=0) < count
    size = math.prod(shape[axis] for axis in axes)
    rest = [axis for axis in range(len(shape)) if axis not in batch]
    for own in np.transpose(groups, (*batch, *rest)).reshape(-1, size):
        counts = np.bincount(own, minlength=count)
        assert set(counts) <= {size // count, -(-size // count)}


def test_the_division_depends_on_seed_epoch_and_path_and_differs_between_matrices():
    make = lambda path="w", epoch=0: np.asarray(division((3, 40, 40), STACK, 4, path, epoch))
    assert (make() == make()).all()
    for other in (make(epoch=1), make(path="v"), np.roll(make(), 1, axis=0)):
        assert 0.6 < (make() != other).mean() < 0.9  # 3 / 4 by chance


def test_each_block_has_each_permutation_equally_often():
    words = jnp.array([3, 4], jnp.uint32)
    groups = noise.groups_at(words[0], words[1], jnp.arange(4 * 2**14, dtype=jnp.uint32), 4)
    blocks = np.asarray(groups).reshape(-1, 4)
    orders = {order: i for i, order in enumerate(itertools.permutations(range(4)))}
    ids = np.array([orders[tuple(block)] for block in blocks.tolist()])
    assert stats.chisquare(np.bincount(ids, minlength=24)).pvalue > 1e-3
    pairs = np.bincount(24 * ids[:-1:2] + ids[1::2], minlength=24 * 24)
    assert stats.chisquare(pairs).pvalue > 1e-3


@settings(deadline=None, max_examples=15)
@given(st.sampled_from([1, 2, 5]), st.integers(0, 2**32 - 1), st.integers(0, 2**20))
def test_a_position_has_its_group_wherever_it_is_asked_for(count, word, start):
    word = jnp.uint32(word)
    of = functools.partial(noise.groups_at, word, word + 1, count=count)
    start -= start % count
    index = jnp.arange(start, start + 5 * count, dtype=jnp.uint32)
    groups = np.asarray(of(index))
    assert (np.sort(groups.reshape(-1, count), axis=1) == np.arange(count)).all()
    assert int(of(index[-1])) == groups[-1]


# ---------------------------------------------------------------- members


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("rank", [1, 2, "full"])
def test_a_member_has_the_plain_noise_in_its_subspace_times_root_k(count, rank):
    params = make_params()
    plain = noise_of(make(PLAIN, rank=rank), params)
    es = make(subspaces(PLAIN, count), rank=rank)
    found, plan, seed = noise_of(es, params), es.plan_of(params), es.init(params, 0).seed
    group = np.arange(24) // 2 % count
    for path in params:
        own = np.asarray(subspaces_of(plan[path], seed, jnp.int32(0)))
        inside = own == group.reshape(-1, *(1,) * own.ndim)
        expected = math.sqrt(count) * inside * plain[path]
        np.testing.assert_allclose(found[path], expected, rtol=1e-3, atol=1e-4)
        # Disjoint, and all entries together.
        assert (sum((found[path][group == g] != 0).any(0) for g in range(count)) == 1).all()


@pytest.mark.parametrize("rank", [1, "full"])
def test_the_norm_of_every_member_is_that_of_plain_noise(rank):
    """By noise of signs, all of norm ``sqrt(size)``, where the parts have the same size."""
    params = {"w": np.zeros((8, 12), np.float32), "b": np.zeros(16, np.float32)}
    found = noise_of(make(subspaces(by_shape(), 4), rank=rank, noise=noise.rademacher()), params)
    for path, size in (("w", 96), ("b", 16)):
        squares = np.square(found[path]).reshape(24, -1).sum(1)
        np.testing.assert_allclose(squares, size, rtol=1e-5)


def test_low_rank_noise_stays_low_rank_and_nothing_is_built():
    params = make_params()
    es = make(subspaces(PLANNERS["infer"], 4), rank=2)
    found = noise_of(es, params)
    assert np.linalg.matrix_rank(found["layers"], tol=1e-3).max() == 2
    assert "BUILT" not in es.describe(params, fitness, X)
    values = es.evaluate(es.init(params, 0), fitness, X)  # on_dense="error"
    members = es.ask(es.init(params, 0), range(24))
    expected = jax.vmap(lambda p: fitness(p, None, X))(members)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


def test_one_subspace_is_none():
    params = make_params()
    for planner in (PLAIN, by_shape({"tall": Nodes()}), subspaces(PLAIN, 2)):
        assert subspaces(planner, 1)(params, 1) == planner(params, 1)
    whole = make(PLAIN, perturb="nodes", shaping=None).describe(params)
    assert make(subspaces(PLAIN, 1), perturb="nodes", shaping=None).describe(params) == whole


def test_the_division_is_drawn_with_the_noise():
    params = {"w": np.zeros((8, 40), np.float32)}
    es = make(subspaces(by_shape(), 4), noise_reuse=2)
    state = es.init(params, 0)
    inside = lambda generation: np.asarray(
        es.member(state._replace(generation=jnp.int32(generation)), 0)["w"] != 0
    )
    assert (inside(0) == inside(1)).all() and not (inside(0) == inside(2)).all()


# ---------------------------------------------------------------- the estimate


def explicit(es, params, values, plan):
    """The estimate of every subspace from its own members, in float64, put together.

    For an entry in subspace g: ``-(1 / N_g) sum_(i in g) w_i e_i / s`` with the standard deviation
    ``s = sigma sqrt(K)`` of the entry in those members and ``e_i = (W_i - W) / s``.
    """
    members = jax.device_get(es.ask(es.init(params, 0), range(es.population)))
    estimate = {}
    for path in params:
        k = plan[path].subspaces
        s = es.sigma * plan[path].scale * math.sqrt(k)
        change = np.asarray(members[path], np.float64) - params[path]
        group = np.arange(es.population) // 2 % k
        total = np.zeros(params[path].shape)
        for g in range(k):
            own = group == g
            inside = (change[own] != 0).any(0)
            of_group = -np.tensordot(values[own], change[own] / s, 1) / own.sum() / s
            total = np.where(inside, of_group, total)
        estimate[path] = total
    return estimate


@pytest.mark.parametrize("rank", [1, 3, "full"])
@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_the_estimate_is_that_of_each_subspace_from_its_own_members(count, rank, sizes):
    with jax.enable_x64(True):
        params = make_params(np.float64)
        planner = relative(PLAIN, params) if sizes else PLAIN
        es = make(subspaces(planner, count), rank=rank, shaping=None)
        values = np.random.default_rng(2).normal(size=24)
        found = es.gradient(es.init(params, 0), values)
        expected = explicit(es, params, values, es.plan_of(params))
        # Sigma is a float32 number.
        chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-6)


def test_a_planner_of_sizes_may_stand_outside_too():
    params = make_params()
    plan = relative(subspaces(PLAIN, 4), params)(params, 1)
    assert plan == subspaces(relative(PLAIN, params), 4)(params, 1)


@pytest.mark.parametrize("rank", [1, "full"])
def test_the_estimate_of_a_linear_function_is_its_gradient_on_all_coordinates(rank):
    pairs = 2**14
    params = {"w": np.zeros((6, 10), np.float32), "b": np.zeros(5, np.float32)}
    rng = np.random.default_rng(5)
    slopes = {path: rng.normal(size=w.shape).astype(np.float32) for path, w in params.items()}
    linear = lambda p, key, g: sum(jnp.sum(p[path] * g[path]) for path in p)
    es = make(
        subspaces(by_shape(), 4), population=2 * pairs, shaping=None, rank=rank, on_dense="ignore"
    )
    _, found = es.value_and_gradient(es.init(params, 0), linear, slopes)
    norm = math.sqrt(sum(np.sum(g**2) for g in slopes.values()))
    for path, g in slopes.items():
        # The standard error of an entry is at most that of dense noise times sqrt(9 / 3), for rank 1.
        assert np.abs(-found[path] - g).max() < 4.5 * norm * math.sqrt(3 / pairs)
        assert np.abs(-found[path] - g).max() < 0.5 * np.abs(g).max()


def test_z_scores_are_over_all_members():
    params = make_params()
    es, plain = make(subspaces(PLAIN, 4)), make(subspaces(PLAIN, 4), shaping=None)
    values = np.random.default_rng(2).normal(size=24).astype(np.float32)
    zscores = np.asarray(es.shaping(jnp.asarray(values)[:, None], jnp.ones((24, 1), bool), None))[
        :, 0
    ]
    state = es.init(params, 0)
    expected = plain.gradient(plain.init(params, 0), zscores)
    chex.assert_trees_all_close(es.gradient(state, values), expected, rtol=1e-4, atol=1e-5)


def test_it_learns():
    params = {"w": jnp.zeros((8, 12)), "b": jnp.zeros(12)}
    goal = np.random.default_rng(3).normal(size=(8, 12)).astype(np.float32)
    loss = lambda p, key: -jnp.mean(jnp.square(X[:, :8] @ (p["w"] - goal) + p["b"]))
    es = make(subspaces(by_shape(), 4), population=64, optimizer=optax.adam(0.05))
    state = es.init(params, 0)
    assert loss(es.optimize(state, loss, 150).params, None) > 0.02 * loss(params, None)


# ---------------------------------------------------------------- invariance


def mesh(devices):
    return jax.make_mesh(
        (devices,), ("population",), axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )  # fmt: skip


def after(generations=2, **changes):
    es = make(subspaces(PLANNERS["infer"], 4), **changes)
    state = es.init(make_params(), 0)
    for _ in range(generations):
        state, _ = es.step(state, fitness, X)
    return jax.device_get(state)


def test_chunks_and_devices_change_nothing_but_rounding():
    expected = after()
    for changes in (dict(chunk=6), dict(mesh=mesh(4), chunk=2)):
        chex.assert_trees_all_close(after(**changes), expected, rtol=3e-4, atol=3e-5)


def test_deterministic_is_the_same_bits_on_any_number_of_devices():
    expected = after(deterministic=True, chunk=4)
    for changes in (dict(mesh=mesh(4)), dict(mesh=mesh(3), exchange="fitness")):
        chex.assert_trees_all_equal(after(deterministic=True, chunk=4, **changes), expected)


def test_kept_and_redrawn_noise_and_parts_of_a_step_give_the_same_bits():
    chex.assert_trees_all_equal(after(), after(factor_memory=0))
    es = make(subspaces(PLAIN, 4), deterministic=True)
    state = es.init(make_params(), 0)
    whole, _ = es.step(state, fitness, X)
    parts, _ = es.update(state, es.evaluate(state, fitness, X))
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(parts))


def test_other_parameters_and_members_do_not_matter():
    params = make_params()
    few, many = (make(subspaces(PLAIN, 4), population=n) for n in (16, 32))
    chex.assert_trees_all_equal(*(es.ask(es.init(params, 0), range(16)) for es in (few, many)))
    es = make(only(subspaces(PLAIN, 4), "tall"))
    own = es.member(es.init(params, 0), 5)
    chex.assert_trees_all_equal(own["tall"], few.member(few.init(params, 0), 5)["tall"])
    assert (np.asarray(own["layers"]) == params["layers"]).all()


def test_bfloat16_takes_k_that_is_no_square():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_params())
    es = make(subspaces(PLAIN, 3), population=48, shaping=None)
    state = es.init(params, 0)
    values = np.random.default_rng(2).normal(size=48)
    draws = jax.jit(lambda s: all_draws(begin(es, s)))(state)
    tall = [leaf.path for leaf in es.plan_of(params).leaves].index("tall")
    a, b = (np.asarray(x, np.float64) for x in draws[tall])
    d = values[0::2] - values[1::2]
    expected = -np.einsum("p,prij,prkl->il", d, a, b) * math.sqrt(3) / (48 * 0.1)
    np.testing.assert_allclose(es.gradient(state, values)["tall"], expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- integers


def int_params():
    rng = np.random.default_rng(3)
    return {
        "up": rng.integers(-40, 41, (16, 12)).astype(np.int8),
        "bias": rng.integers(-40, 41, 12).astype(np.int8),
    }


def int_fitness(params, key, x):
    product = jax.lax.dot(x, params["up"], preferred_element_type=jnp.int32) >> 4
    return -jnp.abs(product + params["bias"].astype(jnp.int32)).sum()


INT_X = np.random.default_rng(4).integers(-40, 41, (4, 16)).astype(np.int8)


def int_strategy(**changes):
    base = dict(population=32, optimizer=integer.threshold(0.3), plan=subspaces(by_shape(), 4))
    return integer.strategy(**{**base, **changes})


def test_integers_have_twice_the_noise_in_their_subspace_and_twice_the_sum():
    params, es = int_params(), int_strategy()
    state = es.init(params, 0)
    values = np.random.default_rng(5).normal(size=32)
    signs = np.sign(values[0::2] - values[1::2])
    draws = jax.jit(lambda s: all_draws(begin(es, s)))(state)
    found = es.gradient(state, values)
    for path, drawn in zip(sorted(params), draws, strict=True):
        a, b = (np.asarray(x, np.int64) for x in drawn)
        inside = (a * b != 0).any(1).reshape(16, -1)
        assert inside.mean() < 0.5
        total = np.einsum("p,pr...->...", signs, a * b).reshape(params[path].shape)
        np.testing.assert_array_equal(found[path], -2 * total)
    plain = int_strategy(shift=3, plan=by_shape())  # sigma times two
    own, other = (
        np.asarray(s.member(s.init(params, 0), 6)["up"], np.int32) - params["up"]
        for s in (es, plain)
    )
    inside = own != 0
    assert inside.any() and (own[inside] == other[inside]).all()


def test_integers_compute_no_floats_and_the_same_on_any_number_of_devices():
    es = int_strategy()
    state = es.init(int_params(), 0)
    assert float_operations(lambda s: es.update(s, jnp.arange(32) % 5)[0], state) == []
    expected, _ = es.step(state, int_fitness, INT_X)
    for changes in (dict(chunk=4), dict(mesh=mesh(4))):
        other = int_strategy(**changes)
        found, _ = other.step(other.init(int_params(), 0), int_fitness, INT_X)
        chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(expected))


def test_a_quantised_matrix_beside_floats():
    params = {"w": np.full((8, 12), 3, np.int8), "s": np.ones(6, np.float32)}
    es = make(subspaces(by_shape({"w": Matrix(0, 1)}), 4), sigma=2.0)
    member = es.member(es.init(params, 0), 2)
    assert (np.asarray(member["w"] != 3).any(0)).sum() == 3


# ---------------------------------------------------------------- in words


def test_describe_tells_the_subspaces():
    params = make_params()
    lines = {
        line.split()[0]: line for line in make(subspaces(PLAIN, 4)).describe(params).splitlines()
    }
    assert "batch 0, 4 subspaces of columns" in lines["layers"]
    assert "4 subspaces of rows" in lines["tall"] and "4 subspaces of entries" in lines["bias"]


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "4"])
def test_wrong_counts_are_named(count):
    with pytest.raises(ValueError, match=r"subspaces: count=.*: must be an integer of at least 1"):
        subspaces(PLAIN, count)


def test_wrong_plans_are_named():
    params = make_params()
    with pytest.raises(ValueError, match="population=36: must be a multiple of 8, .* 4 subspaces"):
        make(subspaces(PLAIN, 4), population=36).init(params, 0)
    with pytest.raises(ValueError, match="'tall' has node noise, which has no subspaces"):
        subspaces(by_shape({"tall": Nodes()}), 4)(params, 1)
    with pytest.raises(
        ValueError, match="'bias': plan.subspaces needs weight noise, so perturb must be"
    ):
        make(subspaces(PLAIN, 4), perturb="nodes").init(params, 0)
    with pytest.raises(ValueError, match="'bias': must be divided once, .* 2 subspaces already"):
        subspaces(subspaces(PLAIN, 2), 2)(params, 1)
    with pytest.raises(
        ValueError, match="'bias' is int8: subspaces: count=2: must be 1, 4, 16 or 64"
    ):
        subspaces(by_shape(), 2)(int_params(), 1)
    with pytest.raises(ValueError, match=r"plan=.*: must be the result of a call, subspaces\(\)"):
        make(subspaces)
    assert scaled(subspaces(by_shape(), 4), {"*": 2.0})(int_params(), 1)["up"].sigma == 2.0
