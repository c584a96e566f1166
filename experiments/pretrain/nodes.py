"""Node noise over streams of text: every byte that a pair reads is a trial of its own."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, Num, PyTree

import eggroll
from eggroll import integer
from eggroll.values.fixed_point import isqrt
from experiments.pretrain.config import Config
from experiments.pretrain.evolution import ByEvolution, integer_rule
from experiments.pretrain.models import Head, Model
from experiments.run.devices import ONE, Layout
from experiments.run.learners import row_of, strategy

# Bytes a device for what the products of a transformer received, from the first pass to the second: a
# quarter of its time. Recurrent models keep nothing.
KEPT = 2**28


class ByNodeNoise(ByEvolution):
    """A population whose noise is on what comes out of products, anew for every byte.

    The head needs no noise: its error, the softmax minus the byte that came, is known at once, and its
    gradient is exact.

    Args:
        config: the settings.
        model: what is trained.
        layout: the devices.
    """

    def __init__(self, config: Config, model: Model, layout: Layout = ONE) -> None:
        super().__init__(config, model, layout)
        self._gather = layout.gather if layout.same_bits else lambda tree: tree

    def _strategy(self, layout: Layout) -> eggroll.EvolutionStrategy:
        return node_strategy(self._config, self._model, layout)

    def _make_fitness(self) -> Any:
        return make_fitness(self._model)

    def _update(self, state: Any, members: Any) -> tuple[Any, PyTree, dict[str, Array | None]]:
        """Two passes over the same bytes with the same noise: losses, then what they say of products."""
        (scores, (hidden, inputs)), grads = self._es.value_and_gradient(
            state, self._fitness, members=members
        )
        if self._config.head == "local":
            head, tokens = self._model.head, members[1]
            weights, inputs, targets = self._gather(
                (state.params[head.name], inputs, tokens[:, 1:].astype(jnp.int32))
            )
            grads[head.name] = head_gradient(head, weights, inputs, targets)
        before = state
        state, metrics = self._es.apply_gradient(state, grads)
        of_member = scores.mean(1)
        row = row_of(metrics, self._es, before) | {
            "fitness_mean": of_member.mean(),
            "fitness_best": of_member.max(),
            "fitness_worst": of_member.min(),
            "fitness_std": of_member.std(),
            "invalid": jnp.sum(~jnp.isfinite(of_member)),
            "identical_pairs": jnp.sum(jnp.all(scores[0::2] == scores[1::2], axis=1)),
            "train_bits_per_byte": -of_member.mean() / self._model.unit,
        }
        return state, hidden, row


def make_fitness(model: Model) -> Any:
    """What a member is scored by: minus the loss of each byte, beside its next hidden state and what
    its head received."""

    def fitness(params: PyTree, key: Key[Array, ""], member: Any) -> tuple[Array, PyTree]:
        hidden, losses, inputs = model.losses(params, *member)
        return -losses, (hidden, inputs)

    return fitness


def head_gradient(
    head: Head,
    weights: Num[Array, "m 256"],
    inputs: Num[Array, "population T m"],
    targets: Int[Array, "population T"],
) -> Num[Array, "m 256"]:
    """The derivative of the mean loss by the head, over all members and bytes.

    Of integers it is divided, entry by entry, by the deviation that it has if inputs and errors are
    independent, and is in the units of :func:`integer.threshold`.
    """
    population, count, _ = inputs.shape
    if jnp.issubdtype(weights.dtype, jnp.floating):
        one = lambda x, errors: x.T @ errors / (population * count)
        return sum_over_bytes(head, weights, inputs, targets, one)
    # A product of two int8 is below 2^14, and sums of them must stay below 2^31.
    shift = max(0, (population * count - 1).bit_length() - 17)

    def products(x: Array, errors: Array) -> tuple[Array, Array, Array]:
        squares = lambda y: jnp.sum(jnp.square(y.astype(jnp.int32)), 0, dtype=jnp.int32)

        def times(part: Array) -> Array:
            return jax.lax.dot(x.T, part.astype(jnp.int8), preferred_element_type=jnp.int32)

        # Errors have 15 bits: the upper eight, in whose unit all sums are, and the lower seven.
        upper, lower = errors >> 7, errors & 127
        total = times(upper) + ((times(lower) + 64) >> 7)
        mixed = jnp.sum(upper * lower, 0, dtype=jnp.int32)
        of_errors = squares(upper) + ((mixed + 32) >> 6) + ((squares(lower) + 2**13) >> 14)
        return total >> shift, squares(x) >> shift, of_errors >> shift

    total, x_squares, squares = sum_over_bytes(head, weights, inputs, targets, products)
    return significance(total, x_squares, squares, population, count)


def sum_over_bytes(
    head: Head, weights: Array, inputs: Array, targets: Array, fn: Callable[[Array, Array], PyTree]
) -> PyTree:
    """The sum of ``fn(inputs, errors)`` over the bytes that members read, for all members at a time."""

    def one(total: PyTree, at: tuple[Array, Array]) -> tuple[PyTree, None]:
        x, target = at
        return jax.tree.map(jnp.add, total, fn(x, head.errors(weights, x, target))), None

    by_byte = (inputs.swapaxes(0, 1), targets.T)
    first = jax.tree.map(lambda x: x[0], by_byte)
    like = jax.eval_shape(lambda at: fn(at[0], head.errors(weights, *at)), first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return jax.lax.scan(one, zeros, by_byte)[0]


def significance(
    total: Int[Array, "m 256"],
    x_squares: Int[Array, "m"],
    error_squares: Int[Array, "256"],
    population: int,
    count: int,
) -> Int[Array, "m 256"]:
    """A sum of products over its deviation, in the ``16 * 16 sqrt(pairs)`` that the threshold expects.

    The deviation is ``sqrt(2 x_squares error_squares / (population count))``: the two members of a pair,
    which read the same, are one observation.
    """
    # The correlation of inputs and errors, in 2^-16: both roots are below 2^16, and a total is at most
    # their product.
    part = over(over(total, isqrt(x_squares)[:, None]), isqrt(error_squares))
    # Times population sqrt(count) / 2^9, by ten bits of it.
    factor = population * math.isqrt(count << 8)
    bits = max(0, factor.bit_length() - 10)
    scaled = part * (factor >> bits)
    return scaled >> (13 - bits) if bits < 13 else scaled << (bits - 13)


def over(x: Int[Array, "m n"], by: Int[Array, "..."]) -> Int[Array, "m n"]:
    """``256 x / by``, rounded towards zero."""
    by = jnp.broadcast_to(jnp.maximum(by, 1), x.shape)
    whole = jax.lax.div(x, by)
    return (whole << 8) + jax.lax.div((x - whole * by) << 8, by)


def node_strategy(config: Config, model: Model, layout: Layout) -> eggroll.EvolutionStrategy:
    """The strategy: a score for every byte, and the products that are told of it."""
    given = {model.head.name: eggroll.Given()} if config.head == "local" else {}
    settings: dict[str, Any] = dict(
        perturb="nodes",
        rows=config.tokens,
        credit=eggroll.credit.causal(config.gamma),
        plan=eggroll.plan.by_shape({**model.nodes, **given}),
        factor_memory=KEPT,
    )
    if config.model == "egg":
        # Sums differ in size from input to input: each is measured by its own row.
        others = lambda params: {name: name not in given for name in params}
        rule = optax.chain(optax.masked(integer.by_rows(), others), integer_rule(config))
        return integer.strategy(
            population=config.evolution.population,
            optimizer=rule,
            shift=config.shift,
            chunk=config.evolution.chunk,
            mesh=layout.mesh,
            deterministic=layout.same_bits,
            **settings,
        )
    return strategy(config.evolution, config.optimizer, layout, on_dense="warn", **settings)
