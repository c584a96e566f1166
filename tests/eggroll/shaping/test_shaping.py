import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eggroll import shaping

# float32 results of a few roundings against float64 numpy.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}

RULES = {
    "identity": shaping.identity(),
    "zscore": shaping.zscore(),
    "zscore eps": shaping.zscore(eps=0.5),
    "centered_rank": shaping.centered_rank(),
    "center task": shaping.center("task"),
    "center group": shaping.center("group"),
    "center population": shaping.center("population"),
    "scale none": shaping.scale("none"),
    "scale group": shaping.scale("group"),
    "scale batch": shaping.scale("batch"),
    "per_task batch": shaping.per_task(),
    "per_task group": shaping.per_task("group"),
    "per_task none": shaping.per_task("none"),
    "pair_sign": shaping.pair_sign(),
    "chain": shaping.chain(shaping.center("group"), shaping.scale("batch", eps=0.0)),
}
NO_SPREAD_IS_ZERO = [name for name in RULES if name not in ("identity", "scale none")]
USES_GROUPS = [
    name for name in RULES if name not in ("zscore", "zscore eps", "center task", "pair_sign")
]
# Rules whose answer for a member does not depend on which member is its partner.
BY_MEMBER = [name for name in RULES if name != "pair_sign"]

one_of_each = pytest.mark.parametrize(
    "name", ["identity", "zscore", "centered_rank", "per_task batch", "pair_sign", "chain"]
)
each_rule = pytest.mark.parametrize("name", list(RULES))


def shaped(rule: shaping.Shaping, values: Any, valid: Any = None, groups: Any = None) -> np.ndarray:
    values = jnp.asarray(values)
    values = values[:, None] if values.ndim == 1 else values
    valid = jnp.ones(values.shape, bool) if valid is None else jnp.asarray(valid)
    valid = valid[:, None] if valid.ndim == 1 else valid
    groups = None if groups is None else jnp.asarray(groups)
    if rule in NAMES and len(values) in SHARED_SIZES:
        return np.asarray(all_rules(values, valid, groups)[NAMES[rule]])
    return np.asarray(compiled(rule, values, valid, groups))


NAMES = {rule: name for name, rule in RULES.items()}
# For scores of so many members one program computes all rules, which compiles faster than fifteen.
SHARED_SIZES = (6, 8, 18, 1000)


@jax.jit
def all_rules(values: Any, valid: Any, groups: Any) -> dict[str, Any]:
    return {name: rule(values, valid, groups) for name, rule in RULES.items()}


@functools.partial(jax.jit, static_argnames="rule")
def compiled(rule: shaping.Shaping, values: Any, valid: Any, groups: Any) -> Any:
    return rule(values, valid, groups)


@st.composite
def batches(draw: Callable[..., Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Scores with ties, some invalid, with or without groups; few shapes, so that few compile."""
    population, tasks, grouped = draw(st.sampled_from([(6, 3, False), (8, 2, True)]))
    size = population * tasks
    scores = draw(st.lists(st.integers(-40, 40), min_size=size, max_size=size))
    valid = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    ids = draw(st.lists(st.integers(0, 3), min_size=population, max_size=population))
    return (
        np.asarray(scores, np.float32).reshape(population, tasks) / 8,
        np.asarray(valid).reshape(population, tasks),
        np.asarray(ids, np.int32) if grouped else None,
    )


# The same by the formula, in float64, one cell set at a time.


def cell_sets(
    by: str, valid: np.ndarray, groups: np.ndarray | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Index pairs of the valid cells that one statistic is over."""
    if by in ("population", "batch"):
        return [np.nonzero(valid)]
    ids = np.zeros(len(valid), int) if groups is None or by == "task" else groups
    return [
        np.nonzero(valid & (ids == i)[:, None] & (np.arange(valid.shape[1]) == task))
        for i in np.unique(ids)
        for task in range(valid.shape[1])
    ]


def expected(
    values: np.ndarray,
    valid: np.ndarray,
    groups: np.ndarray | None,
    mean_of: str | None,
    std_of: str | None,
    eps: float,
) -> np.ndarray:
    raw = values.astype(np.float64)
    out = np.where(valid, raw, 0)
    for cells in cell_sets(mean_of, valid, groups) if mean_of else []:
        if cells[0].size:
            out[cells] -= raw[cells].mean()
    for cells in cell_sets(std_of, valid, groups) if std_of else []:
        if cells[0].size:
            var = raw[cells].var()
            out[cells] = out[cells] / np.sqrt(var + eps) if var else 0
    return out


def expected_rank(values: np.ndarray, valid: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    out = np.zeros(values.shape)
    for cells in cell_sets("group", valid, groups):
        own = values[cells]
        below = (own[None] < own[:, None]).sum(1)
        equal = (own[None] == own[:, None]).sum(1)
        if own.size > 1:
            out[cells] = (below + (equal - 1) / 2) / (own.size - 1) - 0.5
    return out


FORMULAS = {
    "identity": (None, None, 0.0),
    "zscore": ("task", "task", 0.0),
    "zscore eps": ("task", "task", 0.5),
    "center task": ("task", None, 0.0),
    "center group": ("group", None, 0.0),
    "center population": ("population", None, 0.0),
    "scale none": (None, None, 0.0),
    "scale group": (None, "group", 1e-5),
    "scale batch": (None, "batch", 1e-5),
    "per_task batch": ("group", "batch", 1e-5),
    "per_task group": ("group", "group", 1e-5),
    "per_task none": ("group", None, 0.0),
}


@pytest.mark.parametrize("name", list(FORMULAS))
@given(batch=batches())
def test_formula(name: str, batch: Any) -> None:
    np.testing.assert_allclose(
        shaped(RULES[name], *batch), expected(*batch, *FORMULAS[name]), rtol=1e-5, atol=1e-5
    )


@given(batch=batches())
def test_centered_rank_formula(batch: Any) -> None:
    np.testing.assert_allclose(
        shaped(shaping.centered_rank(), *batch), expected_rank(*batch), rtol=1e-6, atol=0
    )


# Known numbers.

CORRECT = np.array([[1, 0, 0, 0], [1, 1, 1, 0]])
WEIGHTS = [[1.49997, -0.49999, -0.49999, -0.49999], [0.49999, 0.49999, 0.49999, -1.49997]]


def test_reference_numbers() -> None:
    rule = shaping.per_task(scale="batch")
    np.testing.assert_allclose(shaped(rule, CORRECT.T).T, WEIGHTS, atol=6e-6)
    flat = shaped(rule, CORRECT.ravel(), groups=np.repeat([0, 1], 4))
    np.testing.assert_allclose(flat.reshape(2, 4), WEIGHTS, atol=6e-6)


def test_grpo_numbers() -> None:
    # GRPO with ddof 0 and 1e-6 beside the deviation instead of 1e-12 inside the root.
    out = shaped(shaping.per_task("group", eps=1e-12), [1, 0, 0, 1, 0, 0, 0, 0])[:, 0]
    np.testing.assert_allclose(out[[0, 1]], [1.732047, -0.577349], atol=5e-6)


def test_variance_has_ddof_0() -> None:
    # With ddof 1 the deviation of -1, 1 would be sqrt(2).
    np.testing.assert_array_equal(shaped(shaping.zscore(), [-1.0, 1.0])[:, 0], [-1, 1])


def test_task_group_population_differ() -> None:
    values = [[0.0, 10.0], [2.0, 30.0], [4.0, 20.0], [6.0, 40.0]]
    groups = [7, 7, 9, 9]
    by_task = shaped(shaping.center("task"), values, groups=groups)
    by_group = shaped(shaping.center("group"), values, groups=groups)
    by_population = shaped(shaping.center("population"), values, groups=groups)
    np.testing.assert_array_equal(by_task, [[-3, -15], [-1, 5], [1, -5], [3, 15]])
    np.testing.assert_array_equal(by_group, [[-1, -10], [1, 10], [-1, -10], [1, 10]])
    np.testing.assert_array_equal(by_population, np.array(values) - 14)


def test_rank_bounds_ties_and_single() -> None:
    rule = shaping.centered_rank()
    np.testing.assert_allclose(
        shaped(rule, [3.0, 1.0, 2.0, 2.0, -7.0])[:, 0], [0.5, -0.25, 0.125, 0.125, -0.5]
    )
    np.testing.assert_array_equal(shaped(rule, [0.0, -0.0])[:, 0], [0, 0])
    one = shaped(rule, [5.0, 4.0, 3.0], valid=[False, True, False])
    np.testing.assert_array_equal(one[:, 0], [0, 0, 0])


def test_pair_sign() -> None:
    rule = shaping.pair_sign()
    values = [[3.0, 1.0], [2.0, 1.0], [0.0, -1e30], [1e-30, 1e30], [5.0, 5.0], [6.0, 4.0]]
    valid = np.ones((6, 2), bool)
    valid[4, 0] = False
    out = shaped(rule, values, valid)
    np.testing.assert_array_equal(
        out, [[0.5, 0], [-0.5, 0], [-0.5, -0.5], [0.5, 0.5], [0, 0.5], [0, -0.5]]
    )
    assert set(np.unique(out[::2] - out[1::2])) <= {-1, 0, 1}


def test_pair_sign_of_an_odd_population() -> None:
    with pytest.raises(ValueError, match="expected an even population.*got 3"):
        shaped(shaping.pair_sign(), [1.0, 2.0, 3.0])


# Properties.


@pytest.mark.parametrize("name", BY_MEMBER)
@given(batch=batches(), seed=st.integers(0, 2**31))
def test_members_may_be_permuted(name: str, batch: Any, seed: int) -> None:
    values, valid, groups = batch
    order = np.random.default_rng(seed).permutation(len(values))
    out = shaped(
        RULES[name], values[order], valid[order], None if groups is None else groups[order]
    )
    np.testing.assert_allclose(out, shaped(RULES[name], *batch)[order], **CLOSE)


@given(batch=batches(), seed=st.integers(0, 2**31))
def test_pairs_may_be_permuted_and_swapped(batch: Any, seed: int) -> None:
    values, valid, _ = batch
    pairs = np.random.default_rng(seed).permutation(len(values) // 2)
    order = np.stack([2 * pairs + 1, 2 * pairs], axis=1).ravel()
    out = shaped(shaping.pair_sign(), values[order], valid[order])
    np.testing.assert_array_equal(out, shaped(shaping.pair_sign(), values, valid)[order])


@pytest.mark.parametrize("name", ["zscore", "centered_rank", "pair_sign"])
@given(
    batch=batches(),
    factor=st.sampled_from([1e-25, 1e-3, 0.7, 3.0, 1e4, 1e30]),
    offset=st.sampled_from([0.0, -100.0, 1000.0]),
)
def test_invariant_to_affine_maps(name: str, batch: Any, factor: float, offset: float) -> None:
    values, valid, groups = batch
    # The map itself, in float32, must keep the scores: it moves each by at most eps * 1000 * 8 of
    # the smallest difference.
    mapped = ((values.astype(np.float64) + offset) * factor).astype(np.float32)
    np.testing.assert_allclose(
        shaped(RULES[name], mapped, valid, groups),
        shaped(RULES[name], values, valid, groups),
        rtol=2e-3,
        atol=2e-3,
    )


@pytest.mark.parametrize("name", ["centered_rank", "pair_sign"])
@given(batch=batches())
def test_invariant_to_monotone_maps(name: str, batch: Any) -> None:
    values, valid, groups = batch
    want = shaped(RULES[name], *batch)
    for monotone in (np.exp, np.arctan, lambda x: x**3, lambda x: np.sign(x) * 1e30 + x * 1e28):
        np.testing.assert_array_equal(
            shaped(RULES[name], monotone(values).astype(np.float32), valid, groups), want
        )


@given(batch=batches())
def test_negation_negates(batch: Any) -> None:
    values, valid, groups = batch
    for name in ("zscore", "centered_rank", "per_task batch", "pair_sign"):
        out = shaped(RULES[name], -values, valid, groups)
        np.testing.assert_allclose(out, -shaped(RULES[name], *batch), **CLOSE)


@each_rule
@given(batch=batches(), junk=st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -1e9, 0.1]))
def test_invalid_cells_never_matter(name: str, batch: Any, junk: float) -> None:
    values, valid, groups = batch
    want = shaped(RULES[name], *batch)
    assert np.isfinite(want).all()
    assert (want[~valid] == 0).all()
    np.testing.assert_array_equal(
        shaped(RULES[name], np.where(valid, values, np.float32(junk)), valid, groups), want
    )


@each_rule
@pytest.mark.parametrize(("shape", "groups"), [((6, 3), None), ((8, 2), [3, 0, 0, 3, 1, 1, 0, 0])])
def test_nothing_valid_gives_zeros(
    name: str, shape: tuple[int, int], groups: list[int] | None
) -> None:
    values = np.full(shape, np.nan, np.float32)
    out = shaped(RULES[name], values, np.zeros(shape, bool), groups)
    np.testing.assert_array_equal(out, np.zeros(shape))


@each_rule
def test_unmarked_nonfinite_scores_count_as_invalid(name: str) -> None:
    values = np.arange(18.0).reshape(6, 3) ** 2
    values[[1, 2, 4, 5], [0, 1, 2, 0]] = [np.nan, np.inf, -np.inf, np.nan]
    out = shaped(RULES[name], values)
    np.testing.assert_array_equal(out, shaped(RULES[name], values, np.isfinite(values)))


@pytest.mark.parametrize("name", NO_SPREAD_IS_ZERO)
@pytest.mark.parametrize("constant", [0.0, 0.1, -1e6 / 3, 1e-30, 3e38])
def test_constant_scores_give_exact_zeros(name: str, constant: float) -> None:
    values = np.full((1000, 2), constant, np.float32)
    groups = np.arange(1000) % 7
    np.testing.assert_array_equal(shaped(RULES[name], values), np.zeros_like(values))
    np.testing.assert_array_equal(shaped(RULES[name], values, groups=groups), np.zeros_like(values))


@pytest.mark.parametrize("name", ["zscore", "center group", "scale batch", "per_task group"])
def test_rounding_of_a_constant_is_no_spread(name: str) -> None:
    values = np.full(64, 0.1, np.float32)
    values[::3] = np.nextafter(values[::3], np.float32(1))
    np.testing.assert_array_equal(shaped(RULES[name], values), np.zeros((64, 1)))


def test_uniform_group_beside_a_mixed_one() -> None:
    values, groups = [0.1, 0.1, 0.1, 0.0, 1.0, 0.3], [5, 5, 5, 2, 2, 2]
    for name in ("center group", "per_task batch", "per_task group", "centered_rank"):
        out = shaped(RULES[name], values, groups=groups)[:, 0]
        np.testing.assert_array_equal(out[:3], 0)
        assert np.abs(out[3:]).max() > 0.4


@pytest.mark.parametrize("name", USES_GROUPS)
def test_groups_agree_with_columns(name: str) -> None:
    # The same scores, a prompt a column and a prompt a group, in mixed order and under any ids.
    for seed in range(12):
        rng = np.random.default_rng(seed)
        values = rng.integers(0, 5, (6, 3)).astype(np.float32) * 0.3
        valid = rng.random((6, 3)) > 0.2
        if seed % 3 == 1:
            values[:, 1] = 0.6
        elif seed % 3 == 2:
            valid[:, 2] = False
        order = rng.permutation(18)
        ids = np.broadcast_to(rng.permutation(60)[:3], (6, 3)).ravel()
        flat = shaped(RULES[name], values.ravel()[order], valid.ravel()[order], ids[order])
        columns = shaped(RULES[name], values, valid).ravel()[order]
        np.testing.assert_allclose(flat[:, 0], columns, **CLOSE)


def test_large_offset() -> None:
    rng = np.random.default_rng(1)
    values = (1e6 + rng.normal(size=(1000, 2))).astype(np.float32)
    groups = rng.integers(0, 9, 1000)
    valid = np.ones(values.shape, bool)
    for name in ("zscore", "center task", "center group", "per_task batch", "per_task group"):
        np.testing.assert_allclose(
            shaped(RULES[name], values, valid, groups),
            expected(values, valid, groups, *FORMULAS[name]),
            **CLOSE,
        )


def test_largest_floats() -> None:
    signs = np.array([[1, -1, 1, 0, 0, 1, -1, 1], [1, -1, 0, 0, 1, 1, -1, -1]], np.float32).T
    groups = [0, 0, 1, 1, 0, 1, 2, 2]
    for rule in RULES.values():
        assert np.isfinite(shaped(rule, signs * 3.4e38, groups=groups)).all()
    np.testing.assert_allclose(
        shaped(shaping.zscore(), signs * 3.4e38, groups=groups),
        shaped(shaping.zscore(), signs, groups=groups),
        **CLOSE,
    )


def test_huge_population() -> None:
    population = 2**18
    rng = np.random.default_rng(2)
    values = (rng.random((population, 1)) + 5).astype(np.float32)
    valid = rng.random((population, 1)) > 0.1
    groups = rng.integers(0, 3, population)
    for name in ("zscore", "per_task group"):
        np.testing.assert_allclose(
            shaped(RULES[name], values, valid, groups),
            expected(values, valid, groups, *FORMULAS[name]),
            rtol=1e-5,
            atol=1e-5,
        )
    values = rng.permutation(population).astype(np.float32)
    np.testing.assert_allclose(
        shaped(shaping.centered_rank(), values)[:, 0], values / (population - 1) - 0.5, atol=1e-7
    )


# Composition, transformations, types.


def test_chain_applies_the_first_first() -> None:
    values = np.array([[0.0], [4.0], [8.0], [12.0]])

    def add_one(values: Any, valid: Any, groups: Any) -> Any:
        return values + 1

    def double(values: Any, valid: Any, groups: Any) -> Any:
        return values * 2

    both = shaped(shaping.chain(add_one, double), values)
    np.testing.assert_array_equal(both, (values + 1) * 2)
    np.testing.assert_array_equal(shaped(shaping.chain(double, add_one), values), values * 2 + 1)
    np.testing.assert_array_equal(shaped(shaping.chain(), values), values)


def test_chain_masks_invalid_cells_at_every_step() -> None:
    def add_one(values: Any, valid: Any, groups: Any) -> Any:
        return values + 1

    values, valid = [2.0, np.nan, 4.0], [True, True, False]
    out = shaped(shaping.chain(add_one, shaping.center("task"), add_one), values, valid)
    np.testing.assert_array_equal(out[:, 0], [1, 0, 0])


def test_scaling_before_centring_is_the_reference_and_after_is_not() -> None:
    before = shaping.chain(shaping.scale("batch"), shaping.center("group"))
    after = shaping.chain(shaping.center("group"), shaping.scale("batch"))
    np.testing.assert_allclose(shaped(before, CORRECT.T).T, WEIGHTS, atol=6e-6)
    np.testing.assert_allclose(shaped(after, CORRECT.T)[0, 0], 0.75 / np.sqrt(0.1875), rtol=1e-4)


@one_of_each
def test_jit_and_vmap_equal_eager(name: str) -> None:
    rng = np.random.default_rng(3)
    values = jnp.asarray(rng.normal(size=(3, 8, 2)), jnp.float32)
    valid = jnp.asarray(rng.random((3, 8, 2)) > 0.2)
    groups = jnp.asarray(rng.integers(0, 5, (3, 8)))
    eager = [RULES[name](*batch) for batch in zip(values, valid, groups, strict=True)]
    np.testing.assert_allclose(all_rules(values[0], valid[0], groups[0])[name], eager[0], **CLOSE)
    mapped = all_rules_mapped(values, valid, groups)[name]
    np.testing.assert_allclose(mapped, np.stack(eager), **CLOSE)


all_rules_mapped = jax.jit(jax.vmap(all_rules))


@one_of_each
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint8, jnp.bool_])
def test_weights_are_float32(name: str, dtype: Any) -> None:
    values = jnp.asarray([[0, 1], [1, 1], [0, 0], [1, 0]] * 2, dtype)
    valid, groups = jnp.ones((8, 2), bool), jnp.asarray([0, 0, 1, 1] * 2)
    out = RULES[name](values, valid, groups)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, RULES[name](values.astype(jnp.float32), valid, groups))


@one_of_each
def test_float64_stays_float64(name: str) -> None:
    with jax.enable_x64(True):
        values = jnp.asarray(1e9 + np.random.default_rng(4).normal(size=(8, 2)))
        valid, groups = jnp.ones((8, 2), bool), jnp.asarray([0, 1, 2, 2, 1, 0, 0, 1])
        out = all_rules(values, valid, groups)[name]
        assert out.dtype == jnp.float64
        if name in FORMULAS:
            want = expected(*map(np.asarray, (values, valid, groups)), *FORMULAS[name])
            np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-6)


def test_rules_built_alike_are_equal() -> None:
    # Equal and hashable: as static arguments of jit they share one compilation.
    def build() -> shaping.Shaping:
        return shaping.chain(shaping.zscore(), shaping.center("group"), shaping.per_task("none"))

    assert build() == build()
    assert hash(build()) == hash(build())
    assert shaping.zscore() != shaping.zscore(eps=1.0)
    assert shaping.zscore() != shaping.centered_rank()
    assert repr(shaping.scale("group", eps=0.5)) == "scale(by='group', eps=0.5)"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: shaping.center("column"), "center: by='column'.*'task', 'group' or 'population'"),
        (lambda: shaping.scale("task"), "scale: by='task'.*'none', 'group' or 'batch'"),
        (lambda: shaping.per_task("std"), "per_task: scale='std'.*'none', 'group' or 'batch'"),
        (lambda: shaping.zscore(-1.0), "zscore: eps=-1.0.*at least 0"),
        (lambda: shaping.scale(eps=float("nan")), "scale: eps=nan.*finite"),
        (lambda: shaping.per_task(eps=float("inf")), "per_task: eps=inf.*finite"),
        (lambda: shaping.chain(shaping.zscore), r"chain: expected .* zscore\(\), got the function"),
    ],
)
def test_wrong_options(build: Callable[[], shaping.Shaping], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
