"""Training some of the parameters, chosen by path."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eggroll import Dense, EvolutionStrategy, Frozen, Given, Matrix
from eggroll.plan import by_shape, infer, only, relative, without

PARAMS = {
    "layers": {
        "0": {"kernel": np.full((8, 8), 0.5, np.float32), "bias": np.zeros(8, np.float32)},
        "1": {"kernel": np.full((8, 8), 2.0, np.float32), "bias": np.zeros(8, np.float32)},
    },
    "head": np.ones((8, 4), np.float32),
    "steps": np.zeros(3, np.int32),
}
PATHS = [
    "head", "layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel", "steps",
]  # fmt: skip


def fitness(params, key, x):
    for layer in params["layers"].values():
        x = jnp.tanh(x @ layer["kernel"] / 8 + layer["bias"])
    return -jnp.mean(jnp.square(x @ params["head"]), axis=1)


X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def trained(planner, params=PARAMS):
    return [leaf.path for leaf in planner(params, 1).leaves if leaf.trainable]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("*", PATHS[:-1]),
        ("layers/0/*", PATHS[1:3]),
        (["layers/*/kernel", "head"], ["head", "layers/0/kernel", "layers/1/kernel"]),
        ("layers/[1]/kernel", ["layers/1/kernel"]),
        (("*bias",), ["layers/0/bias", "layers/1/bias"]),
    ],
)
@pytest.mark.parametrize("plain", [by_shape(), infer(fitness, PARAMS, X)])
def test_a_choice_is_trained_as_the_planner_says_and_its_complement_is_the_rest(
    plain, patterns, expected
):
    assert trained(only(plain, patterns)) == expected
    plan, chosen = plain(PARAMS, 1), only(plain, patterns)(PARAMS, 1)
    assert all(chosen[path] == plan[path] for path in [*expected, "steps"])
    if len(expected) < 5:
        rest = trained(without(plain, patterns))
        assert sorted([*rest, *expected]) == PATHS[:-1]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(PATHS[:-1]), min_size=1), st.lists(st.sampled_from(PATHS[:-1])))
def test_choices_compose_as_sets(first, second):
    planner = only(by_shape(), first)
    assert set(trained(planner)) == set(first)
    left = set(first) - set(second)
    if not second:
        return
    if left:
        assert set(trained(without(planner, second))) == left
        assert set(trained(only(without(by_shape(), second), sorted(left)))) == left
    else:
        with pytest.raises(ValueError, match=r"without\(.*\): must leave a parameter"):
            trained(without(planner, second))


def test_the_optimizer_sees_the_choice_alone_and_the_noise_is_the_same():
    changes = dict(optimizer=optax.adam(1e-2), population=16, sigma=0.1, on_dense="error")
    whole = EvolutionStrategy(**changes)
    es = EvolutionStrategy(**changes, plan=only(by_shape(), "layers/1/*"))
    state = es.init(PARAMS, 0)
    assert sum(x.size for x in jax.tree.leaves(state.optimizer)) == 2 * 72 + 1
    new, _ = es.step(state, fitness, X)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), new.params, PARAMS)
    assert moved == {
        "layers": {"0": {"kernel": False, "bias": False}, "1": {"kernel": True, "bias": True}},
        "head": False,
        "steps": False,
    }
    own, other = es.member(state, 3), whole.member(whole.init(PARAMS, 0), 3)
    chex.assert_trees_all_equal(own["layers"]["1"], other["layers"]["1"])
    text = es.describe(PARAMS)
    assert text.count("not in only('layers/1/*')") == 3 and "int32: passes through" in text
    text = EvolutionStrategy(**changes, plan=without(by_shape(), "head")).describe(PARAMS)
    assert text.count("without('head')") == 1


def test_choices_compose_with_overrides_sizes_and_quantised_parameters():
    plain = by_shape({"head": Matrix(1, 0, sigma=3.0), "layers/0/*": Frozen(), "*bias": Dense(2.0)})
    planner = only(plain, ["head", "layers/*/bias"])
    assert planner(PARAMS, 1)["head"].treatment == Matrix(1, 0, rank=1, sigma=3.0)
    assert trained(planner) == ["head", "layers/0/bias", "layers/1/bias"]
    sizes = relative(only(by_shape(), "*kernel"), PARAMS)(PARAMS, 1)
    assert (sizes["layers/1/kernel"].sigma, sizes["head"].sigma) == (2.0, 0.0)
    # Frozen or not, an int8 matrix beside floats is one that training may start with.
    mixed = {"w": np.full((8, 8), 3, np.int8), "s": np.ones(8, np.float32)}
    quantised = by_shape({"w": Matrix(0, 1)})
    es = EvolutionStrategy(
        optimizer=optax.sgd(0.1), population=4, sigma=0.1, plan=without(quantised, "w")
    )
    state, _ = es.step(es.init(mixed, 0), lambda p, key: -jnp.sum(p["s"] ** 2) * p["w"][0, 0])
    assert not state.master and state.params["w"].dtype == jnp.int8
    assert without(quantised, "w")(mixed, 1)["w"].arithmetic == by_shape()(mixed, 1)["w"].arithmetic
    given = by_shape({"head": Given()})
    assert trained(without(given, "head")) == trained(only(given, "layers/*"))


def test_chosen_under_node_noise():
    es = EvolutionStrategy(
        optimizer=optax.sgd(0.1), population=8, sigma=0.1, perturb="nodes",
        plan=only(by_shape(), "layers/1/kernel"),
    )  # fmt: skip
    state, _ = es.step(es.init(PARAMS, 0), fitness, X)
    assert np.any(state.params["layers"]["1"]["kernel"] != 2.0)
    chex.assert_trees_all_equal(jax.device_get(state.params["layers"]["0"]), PARAMS["layers"]["0"])


@pytest.mark.parametrize("choose", [only, without])
def test_a_pattern_that_matches_nothing_is_named_with_near_paths(choose):
    with pytest.raises(
        ValueError, match=r"'layers/1/kernels': must match .* such as 'layers/1/kernel' or"
    ):
        trained(choose(by_shape(), "layers/1/kernels"))
    with pytest.raises(
        ValueError, match=r"pattern 'zzz': must match a parameter, such as 'head' or"
    ):
        trained(choose(by_shape(), ["head", "zzz"]))
    with pytest.raises(ValueError, match="patterns: expected at least one"):
        choose(by_shape(), [])


def test_a_choice_of_frozen_parameters_alone_is_named():
    with pytest.raises(
        ValueError, match=r"'steps': must match .* trained, .*'steps' \(int32: passes"
    ):
        trained(only(by_shape(), "steps"))
    with pytest.raises(ValueError, match=r"'head': .* freezes 'head' \(override 'head'\)"):
        trained(only(by_shape({"head": Frozen()}), ["*kernel", "head"]))
    assert trained(without(by_shape(), ["steps", "head"])) == PATHS[1:-1]
