"""Small JAX programs over a few parameters, written down or drawn at random.

A program is a list of assignments in Python source, each one an operation on names that were assigned
before it. The source is what a failing test prints, and it runs as it stands.
"""

import dataclasses
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# Sizes repeat, so that most values fit together.
PARAMS = {
    "w": (4, 6),
    "v": (6, 6),
    "s": (2, 6, 6),
    "k": (3, 6, 4),
    "e": (8, 6),
    "b": (6,),
    "c": (),
}
DATA = {"x": (5, 6), "y": (4, 6), "z": (6,)}
SHAPES = PARAMS | DATA

# No value is larger than this.
LARGEST = 400


def custom_square(x: jax.Array) -> jax.Array:
    return jnp.sin(x) * x


own_jvp = jax.custom_jvp(custom_square)
own_jvp.defjvp(lambda p, t: (own_jvp(p[0]), 2.0 * t[0] * jnp.cos(p[0])))
own_vjp = jax.custom_vjp(custom_square)
own_vjp.defvjp(lambda x: (own_vjp(x), x), lambda x, g: (g * jnp.cos(x),))
own_vmap = jax.custom_batching.custom_vmap(custom_square)
own_vmap.def_vmap(lambda size, batched, x: (custom_square(x), batched[0]))

NAMESPACE = {
    "jax": jax,
    "jnp": jnp,
    "lax": lax,
    "np": np,
    "checkpoint_name": checkpoint_name,
    "own_jvp": own_jvp,
    "own_vjp": own_vjp,
    "own_vmap": own_vmap,
}


@dataclasses.dataclass(frozen=True)
class Program:
    """Assignments ``(name, expression)``, and the names that are given back.

    Attributes:
      lines: in order; an expression uses parameters, data and names of lines before it.
      outputs: names.
    """

    lines: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]

    @property
    def source(self) -> str:
        body = "".join(f"    {name} = {expression}\n" for name, expression in self.lines)
        names = "".join(f"{name}, " for name in SHAPES)
        return f"def program({names}):\n{body}    return [{', '.join(self.outputs)}]\n"

    def __repr__(self) -> str:
        return "\n" + self.source

    def up_to(self, name: str) -> "Program":
        """The lines that one name needs, with that name as the output."""
        needed, lines = {name}, []
        for own, expression in reversed(self.lines):
            if own in needed:
                needed |= words(expression)
                lines.append((own, expression))
        return Program(tuple(reversed(lines)), (name,))

    def run(self, values: dict[str, Any], everything: bool = False) -> list[Any]:
        """The outputs for the values of all parameters and data, or the values of all lines."""
        env = dict(NAMESPACE, **values)
        for name, expression in self.lines:
            env[name] = eval(compiled(expression), env)
        names = [name for name, _ in self.lines] if everything else self.outputs
        return [env[name] for name in names]


def words(expression: str) -> set[str]:
    """The names in an expression, and other words."""
    return set("".join(c if c.isalnum() else " " for c in expression).split())


def compiled(expression: str) -> CodeType:
    return compile(expression, "<program>", "eval")


def program_of(*expressions: str) -> Program:
    """The program of some expressions in parameters and data, all of which are outputs."""
    names = tuple(f"a{i}" for i in range(len(expressions)))
    return Program(tuple(zip(names, expressions, strict=True)), names)


# What random choices reach seldom, of parameters themselves: each rule of the interpreter is met.
SELDOM = tuple(
    program_of(*expressions)
    for expressions in (
        ("own_jvp(w)", "own_vjp(w)", "own_vmap(w)", "jax.checkpoint(lambda t: t * 0.5)(w) @ z"),
        ("w.at[0].set(0.0) @ z", "w.at[0].add(c)", "w.at[0].subtract(0.5)", "w.at[0].multiply(2.0)"),
        ("lax.dynamic_update_slice(w, y[:2], (1, 0)) @ z", "lax.dynamic_slice(w, (1, 0), (2, 6))"),
        ("jnp.concatenate([w, 2.0 * w]) @ z", "jnp.stack([w, w]) @ z", "jnp.pad(w, 1) @ jnp.ones(8)"),
        ("jnp.tile(w, 2)", "lax.rev(w, (0,))", "lax.split(w, (1, 3))[1] @ z", "jnp.unstack(v)[0]"),
        ("lax.ragged_dot(x, s, jnp.array([2, 3]))", "lax.reduce_precision(w, 11, 52) @ z"),
        ("jax.grad(lambda t: (jnp.sin(x @ t) @ t).sum())(v)", "lax.optimization_barrier(w) @ z"),
        ("checkpoint_name(w, 'a') @ z", "jnp.array(w) @ z", "lax.stop_gradient(w) @ z", "-w @ z"),
        ("lax.custom_linear_solve(lambda t: v @ t, b, lambda f, r: r + 0.1 * f(r))", "jnp.squeeze(w[:1])"),
        ("jnp.where(x.sum() > 0, w, y) @ z", "(w + y) @ z", "(w - y) @ z", "(w / 2.0) @ z", "w ** 2"),
        ("lax.while_loop(lambda t: t[1] < 2, lambda t: (t[0] @ v, t[1] + 1), (x, 0))[0]", "w.sum(0)"),
        ("lax.cond(x.sum() > 0, lambda: x @ v, lambda: x)", "lax.scan(lambda t, m: (t @ m, None), x, s)[0]"),
        ("jax.grad(lambda t: (t * v + t * s[0]).sum())(v) @ z", "jnp.power(w, 2.0).sum(0)", "(w * w).sum(1)"),
        ("(w.astype(jnp.float32) @ z.astype(jnp.float32)).astype(jnp.float64)", "s.reshape(12, 6) @ z", "jnp.square(w).mean()"),
        ("w[jnp.array([0, 2])] @ z", "lax.conv_general_dilated(x[None], k, (1,), 'SAME', dimension_numbers=('NHC', 'HIO', 'NHC'))"),
        # Squares and reshaped values, which are put off, meet broadcasts along axes of size 1.
        ("(w * w)[None] * jnp.array([0.5, 2.0])[:, None, None]", "(w * w)[:, None] + jnp.ones((4, 3, 6))"),
        ("((w * w)[None] / jnp.array([0.5, 2.0])[:, None, None]).sum((1, 2))", "(w * w)[None] - x[:2, :1, None]"),
        ("(w.reshape(24, 1) + w.reshape(1, 24)).sum(0)", "(w.reshape(24, 1) * w.reshape(1, 24)).sum(1)"),
    )
)  # fmt: skip


# ---------------------------------------------------------------- drawing


class Maker:
    """The names of a program in the making, with their shapes, and the source of choices."""

    def __init__(self, draw: Callable[..., Any]):
        self.draw = draw
        self.avals = {
            name: jax.ShapeDtypeStruct(shape, jnp.float64) for name, shape in SHAPES.items()
        }

    def shape(self, name: str) -> tuple[int, ...]:
        return self.avals[name].shape

    def one(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(options))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def value(self, fits: Callable[[tuple[int, ...]], bool] = lambda shape: True) -> str | None:
        """A name whose shape fits, the parameters first and the newest next to them."""
        names = [name for name in self.avals if fits(self.shape(name))]
        return self.one(names) if names else None

    def like(self, name: str) -> str:
        """A name whose value has the shape of another's, or broadcasts to it."""
        shape = self.shape(name)

        def fits(other: tuple[int, ...]) -> bool:
            tail = shape[len(shape) - len(other) :]
            return len(other) <= len(shape) and all(
                n in (1, m) for n, m in zip(other, tail, strict=True)
            )

        found = self.value(fits)
        return found if found is not None else name

    def axis(self, name: str) -> int:
        return self.number(0, len(self.shape(name)) - 1)

    def axes(self, name: str) -> tuple[int, ...] | None:
        """Some axes of a value, or None for all of them."""
        ndim = len(self.shape(name))
        if not ndim or self.number(0, 3) == 0:
            return None
        return tuple(sorted(self.draw(st.sets(st.integers(0, ndim - 1), min_size=1))))

    def add(self, expression: str) -> str | None:
        """Assigns an expression to a new name, unless its value is too large."""
        names, avals = list(self.avals), list(self.avals.values())

        def fn(*values: Any) -> Any:
            return eval(compiled(expression), NAMESPACE | dict(zip(names, values, strict=True)))

        try:
            out = jax.eval_shape(fn, *avals)
        except (NotImplementedError, TypeError, ValueError):
            return None  # JAX itself refuses it, as the gradient of what has none
        if out.size > LARGEST or len(out.shape) > 5 or out.size == 0:
            return None
        name = f"a{len(self.avals) - len(SHAPES)}"
        self.avals[name] = out
        return expression
