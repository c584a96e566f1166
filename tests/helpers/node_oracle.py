"""A second computation of the sums of node noise, by JAX's own gradients, and its comparison.

The library forms the sums with its transposes, carries them through scans and loops, and adds up members
under ``vmap``. The oracle does none of this. It unrolls every loop, enters every branch, and at every
site adds ``<credit * noise, output>`` to a scalar, where the output is computed from the parameters and
from the mean inputs of the pair, held constant. The gradient of the scalar is what the sums must be.
"""

import contextlib
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import eggroll
from eggroll.interpret import control_flow
from eggroll.interpret.interpreter import Context, interpret
from eggroll.interpret.node_pass import NodePass, Rows
from eggroll.nodes import FloatNodes, node_pass
from eggroll.noise import seed_words
from eggroll.values.lowrank import LowRank, Upcast
from eggroll.values.node import root

SIGMA = 0.1
SEED = seed_words(jax.random.key(7))
ARITHMETIC = FloatNodes(jnp.float32(SIGMA))
# While loops are unrolled to this many steps at most.
STEPS = 12


class Scalar:
    """What the sites add to, and whether the equations at hand are run."""

    def __init__(self):
        self.terms, self.masks, self.finished = [], [], []

    def add(self, term):
        for mask in self.masks:
            term = jnp.where(mask, term, 0)
        self.terms.append(term)


@dataclasses.dataclass(frozen=True)
class Oracle(NodePass):
    """A pass that adds to a scalar where the library's pass sums; in loops that are unrolled."""

    scalar: Scalar = dataclasses.field(default_factory=Scalar)

    @property
    def sums(self):
        return False

    def site(self, name, y, node, paths, sigma, fan_in, certain, possible):
        out = super().site(name, y, node, paths, sigma, fan_in, certain, possible)
        (part,) = self.region.noise[id(out)][1] if id(out) in self.region.noise else (None,)
        if part is None:
            return out
        noise = self.draw(
            f"{'+'.join(paths)}@{name}", tuple(x.index for x in self.loops), y.shape, y.dtype
        )
        at = self._row_of(y.shape, certain, possible, paths) if self.rows else None
        weighed = self.arithmetic.weigh(self._credit(at, y.ndim), noise)
        part = dataclasses.replace(part, weighed=weighed)
        self.region.noise[id(out)] = (out, (part,))
        self.weigh(node, self.arithmetic.cotangent([(weighed, sigma)]))
        return out

    def share(self, y, out, node):
        parts = self.carried(y)
        if parts:
            weighed = [(p.weighed, p.amplitude) for p in parts]
            self.weigh(node, self.arithmetic.cotangent(weighed))
            self.region.noise[id(out)] = (out, parts)
        return bool(parts)

    def weigh(self, node, cotangent):
        roots, fn, captured = node
        held = jax.tree.map(lambda x: lax.stop_gradient(of_pair(x)), captured)
        y = fn(tuple(self.region._arrays[i] for i in roots), held)
        self.scalar.add(jnp.vdot(lax.stop_gradient(cotangent).astype(y.dtype), y))


def is_float(x):
    return isinstance(x, jax.Array | np.ndarray) and jnp.issubdtype(x.dtype, jnp.floating)


def of_pair(x):
    """The mean of data over the pair; indices stay as they are."""
    return lax.pmean(x, "pair") if is_float(x) else x


@contextlib.contextmanager
def unrolled(scalar):
    """Control flow of the interpreter without loops and branches of JAX."""

    def scan(body, carry, xs, length, reverse=False, unroll=1):
        ys = [None] * length
        for i in reversed(range(length)) if reverse else range(length):
            carry, ys[i] = body(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)

    def while_loop(holds, body, state):
        on = jnp.array(True)
        for _ in range(STEPS):
            on = on & holds(state)
            scalar.masks.append(on)
            new = body(state)
            scalar.masks.pop()
            choose = lambda a, b, on=on: a if a is b else jnp.where(on, a, b)
            state = jax.tree.map(choose, new, state)
        scalar.finished.append(~(on & holds(state)))
        return state

    def switch(index, branches):
        index = jnp.clip(jnp.asarray(index).astype(jnp.int32), 0, len(branches) - 1)
        outs = []
        for k, branch in enumerate(branches):
            scalar.masks.append(index == k)
            outs.append(branch())
            scalar.masks.pop()
        return jax.tree.map(lambda *each: lax.select_n(index, *each), *outs)

    def eval_shape(fn, *args):
        kept = list(scalar.terms), list(scalar.finished)
        out = jax.eval_shape(fn, *args)
        scalar.terms[:], scalar.finished[:] = kept
        return out

    with pytest.MonkeyPatch.context() as patch:
        mine = dict(scan=scan, while_loop=while_loop, switch=switch)
        patch.setattr(control_flow, "lax", types.SimpleNamespace(**{**vars(lax), **mine}))
        patch.setattr(
            control_flow, "jax", types.SimpleNamespace(**{**vars(jax), "eval_shape": eval_shape})
        )
        yield


def parameters(args, pass_):
    """The arguments with LowRank and Upcast values in the place of parameters with node noise."""
    count = 0
    out = []
    for x in args:
        if isinstance(x, LowRank | Upcast):
            w = x.w if isinstance(x, LowRank) else x.value.astype(x.dtype)
            out.append(pass_.region.adopt(root(w, 0, (f"p{count}",), 1.0)))
            count += 1
        else:
            out.append(x)
    return out


def weights_of(args):
    return [
        x.w if isinstance(x, LowRank) else x.value.astype(x.dtype)
        for x in args
        if isinstance(x, LowRank | Upcast)
    ]


def with_weights(args, weights):
    """The arguments with other arrays as the parameters."""
    given = iter(weights)
    return [
        x.replace(w=next(given)) if isinstance(x, LowRank)
        else Upcast(next(given), x.dtype) if isinstance(x, Upcast)
        else x
        for x in args
    ]  # fmt: skip


def credits(pairs, rows):
    rng = np.random.default_rng(5)
    return jnp.asarray(rng.normal(size=(pairs, rows))), jnp.asarray(rng.normal(size=pairs))


def own_data(args, sign, own):
    """Data that differs between the members of a pair, if ``own``."""
    if not own:
        return args
    return [
        x * (1 + 0.25 * sign) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x
        for x in args
    ]


def library(fn, args, rows, pairs=2, own=False):
    """Outputs ``[pairs, 2, ...]`` of the first pass and the sums of the second."""
    signs = jnp.array([1.0, -1.0], jnp.float32)
    noise, epoch = eggroll.noise.counter(), jnp.int32(0)
    c, whole = credits(pairs, rows)

    def run(sign, pair, credit):
        given = () if credit is None else (Rows(rows, pick=0), *credit)
        p = node_pass(ARITHMETIC, noise, SEED, epoch, pair, sign, *given)
        out = interpret(fn, Context("ignore", nodes=p))(*own_data(parameters(args, p), sign, own))
        return (out, None) if credit is None else (out, p.region.sums())

    ids = jnp.arange(pairs)
    first = lambda pair: jax.vmap(lambda sign: run(sign, pair, None)[0])(signs)
    outs = jax.vmap(first)(ids)

    def second(pair, credit):
        return jax.vmap(lambda sign: run(sign, pair, credit)[1], out_axes=None)(signs)

    return outs, jax.vmap(second, out_axes=None)(ids, (c, whole))


def oracle(fn, args, rows, pairs=2, own=False):
    """The same by the gradient of the scalar."""
    noise, epoch = eggroll.noise.counter(), jnp.int32(0)
    c, whole = credits(pairs, rows)
    how = eggroll.nodes

    def run(weights, sign, pair, credit):
        scalar = Scalar()
        draw = how._draw(noise, SEED, epoch, pair)
        p = Oracle(draw, ARITHMETIC, sign, pair, Rows(rows, pick=0), *credit, scalar=scalar)
        here = own_data(parameters(with_weights(args, weights), p), sign, own)
        with unrolled(scalar):
            out = interpret(fn, Context("ignore", nodes=p))(*here)
        total = sum(scalar.terms, jnp.zeros(()))
        finished = jnp.stack([jnp.array(True), *map(jnp.all, scalar.finished)]).all()
        return total, (out, finished)

    weights = weights_of(args)

    def of_pair_(pair, credit):
        signs = jnp.array([1.0, -1.0], jnp.float32)
        of = jax.grad(run, has_aux=True)
        grads, (out, finished) = jax.vmap(lambda s: of(weights, s, pair, credit), axis_name="pair")(
            signs
        )
        return out, jax.tree.map(lambda x: x.mean(0), grads), finished

    outs, grads, finished = jax.vmap(of_pair_)(jnp.arange(pairs), (c, whole))
    return outs, jax.tree.map(lambda x: x.sum(0), grads), finished.all()


# Relative and absolute errors by the bytes of an entry.
TOLERANCE = {8: 1e-9, 4: 1e-4, 2: 0.05}


def compare(fn, *args, rows=3, own=False, tolerance=None):
    """Asserts that the library's sums are the oracle's; returns the sums.

    What the function gives must be the same too, and the sums finite (some functions fill with NaN).
    """
    both = jax.jit(lambda: (library(fn, args, rows, own=own), oracle(fn, args, rows, own=own)))
    (outs, sums), (expected, grads, finished) = both()
    assert finished, "a while loop has more steps than the oracle unrolls"

    floats = [x for x in [*weights_of(args), *jax.tree.leaves(outs)] if is_float(x)]
    if tolerance is None:
        tolerance = TOLERANCE[min(x.dtype.itemsize for x in floats)]

    def close(a, b):
        assert a.shape == b.shape
        if is_float(a):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    jax.tree.map(close, outs, expected)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(sums))
    jax.tree.map(close, sums, grads)
    return sums


def run_case(fn, makers, **how):
    """As :func:`compare`; data that the function closes over become arguments."""
    args = [make() for make in makers]
    fn, args = lifted(fn, args)
    return compare(fn, *args, **how)


def lifted(fn, args):
    """``fn`` with the arrays that it closes over as further arguments, and those arrays.

    Tables of cases close over their data. Under node noise that would make a product one of constants.
    """
    plain = [x.w if isinstance(x, LowRank) else x for x in args]
    plain = [x.value.astype(x.dtype) if isinstance(x, Upcast) else x for x in plain]
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*plain)
    data = [np.asarray(c) for c in closed.consts]
    count = len(plain)

    def of_all(*given):
        outs = jax.core.eval_jaxpr(closed.jaxpr, given[count:-1], *given[:count])
        # Times one, which makes a function of parameters alone a product with data.
        outs = [o * given[-1].astype(o.dtype) if o.dtype.kind == "f" else o for o in outs]
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return of_all, [*args, *data, np.ones(())]
