"""Perturbed values of any form, and their comparison with the arrays that they stand for."""

import contextlib
import functools
import math
import zlib

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from eggroll.interpret import interpreter
from eggroll.interpret.interpreter import Context, interpret
from eggroll.values.lowrank import LowRank, Upcast, build

SCALE = 0.3


def normal(shape, name="x", dtype=np.float64):
    """Samples that depend on the name and the shape alone."""
    seed = zlib.crc32(f"{name}{tuple(shape)}".encode())
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def low_rank(shape, columns=(-1,), batch=(), rank=2, path="w", dtype=jnp.float64):
    """A LowRank of the shape: ``columns`` are one factor's axes, ``batch`` both, the rest the other's."""
    shape, ndim = tuple(shape), len(shape)
    columns = {axis % ndim for axis in columns}
    rows = set(range(ndim)) - columns - {axis % ndim for axis in batch}
    factors = tuple(
        jnp.asarray(
            normal([rank, *(1 if a in absent else n for a, n in enumerate(shape))], path + name),
            dtype,
        )
        for name, absent in (("a", columns), ("b", rows))
    )
    scale = jnp.asarray(SCALE, jnp.promote_types(dtype, jnp.float32))
    return LowRank(jnp.asarray(normal(shape, path), dtype), factors, scale, (path,))


def wide(shape, path="v", dtype=jnp.bfloat16):
    """A narrow parameter with dense noise."""
    return Upcast(jnp.asarray(normal(shape, path), jnp.float32), jnp.dtype(dtype))


# In tables of cases values are named before there is a test to make them in.
def matrix(*shape, **how):
    return functools.partial(low_rank, shape, **how)


def data(*shape, name="x"):
    return functools.partial(normal, shape, name)


def cases(*table):
    """Parametrises a test over (name, function, what makes its arguments)."""
    return pytest.mark.parametrize(
        ("fn", "makers"), [pytest.param(fn, makers, id=name) for name, fn, *makers in table]
    )


def built(value):
    return build(value) if isinstance(value, LowRank) else value


def close(got, expected, tolerance=1e-9):
    def check(a, b):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    jax.tree.map(check, got, expected)


def member(args, sign, own=False):
    """The arguments as the member of a sign sees them; ``own`` arrays differ between members."""
    data = lambda x: x * (1 + 0.25 * sign) if own else x
    return [a.replace(scale=sign * a.scale) if isinstance(a, LowRank) else data(a) for a in args]


def agree(fn, *args, on_dense="error", own=False):
    """Asserts that ``fn`` gives on perturbed values what it gives on built ones, for both signs.

    Returns:
      For each parameter path the primitives that it was built for.
    """
    context = Context(on_dense)

    def both(sign):
        signed = member(args, sign, own)
        return interpret(fn, context)(*signed), fn(*map(built, signed))

    close(*jax.jit(jax.vmap(both))(jnp.array([1.0, -1.0])))
    return context.built


def run_case(fn, makers, **how):
    return agree(fn, *(make() for make in makers), **how)


def all_equations(fn, *args):
    """The equations of a traced function, those of inner jaxprs too."""

    def of(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn
            for param in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(param, "eqns"):
                    yield from of(param)

    return list(of(jax.make_jaxpr(fn)(*args)))


def largest_of_a_member(fn, makers, own=False, members=6):
    """The largest number of entries that one member has of any array in the traced program."""
    args = [make() for make in makers]
    run = lambda sign: interpret(fn, Context("ignore"))(*member(args, sign, own))
    arrays = [
        out.aval
        for eqn in all_equations(jax.vmap(run), jnp.linspace(-1.0, 1.0, members))
        for out in eqn.outvars
    ]
    return max(math.prod(a.shape) // members for a in arrays if members in a.shape)


@contextlib.contextmanager
def checked_in_float64():
    """Float64 on; every value that an equation gives has the shape and type that it says."""
    plain = interpreter.step

    def step(context, eqn, values):
        outs = plain(context, eqn, values)
        for out, var in zip(outs, eqn.outvars, strict=True):
            assert jnp.shape(out) == var.aval.shape, eqn
            assert out.dtype == var.aval.dtype, eqn
        return outs

    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "step", step)
        yield


@contextlib.contextmanager
def as_users_run_it():
    """Without the checks of types that the tests add, which would refuse these arguments first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
