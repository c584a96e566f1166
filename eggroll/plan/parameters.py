"""The tree of parameters: paths of its leaves, and which of them can be trained."""

import fnmatch
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from eggroll._types import HasDtype, IsArray


def leaf_paths(params: PyTree) -> list[tuple[str, IsArray]]:
    """The leaves of a tree of parameters with their paths, such as ``"params/Dense_0/kernel"``.

    Raises:
      ValueError: a leaf is no array, or two leaves have the same path.

    Example:
      >>> [path for path, _ in leaf_paths({"w": jnp.ones(2), "layers": [jnp.ones(3)]})]
      ['layers/0', 'w']
    """
    leaves = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"parameter {path!r} is {leaf!r}, not an array; keep what is not an array out of the "
                "parameters (with Equinox: eqx.partition(model, eqx.is_array))"
            )
        leaves.append((path, leaf))
    seen: set[str] = set()
    for path, _ in leaves:
        if path in seen:
            raise ValueError(
                f"two parameters have the path {path!r}; noise is keyed by paths: rename one"
            )
        seen.add(path)
    return leaves


def is_float(leaf: HasDtype) -> bool:
    """Whether a leaf holds real floating numbers."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def is_complex(leaf: HasDtype) -> bool:
    """Whether a leaf holds complex numbers."""
    return jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def trained_type(params: PyTree) -> Callable[[HasDtype], bool]:
    """Which leaves are trained by their type: float ones; in a tree without any, those in int8.

    Beside float leaves an int8 leaf is trained only where an override is its exact path.
    """
    if any(is_float(leaf) or is_complex(leaf) for _, leaf in leaf_paths(params)):
        return is_float
    return lambda leaf: leaf.dtype == jnp.int8


def matches(path: str, pattern: str) -> bool:
    """Whether a path is meant by a pattern: by ``fnmatch``, or as it is printed.

    Square brackets are also taken literally, since paths of some libraries hold them.

    Example:
      >>> matches("blocks[0]/w", "blocks[0]/*"), matches("block1/w", "block[01]/w")
      (True, True)
    """
    literal = pattern.replace("[", "[[]")
    return path == pattern or any(fnmatch.fnmatchcase(path, p) for p in (pattern, literal))
