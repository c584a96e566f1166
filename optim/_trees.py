"""What every transform asks of its arguments: parameters, rates, and settings leaf by leaf."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
from jaxtyping import PyTree

# Not among optax's public names, though optax's own transforms raise it.
from optax._src.base import NO_PARAMS_MSG

# A rate: a number, or an array where it is injected or traced.
Scalar = float | int | jax.Array

# A setting for every leaf: see broadcast().
Setting: TypeAlias = PyTree | Callable[[PyTree], PyTree]


def need_params(params: PyTree) -> PyTree:
    """Returns the parameters.

    Raises:
      ValueError: the caller passed none; the message is optax's own.
    """
    if params is None:
        raise ValueError(NO_PARAMS_MSG)
    return params


def is_function(setting: object, tree: PyTree) -> bool:
    """Whether a setting is a function of the tree, and not a tree of values that can be called.

    A model of Equinox is a tree with a ``__call__``, and so is a mask made from one by
    ``jax.tree.map``. A prefix of the tree is either one value or a node of the type that the tree's
    own root has; everything else that can be called is a function.

    Example:
      >>> is_function(lambda params: params, {"w": 1.0}), is_function({"w": True}, {"w": 1.0})
      (True, False)
    """
    if not callable(setting):
        return False
    is_value = jax.tree_util.treedef_is_leaf(jax.tree.structure(setting))
    return is_value or type(setting) is not type(tree)


def resolved(setting: PyTree | Callable[[PyTree], PyTree], tree: PyTree) -> PyTree:
    """The setting, or what it returns for the tree where it is a function of it."""
    return setting(tree) if is_function(setting, tree) else setting


def broadcast(
    setting: PyTree | Callable[[PyTree], PyTree], tree: PyTree, default: Any = None
) -> PyTree:
    """One value for every leaf of a tree.

    Args:
      setting: a value for all leaves, a prefix of the tree with values at its leaves, or a function
        of the tree that returns either.
      tree: the parameters.
      default: the value where the setting is None.

    Returns:
      A tree of the structure of ``tree``.

    Raises:
      ValueError: the setting is a tree that is no prefix of ``tree``.

    Example:
      >>> broadcast({"a": 1, "b": None}, {"a": [0.0, 0.0], "b": 0.0}, default=2)
      {'a': [1, 1], 'b': 2}
    """
    prefix = resolved(setting, tree)
    values = jax.tree.broadcast(prefix, tree, is_leaf=lambda x: x is None)
    return jax.tree.map(lambda _, value: default if value is None else value, tree, values)


def paths(tree: PyTree) -> list[str]:
    """The paths of the leaves, in their order.

    Example:
      >>> paths({"layers": [{"kernel": 1.0}, {"kernel": 2.0}]})
      ['layers/0/kernel', 'layers/1/kernel']
    """
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]


class Node(NamedTuple):
    """A node of a tree that holds others: a dict, a list, a module.

    Attributes:
      path: as ``"layers/0"``; empty for the root.
      type: the name of its class.
      children: the names of what it holds.
      start, stop: which leaves lie in it, by their numbers.
    """

    path: str
    type: str
    children: tuple[str, ...]
    start: int
    stop: int


def nodes(tree: PyTree) -> list[Node]:
    """The nodes of a tree, each before those within it.

    Example:
      >>> [(node.path, node.start, node.stop) for node in nodes({"a": [1.0, 2.0], "b": 3.0})]
      [('', 0, 3), ('a', 0, 2)]
    """
    found: list[Node] = []

    def visit(x: PyTree, path: tuple[Any, ...], start: int) -> int:
        level = jax.tree_util.default_registry.flatten_one_level_with_keys(x)
        if level is None:
            return start + 1
        children = list(level[0])
        place = len(found)
        names = tuple(jax.tree_util.keystr((key,), simple=True) for key, _ in children)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found.append(Node(name, type(x).__name__, names, start, start))
        stop = start
        for key, child in children:
            stop = visit(child, (*path, key), stop)
        found[place] = found[place]._replace(stop=stop)
        return stop

    visit(tree, (), 0)
    return found
