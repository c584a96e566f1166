"""Every projector splits a gradient exactly; each by its own law."""

import inspect
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim import projector
from optim.projector import _coordinates
from optim.projector._blocks import Blocks
from optim.projector._interface import Projector

PROJECTORS = {
    "columns": projector.columns(),
    "rows": projector.rows(),
    "randk": projector.randk(),
    "random": projector.random(),
    "random full": projector.random(side="full"),
    "svd": projector.svd(),
    "svd reverse": projector.svd(3, "reverse_std"),
    "blocks": projector.blockwise("random", "leaf"),
    "layers": projector.blockwise("mirror", "layer"),
}
each = pytest.mark.parametrize("name", list(PROJECTORS))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# A tall matrix, a wide one and a stack of them.
GRADS = {"layer_0": normal(8, 4), "layer_1": normal(6, 12, seed=1), "stack": normal(2, 5, 6)}


def drawn(project: Projector, turn: int = 0, density: float = 0.5, grads: Any = GRADS) -> Any:
    start = project.init(grads, density)
    return jax.jit(project.refresh)(jax.random.key(7), jnp.int32(turn), grads, start)


@each
def test_the_two_parts_sum_to_the_gradient_and_share_nothing(name: str) -> None:
    project = PROJECTORS[name]

    @jax.jit
    def parts(grads: Any, split: Any) -> Any:
        compact, rest = project.down(grads, split)
        part = project.up(compact, split, grads)
        return compact, rest, part, *project.down(part, split)

    # Before the first refresh it is a split too.
    for split in (project.init(GRADS, 0.4), drawn(project, 3, 0.4)):
        compact, rest, part, again, none = parts(GRADS, split)
        total = jax.tree.map(lambda a, b: a + b, part, rest)
        chex.assert_trees_all_close(total, GRADS, atol=1e-5)
        chex.assert_trees_all_close(again, compact, atol=1e-5)
        chex.assert_trees_all_close(none, jax.tree.map(jnp.zeros_like, rest), atol=1e-5)


@pytest.mark.parametrize("name", ["columns", "rows", "randk", "random", "blocks"])
def test_all_or_nothing(name: str) -> None:
    project = PROJECTORS[name]
    split = project.init(GRADS, 1.0)
    compact, rest = project.down(GRADS, split)
    assert all((x == 0).all() for x in jax.tree.leaves(rest))
    chex.assert_trees_all_close(project.up(compact, split, GRADS), GRADS, atol=1e-6)
    split = drawn(project, density=0.0)
    compact, rest = project.down(GRADS, split)
    assert all(x.size == 0 for x in jax.tree.leaves(compact))
    chex.assert_trees_all_equal(rest, GRADS)
    assert all((x == 0).all() for x in jax.tree.leaves(project.up(compact, split, GRADS)))


@pytest.mark.parametrize("project", [projector.random(side="full"), projector.svd(3, "full")])
def test_bases_are_orthonormal_and_of_every_layer_its_own(project: Projector) -> None:
    bases = drawn(project)
    for x in jax.tree.leaves(bases):
        gram = jnp.einsum("...ir,...is->...rs", x, x)
        np.testing.assert_allclose(
            gram, np.broadcast_to(np.eye(x.shape[-1]), gram.shape), atol=1e-5
        )
    assert not np.allclose(bases["stack"].left[0], bases["stack"].left[1])


@pytest.mark.parametrize(
    ("side", "tall", "wide"),
    [
        ("std", (8, 2), (2, 12)),
        ("reverse_std", (2, 4), (6, 2)),
        ("left", (2, 4), (2, 12)),
        ("right", (8, 2), (6, 2)),
        ("full", (2, 2), (2, 2)),
    ],
)
def test_sides_of_singular_vectors(side: Any, tall: Any, wide: Any) -> None:
    project = projector.svd(2, side)
    compact, rest = project.down(GRADS, drawn(project))
    assert (compact["layer_0"].shape, compact["layer_1"].shape) == (tall, wide)
    # What is left is all but the two leading directions, which is what no other two leave less than.
    for name in ("layer_0", "layer_1"):
        values = np.linalg.svd(GRADS[name], compute_uv=False)
        np.testing.assert_allclose(
            np.linalg.norm(rest[name]), np.linalg.norm(values[2:]), rtol=1e-4
        )


@pytest.mark.parametrize(("name", "axis"), [("columns", 1), ("rows", 0)])
def test_lines_are_a_permutation_cut_short(name: str, axis: int) -> None:
    project, g = PROJECTORS[name], {"w": GRADS["layer_1"]}
    lines = drawn(project, grads=g)["w"]
    kept = np.asarray(lines.kept)
    assert (np.diff(kept) > 0).all() and kept.size == g["w"].shape[axis] // 2
    compact, rest = jax.tree.map(np.asarray, project.down(g, {"w": lines}))
    g = jax.tree.map(np.asarray, g)
    np.testing.assert_array_equal(compact["w"], np.take(g["w"], kept, axis))
    others = np.setdiff1d(np.arange(g["w"].shape[axis]), kept)
    np.testing.assert_array_equal(np.take(rest["w"], others, axis), np.take(g["w"], others, axis))
    assert (np.take(rest["w"], kept, axis) == 0).all()


@pytest.mark.parametrize("name", ["columns", "rows", "randk"])
def test_every_line_is_as_likely_and_turns_differ(name: str) -> None:
    project, g = PROJECTORS[name], jnp.zeros((6, 6))
    turns = jnp.arange(600)
    start = project.init(g, 0.5)
    split = jax.jit(jax.vmap(lambda t: project.refresh(jax.random.key(0), t, g, start)))(turns)
    kept = getattr(split, "kept", split)
    size = 36 if name == "randk" else 6
    share = np.bincount(np.asarray(kept).ravel(), minlength=size) / 600
    # 600 draws of probability 1/2: a standard deviation is .02.
    np.testing.assert_allclose(share, 0.5, atol=0.09)
    again = project.refresh(jax.random.key(0), jnp.int32(5), g, start)
    chex.assert_trees_all_equal(again, jax.tree.map(lambda x: x[5], split))


@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_least_bits_are_a_set_of_their_size_ties_or_not(seed: int, number: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 6, size=(3, 10)).astype(np.uint32)
    kept, among = least(jnp.asarray(bits), number)
    for row, places, flags in zip(bits, np.asarray(kept), np.asarray(among), strict=True):
        assert flags.sum() == number and (np.flatnonzero(flags) == places).all()
        right = np.sort(np.argsort(row, kind="stable")[:number])
        np.testing.assert_array_equal(places, right)


least = jax.jit(_coordinates.least, static_argnums=1)


def test_columns_are_taken_alike_on_one_cpu_and_on_many(monkeypatch: pytest.MonkeyPatch) -> None:
    project = PROJECTORS["columns"]
    split = drawn(project)
    many = project.down(GRADS, split)
    wide = project.up(many[0], split, GRADS)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    one = project.down(GRADS, split)
    chex.assert_trees_all_equal(one, many)
    chex.assert_trees_all_equal(project.up(one[0], split, GRADS), wide)
    # In one piece of memory: no gather along an axis is left.
    text = str(jax.make_jaxpr(lambda g: project.down(g, split))(GRADS))
    assert "slice_sizes=(1,)" in text and "slice_sizes=(8, 1)" not in text


# Without the checks of types, which come first in tests.
unchecked: Any = inspect.unwrap


def active(split: Blocks) -> list[int]:
    offsets = np.asarray(split.offset)
    assert sorted(np.flatnonzero(offsets >= 0)) == sorted(np.asarray(split.active))
    return np.asarray(split.active).tolist()


@pytest.mark.parametrize(
    ("order", "turns", "largest"),
    [
        ("ascending", [[0, 1], [2, 3], [4, 0]], [3, 4]),
        ("descending", [[4, 3], [2, 1], [0, 4]], [4, 3]),
        ("mirror", [[0, 4], [1, 3], [2, 0]], [3, 2]),
    ],
)
def test_blocks_take_turns(order: Any, turns: list[list[int]], largest: list[int]) -> None:
    grads = [normal(i + 1, 3, seed=i) for i in range(5)]
    project = projector.blockwise(order, active=2)
    assert active(project.init(grads, 1.0)) == turns[0]
    for turn, right in enumerate(turns):
        split = drawn(project, turn, grads=grads)
        assert active(split) == right
        compact, _ = project.down(grads, split)
        # One after the other, in a vector with room for the largest pair.
        parts = np.concatenate([np.ravel(grads[i]) for i in right])
        np.testing.assert_array_equal(compact[: parts.size], parts)
        assert compact.size == sum(3 * (i + 1) for i in largest)


def test_shuffled_blocks_all_have_a_turn_before_one_has_another() -> None:
    grads = [normal(2, 2, seed=i) for i in range(6)]
    project = projector.blockwise("shuffled", active=2)
    orders = [
        [i for turn in range(3) for i in active(drawn(project, 3 * epoch + turn, grads=grads))]
        for epoch in range(4)
    ]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    drawn_anew = projector.blockwise("random", active=2)
    first = [active(drawn(drawn_anew, turn, grads=grads)) for turn in range(8)]
    assert all(len(set(pair)) == 2 for pair in first) and len({tuple(p) for p in first}) > 2


def test_a_layer_is_what_its_numbered_name_holds() -> None:
    model = {f"block_{i}": {"a": normal(2, 3), "b": normal(3)} for i in (0, 2, 10)}
    grads = {"embed": normal(5, 2), **model}
    project = projector.blockwise("ascending", "layer", active=1)
    rests = [project.down(grads, drawn(project, turn, grads=grads))[1] for turn in range(4)]
    gone = [
        {name for name, x in rest.items() if all((leaf == 0).all() for leaf in jax.tree.leaves(x))}
        for rest in rests
    ]
    assert gone == [{"block_0"}, {"block_2"}, {"block_10"}, {"embed"}]
    stacked = {"w": normal(3, 2, 2), "v": normal(3, 1, 2)}
    _, rest = project.down(stacked, drawn(project, 1, grads=stacked))
    assert [(rest["w"][i] == 0).all() for i in range(3)] == [False, True, False]
    assert [(rest["v"][i] == 0).all() for i in range(3)] == [False, True, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: unchecked(projector.svd)(0),
            "rank must be an int of at least 1, or None for the density, got 0",
        ),
        (
            lambda: unchecked(projector.svd)(side="top"),
            "side must be std, reverse_std, left, right or full, got 'top'",
        ),
        (
            lambda: unchecked(projector.blockwise)("up"),
            "order must be random, shuffled, ascending, descending or mirror, got 'up'",
        ),
        (
            lambda: unchecked(projector.blockwise)(unit="net"),
            "unit must be leaf or layer, got 'net'",
        ),
        (
            lambda: unchecked(projector.blockwise)(active=0),
            "active must be an int of at least 1, or None for the density, got 0",
        ),
        (
            lambda: projector.columns().init({"b": jnp.ones(3)}, 0.5),
            "b: expected a matrix or a stack of matrices, got the shape (3,)",
        ),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
