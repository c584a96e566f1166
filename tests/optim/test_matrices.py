"""Leaves as matrices and back, and which of them are linear weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import GaLoreDimensionNumbers, MuonDimensionNumbers

from optim import linear_weights
from optim._cut import cut
from optim._matrices import view


@pytest.mark.parametrize(
    ("shape", "spec", "matrix"),
    [
        ((3, 4), None, (3, 4)),
        ((3, 4), MuonDimensionNumbers(1, 0), (4, 3)),
        ((2, 3, 4), MuonDimensionNumbers(-2, -1), (2, 3, 4)),
        ((3, 4, 2), GaLoreDimensionNumbers((0, 2), 1), (6, 4)),
        ((5, 2, 3, 4), MuonDimensionNumbers((3,), (1,)), (15, 4, 2)),
        ((5, 7), MuonDimensionNumbers((), 1), (5, 1, 7)),
        ((3, 3, 2, 8), None, (18, 8)),
        ((7,), None, (7,)),
    ],
)
def test_matrices_and_back(shape: tuple[int, ...], spec: object, matrix: tuple[int, ...]) -> None:
    x = jnp.arange(np.prod(shape)).reshape(shape)
    found = view(shape, spec)
    assert found.to(x).shape == found.matrix == matrix
    assert (found.back(found.to(x)) == x).all()


def test_rows_are_the_reduction_and_stacks_what_is_left() -> None:
    x = jnp.arange(24).reshape(2, 3, 4)
    assert (view(x.shape, MuonDimensionNumbers(2, 0)).to(x)[1] == x[:, 1].T).all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (MuonDimensionNumbers(0, 5), r"w: .*names an axis that the shape \(3, 4\) does not have"),
        (MuonDimensionNumbers(0, -2), "w: .*names an axis twice"),
    ],
)
def test_wrong_axes_are_named(spec: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut({"w": jnp.ones((3, 4))}, True, spec)


def test_linear_weights_of_a_transformer() -> None:
    w, v = jnp.ones((4, 4)), jnp.ones(4)
    block = {"MultiHeadDotProductAttention_0": {"query": {"kernel": w, "bias": v}}, "up_proj": w}
    model = {
        "embed_tokens": w, "Embed_0": {"embedding": w}, "layers_0": block, "LayerNorm_0": {"scale": v},
        "lm_head": w, "head_1": w, "stack": jnp.ones((2, 4, 4)), "nothing": None,
    }  # fmt: skip
    found = linear_weights(model)
    assert found["layers_0"] == {
        "MultiHeadDotProductAttention_0": {"query": {"kernel": True, "bias": False}},
        "up_proj": True,
    }
    del found["layers_0"]
    assert not any(jax.tree.leaves(found))
    spec = MuonDimensionNumbers(-2, -1)
    told = linear_weights(model, {**dict.fromkeys(model), "stack": spec})
    assert told["stack"] and not told["lm_head"]
    assert linear_weights(model, lambda x: {**dict.fromkeys(x), "stack": spec})["stack"]


def test_a_cut_tree_is_joined_again() -> None:
    tree = {"a": jnp.ones((2, 3)), "b": jnp.ones(3), "c": (jnp.zeros((4, 2)), None)}
    for which in (None, True, False, {"a": False, "b": True, "c": True}):
        parts = cut(tree, which)
        chex.assert_trees_all_equal(parts.join(parts.split(tree), parts.whole(tree), tree), tree)
    assert len(jax.tree.leaves(cut(tree).split(tree))) == 2


def test_the_old_place_of_linear_weights() -> None:
    from optim import matrices

    with pytest.warns(DeprecationWarning, match="use optim.linear_weights"):
        assert matrices.linear_weights is linear_weights
    with pytest.raises(AttributeError, match="no attribute 'views'"):
        _ = matrices.views
