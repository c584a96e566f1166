"""Settings leaf by leaf: values, prefixes, functions, and trees that can be called."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import optim
from optim._trees import broadcast, is_function, resolved


class Everything(eqx.Module):
    """A function that is a module: it has a node of its own in the registry of trees."""

    def __call__(self, params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, params)


def mlp() -> Any:
    return eqx.filter(eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0)), eqx.is_array)


@pytest.mark.parametrize(
    "setting",
    [
        lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        functools.partial(jax.tree.map, lambda x: x.ndim > 1),
        jax.tree_util.Partial(jax.tree.map, lambda x: x.ndim > 1),
        Everything(),
        jax.tree.map(lambda x: x.ndim > 1, mlp()),
    ],
    ids=["lambda", "functools", "Partial", "module", "tree"],
)
def test_functions_and_trees_that_can_be_called(setting: Any) -> None:
    params = mlp()
    assert callable(setting) and callable(params)
    assert is_function(setting, params) != (type(setting) is eqx.nn.MLP)
    found = resolved(setting, params)
    assert jax.tree.leaves(found) == [True, False, True, False]
    assert jax.tree.leaves(broadcast(setting, params)) == [True, False, True, False]


def test_none_is_the_default_at_any_depth() -> None:
    params = {"a": [1.0, 2.0], "b": 3.0, "nothing": None}
    assert broadcast(None, params, 7) == {"a": [7, 7], "b": 7, "nothing": None}
    assert broadcast({"a": None, "b": 1, "nothing": None}, params, 7) == {
        "a": [7, 7],
        "b": 1,
        "nothing": None,
    }
    nothing = jax.tree.map(lambda _: None, mlp())
    assert jax.tree.leaves(broadcast(nothing, mlp(), 7)) == [7] * 4
    with pytest.raises(ValueError, match="pytree structure error"):
        broadcast({"c": 1}, params, 7)


SETTINGS: dict[str, Callable[[Any], Any]] = {
    "lion": lambda flags: optim.lion(0.1, weight_decay=1.0, mask=flags),
    "adamp": lambda flags: optim.adamp(0.1, weight_decay=1.0, mask=flags),
    "sgdp": lambda flags: optim.sgdp(0.1, weight_decay=1.0, mask=flags),
    "badam": lambda flags: optim.badam(0.1, active=9, weight_decay=1.0, mask=flags),
    "frugal": lambda flags: optim.frugal(0.1, weight_decay=1.0, mask=flags),
    "galore": lambda flags: optim.galore(0.1, rank=2, weight_decay=1.0, mask=flags),
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_masks_that_are_modules(name: str) -> None:
    """A mask is a tree of the model's class; it decays what a function for it decays."""
    params = mlp()
    which = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    grads = jax.tree.map(jnp.cos, params)
    steps = {}
    for key, mask in (("tree", which(params)), ("function", which), ("all", None)):
        solver = SETTINGS[name](mask)
        steps[key], _ = solver.update(grads, solver.init(params), params)
    assert eqx.tree_equal(steps["tree"], steps["function"])
    same = jax.tree.map(lambda a, b: bool((a == b).all()), steps["tree"], steps["all"])
    assert jax.tree.leaves(same) == [True, False, True, False]


@pytest.mark.parametrize("make", [optim.adamp, optim.sgdp])
def test_channel_axes_that_are_modules(make: Any) -> None:
    params = mlp()
    axes = jax.tree.map(lambda _: 0, params)
    tree, number = make(0.1, channel_axis=axes), make(0.1, channel_axis=0)
    grads = jax.tree.map(jnp.cos, params)
    found, _ = tree.update(grads, tree.init(params), params)
    right, _ = number.update(grads, number.init(params), params)
    assert eqx.tree_equal(found, right)


@pytest.mark.parametrize("make", [optim.frugal, optim.badam])
def test_splits_that_are_modules(make: Any) -> None:
    params = mlp()
    flags = jax.tree.map(lambda x: x.ndim > 1, params)
    solver = make(0.1, split=flags)
    _, state = solver.update(params, solver.init(params), params)
    # Two moments of every vector, and counts.
    sizes = [x.size for x in jax.tree.leaves(state[0].whole) if x.ndim]
    assert sizes == 2 * [x.size for x in jax.tree.leaves(params) if x.ndim == 1]


def test_models_of_nnx_are_parameters() -> None:
    """Their state is a tree that optax takes; the mask is a state too."""
    params = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param)
    flags = jax.tree.map(lambda x: x.ndim > 1, params)
    solver = optim.frugal(0.1, weight_decay=1.0, mask=flags, split=flags)
    updates, _ = solver.update(jax.tree.map(jnp.zeros_like, params), solver.init(params), params)
    assert jnp.allclose(updates["kernel"][...], -0.1 * params["kernel"][...])
