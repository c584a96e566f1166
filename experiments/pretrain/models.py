"""The language models that can be pretrained, behind one set of functions of a stream's state."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num, PyTree, UInt8

from eggroll.plan import Dense, Frozen, Matrix, Nodes, Overrides, Planner, by_shape
from experiments.models import egg, gru
from experiments.models import transformer as llama
from experiments.pretrain.config import Config


class Head(NamedTuple):
    """The last matrix of a model: its error is known without a pass backwards.

    Attributes:
        name: of the parameter.
        errors: (matrix, what it receives [N, m], next bytes [N]) -> the derivatives of the N losses by what
            comes out of the product; in integers 127 * 2^7 times those.
    """

    name: str
    errors: Callable[[Array, Array, Int[Array, "N"]], Num[Array, "N 256"]]


class Model(NamedTuple):
    """What training and measuring need to know of a model; all of one stream, to be mapped over many.

    A `experiments.models.family.Family` is something else: its models answer prompts. Here the loss carries a
    state from one piece of a stream to the next, may be in integers, and the error of the head is known.

    Attributes:
        init: key -> parameters.
        plan: which noise each parameter gets.
        state: what a stream carries at its beginning.
        loss: (parameters, state, tokens [T + 1]) -> (next state, sum over T predictions) in `unit`.
        losses: as `loss`, but the loss of each prediction [T], and with what the head received [T, m].
        head: of the model.
        nodes: the treatments of parameters under node noise, where they are not that of all.
        unit: of the loss, to a bit.
        bits: (parameters, tokens [T + 1]) -> figures [T] of each prediction, "bits_per_byte" by softmax.
        writer: what sampling carries at its beginning.
        write: (parameters, writer, byte) -> (next writer, logits in bits of the byte after it).
    """

    init: Callable[[Key[Array, ""]], PyTree]
    plan: Planner
    state: PyTree
    loss: Callable[[PyTree, PyTree, Int[Array, "tokens"]], tuple[PyTree, Array]]
    losses: Callable[
        [PyTree, PyTree, Int[Array, "tokens"]], tuple[PyTree, Num[Array, "T"], Num[Array, "T m"]]
    ]
    head: Head
    nodes: Overrides
    unit: int
    bits: Callable[[PyTree, Int[Array, "tokens"]], dict[str, Array]]
    writer: PyTree
    write: Callable[[PyTree, PyTree, Int[Array, ""]], tuple[PyTree, Float[Array, "256"]]]


def make_model(config: Config) -> Model:
    """The model that the settings describe."""
    if config.model == "egg":
        return integers(config)
    return attention(config) if config.model == "transformer" else recurrent(config)


def bits_of(
    logits: Float[Array, "*batch 256"], target: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Cross-entropy in bits of logits in bits."""
    chosen = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
    ln2 = jnp.log(2.0)
    return jax.nn.logsumexp(logits * ln2, axis=-1) / ln2 - chosen


def slope_of(
    logits: Float[Array, "*batch 256"], target: Int[Array, "*batch"]
) -> Float[Array, "*batch 256"]:
    """The derivative of `bits_of` by its logits: the softmax minus the one-hot target."""
    return jax.nn.softmax(logits * jnp.log(2.0)) - jax.nn.one_hot(target, 256)


# Gains of norms, which a byte's loss says little about, stay as they are under node noise.
STACK_NODES: Overrides = {"layers/ln*": Frozen(), "ln": Frozen()}


def integers(config: Config) -> Model:
    """EGG, in int8; its logits and its loss count sixteenths of a bit."""
    shape = egg.Config(layers=config.layers, width=config.width)
    begin = egg.initial_state(shape)

    def bits(params: PyTree, tokens: Array) -> dict[str, Array]:
        def one(state: Array, pair: tuple[Array, Array]) -> tuple[Array, dict[str, Array]]:
            state, logits = egg.step(params, state, pair[0])
            whole = egg.loss(logits, pair[1]) / 16
            return state, {
                "bits_per_byte": egg.exact_bits(logits, pair[1]),
                "integer_bits_per_byte": whole,
            }

        tokens = tokens.astype(jnp.int32)
        return jax.lax.scan(one, begin, (tokens[:-1], tokens[1:]))[1]

    def losses(params: PyTree, state: Array, tokens: Array) -> tuple[Array, Array, Array]:
        def one(state: Array, pair: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            state, x = egg.read(params, state, pair[0])
            return state, (egg.loss(egg.predict(params["head"], x), pair[1]), x)

        tokens = tokens.astype(jnp.int32)
        state, (each, inputs) = jax.lax.scan(one, state, (tokens[:-1], tokens[1:]))
        return state, each, inputs

    def errors(head: Array, x: Array, targets: Array) -> Array:
        return jax.vmap(lambda x, byte: egg.error(egg.predict(head, x), byte))(x, targets)

    def write(params: PyTree, state: Array, byte: Array) -> tuple[Array, Array]:
        state, logits = egg.step(params, state, byte)
        return state, logits / 16

    return Model(
        init=lambda key: egg.init(key, shape),
        plan=egg.plan(),
        state=begin,
        loss=egg.sequence,
        losses=losses,
        head=Head("head", errors),
        nodes=STACK_NODES,
        unit=16,
        bits=bits,
        writer=begin,
        write=write,
    )


def recurrent(config: Config) -> Model:
    """The recurrent models in float32."""
    shape = gru.GRUConfig(
        layers=config.layers,
        width=config.width,
        gates="clip" if config.model == "float-egg" else "smooth",
    )

    def run(params: PyTree, state: PyTree, tokens: Array) -> tuple[PyTree, Float[Array, "tokens"]]:
        def one(state: PyTree, pair: tuple[Array, Array]) -> tuple[PyTree, Array]:
            state, logits = gru.step(params, state, pair[0], shape)
            return state, bits_of(logits, pair[1])

        tokens = tokens.astype(jnp.int32)
        return jax.lax.scan(one, state, (tokens[:-1], tokens[1:]))

    def loss(params: PyTree, state: PyTree, tokens: Array) -> tuple[PyTree, Array]:
        state, bits = run(params, state, tokens)
        return state, bits.sum()

    def losses(params: PyTree, state: PyTree, tokens: Array) -> tuple[PyTree, Array, Array]:
        def one(state: PyTree, pair: tuple[Array, Array]) -> tuple[PyTree, tuple[Array, Array]]:
            state, x = gru.read(params, state, pair[0], shape)
            return state, (bits_of(gru.predict(params["head"], x), pair[1]), x)

        tokens = tokens.astype(jnp.int32)
        state, (each, inputs) = jax.lax.scan(one, state, (tokens[:-1], tokens[1:]))
        return state, each, inputs

    def errors(head: Array, x: Array, targets: Array) -> Array:
        return slope_of(gru.predict(head, x), targets) / config.width**0.5

    begin = gru.initial_state(shape)
    return Model(
        init=lambda key: gru.init(key, shape),
        plan=egg.plan(),  # of the same names
        state=begin,
        loss=loss,
        losses=losses,
        head=Head("head", errors),
        # A product is divided by the root of its length, after the noise.
        nodes={
            **STACK_NODES,
            "layers/w*": Nodes(config.width**0.5),
            "layers/u*": Nodes(config.width**0.5),
            "layers/w2": Nodes(2 * config.width**0.5),
            "head": Nodes(config.width**0.5),
        },
        unit=1,
        bits=lambda params, tokens: {"bits_per_byte": run(params, begin, tokens)[1]},
        writer=begin,
        write=lambda params, state, byte: gru.step(params, state, byte, shape),
    )


def attention(config: Config) -> Model:
    """The transformer: no state is carried, every window of text is read by itself."""
    shape = llama.TransformerConfig(
        vocab_size=256,
        hidden_size=config.width,
        # With two thirds of the usual 4, three matrices are of the size of the recurrent models' two.
        intermediate_size=8 * config.width // 3,
        num_hidden_layers=config.layers,
        num_attention_heads=max(1, config.width // 32),
    )
    context, half = config.tokens, -(-config.tokens // 2)

    def logits_of(params: PyTree, tokens: Array) -> Float[Array, "*batch tokens 256"]:
        return llama.apply(params, tokens, shape) / jnp.log(2.0)

    def loss(params: PyTree, state: PyTree, tokens: Array) -> tuple[PyTree, Array]:
        tokens = tokens.astype(jnp.int32)
        return state, bits_of(logits_of(params, tokens[:-1]), tokens[1:]).sum()

    def losses(params: PyTree, state: PyTree, tokens: Array) -> tuple[PyTree, Array, Array]:
        tokens = tokens.astype(jnp.int32)
        x = llama.features(params, tokens[:-1], shape)
        return state, bits_of(x @ params["lm_head"] / jnp.log(2.0), tokens[1:]), x

    def errors(head: Array, x: Array, targets: Array) -> Array:
        return slope_of(x @ head / jnp.log(2.0), targets) / jnp.log(2.0)

    def bits(params: PyTree, tokens: Array) -> dict[str, Array]:
        """By overlapping windows: but for the first ones, every byte has half a context before it."""
        tokens, count = tokens.astype(jnp.int32), tokens.shape[0] - 1
        windows = max(1, -(-(count - half) // half))
        tokens = jnp.pad(tokens, (0, (windows + 1) * half - count))
        at = half * jnp.arange(windows)[:, None] + jnp.arange(2 * half + 1)
        costs = bits_of(logits_of(params, tokens[at][:, :-1]), tokens[at][:, 1:])
        return {
            "bits_per_byte": jnp.concatenate([costs[0, :half], costs[:, half:].ravel()])[:count]
        }

    def write(params: PyTree, seen: tuple[Array, Array], byte: Array) -> tuple[Any, Array]:
        text, count = seen
        text = jnp.where(count < context, text, jnp.roll(text, -1))
        count = jnp.minimum(count + 1, context)
        text = text.at[count - 1].set(byte)
        return (text, count), logits_of(params, text)[count - 1]

    return Model(
        init=lambda key: llama.init(key, shape),
        plan=by_shape(
            {"layers/*_proj": Matrix(rows=1, columns=2, batch=0), "layers/*norm": Dense()}
        ),
        state=(),
        loss=loss,
        losses=losses,
        head=Head("lm_head", errors),
        # Outputs are as much smaller than one as the matrices are at the start.
        nodes={
            "embed_tokens": Nodes(shape.initializer_range),
            "layers/*_proj": Nodes(shape.initializer_range * config.width**0.5),
            "layers/down_proj": Nodes(shape.initializer_range * shape.intermediate_size**0.5),
            "lm_head": Nodes(shape.initializer_range * config.width**0.5),
            **{name: Frozen() for name in ("layers/*norm", "norm")},
        },
        unit=1,
        bits=bits,
        writer=(jnp.zeros(context, jnp.int32), jnp.int32(0)),
        write=write,
    )


def sample(
    model: Model,
    params: PyTree,
    key: Key[Array, ""],
    length: int,
    prompt: bytes = b"",
    temperature: float = 1.0,
) -> bytes:
    """A text of the model's own.

    Args:
        model: that writes.
        params: its parameters.
        key: decides the text.
        length: bytes to write.
        prompt: bytes that the text begins with; they do not count.
        temperature: of sampling; 0 takes the likeliest byte.
    """
    given = jnp.array([0, *prompt], jnp.int32)
    # A very low temperature: the likeliest byte, or one of several that are.
    sharpness = jnp.float32(1 / max(temperature, 1e-6))
    drawn = _sample(model.write, params, model.writer, key, given, sharpness, length)
    return bytes(jax.device_get(drawn))


@functools.partial(jax.jit, static_argnums=(0, 6))
def _sample(
    write: Callable[..., Any],
    params: PyTree,
    writer: PyTree,
    key: Array,
    given: Array,
    sharpness: Array,
    length: int,
) -> UInt8[Array, "length"]:
    def one(carry: tuple[PyTree, Array], t: Array) -> tuple[tuple[PyTree, Array], Array]:
        writer, byte = carry
        writer, logits = write(params, writer, byte)
        nats = logits * jnp.log(2.0) * sharpness
        drawn = jax.random.categorical(jax.random.fold_in(key, t), nats)
        known = given[jnp.minimum(t + 1, len(given) - 1)]
        byte = jnp.where(t + 1 < len(given), known, drawn.astype(jnp.int32))
        return (writer, byte), byte.astype(jnp.uint8)

    steps = jnp.arange(len(given) - 1 + length)
    return jax.lax.scan(one, (writer, given[0]), steps)[1][len(given) - 1 :]
