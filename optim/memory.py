"""The memory of an optimizer's state, computed without allocating any."""

from typing import NamedTuple

import jax
import optax
from jax.tree_util import KeyPath
from jaxtyping import PyTree


class StateBytes(NamedTuple):
    """Bytes of a state, in total and broken down. Its string is a table.

    Attributes:
      total: bytes of the whole state.
      fields: bytes by field of the state, such as ``"mu"`` or ``"part.nu"``; they sum to the total.
      parameters: bytes by path of the parameter, such as ``"layers/0/kernel"``. Counts, keys and
        other parts of the state that belong to no parameter are left out.
    """

    total: int
    fields: dict[str, int]
    parameters: dict[str, int]

    def __str__(self) -> str:
        rows = [*self.fields.items(), ("total", self.total)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}} {size:>15,}" for name, size in rows)


def state_bytes(tx: optax.GradientTransformation, params: PyTree) -> StateBytes:
    """The bytes that the state of an optimizer takes for these parameters, on all devices together.

    Args:
      tx: any optax transform.
      params: the parameters, or ``jax.ShapeDtypeStruct`` of any size in their place.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optim
      >>> params = {"w": jax.ShapeDtypeStruct((65536, 65536), jnp.float32)}  # 16 GiB
      >>> print(optim.state_bytes(optax.adam(1e-3), params))
      count               4
      mu     17,179,869,184
      nu     17,179,869,184
      total  34,359,738,372
      >>> optim.state_bytes(optim.lion(1e-3, mu_dtype=jnp.bfloat16), params).total
      8589934596
    """
    names = {
        path: jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }
    fields: dict[str, int] = {}
    parameters = dict.fromkeys(names.values(), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, params)):
        size = leaf.size * leaf.dtype.itemsize
        start, end = _within(path, names)
        if start < end:
            parameters[names[path[start:end]]] += size
        field = ".".join(filter(None, map(_name, path[:start] + path[end:]))) or "state"
        fields[field] = fields.get(field, 0) + size
    return StateBytes(sum(fields.values()), fields, parameters)


def _within(path: KeyPath, names: dict[KeyPath, str]) -> tuple[int, int]:
    """Start and end of a parameter's path within that of a state's leaf: the last longest one."""
    for length in range(len(path), 0, -1):
        for start in range(len(path) - length, -1, -1):
            if path[start : start + length] in names:
                return start, start + length
    return len(path), len(path)


def _name(key: object) -> str:
    """The name of a field; places in a chain have none."""
    return str(getattr(key, "name", getattr(key, "key", "")))
