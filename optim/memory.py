"""The memory of an optimizer's state, told without allocating any of it."""

from typing import Any, NamedTuple

import jax
import optax


class StateBytes(NamedTuple):
    """Bytes of a state, in all and broken down; prints as a table.

    Attributes:
      total: bytes.
      fields: by the state's fields, as ``"mu"``, ``"part.nu"``; they add up to the total.
      parameters: by the parameter whose they are, its path as ``"layers/0/kernel"``; what belongs to no
        one of them (counts, keys) is not among them.
    """

    total: int
    fields: dict[str, int]
    parameters: dict[str, int]

    def __str__(self) -> str:
        rows = [*self.fields.items(), ("total", self.total)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}} {size:>15,}" for name, size in rows)


def state_bytes(tx: optax.GradientTransformation, params: Any) -> StateBytes:
    """How many bytes the state of an optimizer takes for these parameters.

    Args:
      tx: any optax transform.
      params: the parameters, or their shapes as ``jax.ShapeDtypeStruct``, of any size.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optim
      >>> params = {"w": jax.ShapeDtypeStruct((65536, 65536), jnp.float32)}     # 16 GiB
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


def _within(path: tuple[Any, ...], names: dict[tuple[Any, ...], str]) -> tuple[int, int]:
    """Where in the path of a state's leaf that of a parameter is: the longest, the last of these."""
    for length in range(len(path), 0, -1):
        for start in range(len(path) - length, -1, -1):
            if path[start : start + length] in names:
                return start, start + length
    return len(path), len(path)


def _name(key: Any) -> str:
    """A field's name; places in a chain have none."""
    return str(getattr(key, "name", getattr(key, "key", "")))
