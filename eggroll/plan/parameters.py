"""The tree of parameters: the paths of its leaves, and the leaves that can be trained."""

import difflib
import fnmatch
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from eggroll._types import HasDtype, IsArray


def leaf_paths(params: PyTree) -> list[tuple[str, IsArray]]:
    """The leaves of a tree of parameters with their paths, such as ``"params/Dense_0/kernel"``.

    Raises:
      ValueError: a leaf is not an array, or two leaves have the same path.

    Example:
      >>> [path for path, _ in leaf_paths({"w": jnp.ones(2), "layers": [jnp.ones(3)]})]
      ['layers/0', 'w']
    """
    leaves = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"parameter {path!r} is {leaf!r}: must be an array; keep other values out of the "
                "parameters (with Equinox: eqx.partition(model, eqx.is_array))"
            )
        leaves.append((path, leaf))
    seen: set[str] = set()
    for path, _ in leaves:
        if path in seen:
            raise ValueError(
                f"parameter {path!r}: must be a unique path, since noise is keyed by paths"
            )
        seen.add(path)
    return leaves


def is_float(leaf: HasDtype) -> bool:
    """Whether a leaf holds real floating-point numbers."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def is_complex(leaf: HasDtype) -> bool:
    """Whether a leaf holds complex numbers."""
    return jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def trained_type(params: PyTree) -> Callable[[HasDtype], bool]:
    """Which leaves have a trained dtype: floats, or int8 in a tree without floats.

    Beside float leaves, an int8 leaf is trained only if an override equals its path.
    """
    if any(is_float(leaf) or is_complex(leaf) for _, leaf in leaf_paths(params)):
        return is_float
    return lambda leaf: leaf.dtype == jnp.int8


def matches(path: str, pattern: str) -> bool:
    """Whether a path matches a pattern, by ``fnmatch`` or literally.

    Square brackets also match literally, since paths of some libraries contain them.

    Example:
      >>> matches("blocks[0]/w", "blocks[0]/*"), matches("block1/w", "block[01]/w")
      (True, True)
    """
    literal = pattern.replace("[", "[[]")
    return path == pattern or any(fnmatch.fnmatchcase(path, p) for p in (pattern, literal))


def unmatched(what: str, pattern: str, paths: Sequence[str]) -> str:
    """A message for a pattern that matches no parameter, with the paths that are most like it.

    Example:
      >>> unmatched("pattern", "layer/*", ["bias", "layers/up", "layers/down"])
      "pattern 'layer/*': must match a parameter, such as 'layers/up' or 'layers/down'"
    """
    likeness = lambda path: difflib.SequenceMatcher(None, pattern, path).ratio()
    near = sorted(paths, key=likeness, reverse=True)[:3]
    near = [path for path in near if likeness(path) > 0.4] or list(paths[:3])
    return f"{what} {pattern!r}: must match a parameter, such as {' or '.join(map(repr, near))}"
