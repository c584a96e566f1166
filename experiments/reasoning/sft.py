"""Supervised fine-tuning: the likelihood of right completions, raised by backpropagation or by ES.

It is the warm start before rewards are learned from. `log_probs`, `accumulate` and `optimizer_of` are
also what GRPO is made of, and the scores at the end are the same aims as a fitness of one member.

Weights narrower than float32 are trained through float32 copies (`master_weights`): a step of 1e-5 is
lost on a bfloat16 near 1, where the next number is 8e-3 away.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from eggroll.plan import leaf_paths
from eggroll.values.lowrank import is_narrow
from experiments.reasoning.language_model import LanguageModel
from experiments.run.optimizers import make_optimizer

Update = Callable[..., tuple[PyTree, Any, dict[str, Array]]]


class Packed(NamedTuple):
    """Texts of one length.

    Attributes:
        tokens: int32, prompt and completion, padded behind their end.
        mask: true for the tokens of completions.
    """

    tokens: Int[Array | np.ndarray, "sequences length"]
    mask: Bool[Array | np.ndarray, "sequences length"]

    @property
    def longest(self) -> int:
        """Tokens of the longest completion, or a few more, so that few numbers are compiled."""
        return room(int(np.asarray(self.mask).sum(-1).max(initial=1)))


class Backward(NamedTuple):
    """How a gradient is computed: what bounds its time and memory, and changes nothing else.

    Attributes:
        micro_batch: sequences that are differentiated at a time; all by default.
        longest: no completion has more tokens, so that the logits of other places are left out; None where
            that is not known.
        remat: what is inside the model's layers is computed again instead of held.

    Raises:
        ValueError: (when used) for a micro_batch that does not divide the sequences.
    """

    micro_batch: int | None = None
    longest: int | None = None
    remat: bool = False


# All at once, with everything held.
PLAIN = Backward()


def pack(
    examples: Sequence[tuple[Sequence[int], Sequence[int]]],
    length: int,
    end: int | None = None,
    pad: int = 0,
) -> Packed:
    """Prompts and their completions, padded to one length.

    Args:
        examples: the tokens of each prompt and of its completion.
        length: tokens of the longest, or more.
        end: is put behind every completion, and learned as a part of it; None where those that ended have
            it already.
        pad: fills up; it is never looked at.

    Raises:
        ValueError: for an example without a prompt, whose first token would follow nothing, or one that is
            longer.

    Example:
        >>> tokens, mask = pack([([5, 6], [7]), ([8], [])], length=5, end=1)
        >>> print(tokens, mask.astype(int), sep="\\n")
        [[5 6 7 1 0]
         [8 1 0 0 0]]
        [[0 0 1 1 0]
         [0 1 0 0 0]]
    """
    tokens = np.full((len(examples), length), pad, np.int32)
    mask = np.zeros((len(examples), length), bool)
    for i, (prompt, completion) in enumerate(examples):
        whole = [*prompt, *completion] + ([] if end is None else [end])
        if not len(prompt):
            raise ValueError(f"example {i} has an empty prompt: give it one token at least")
        if len(whole) > length:
            raise ValueError(
                f"example {i} has {len(whole)} tokens, where length is {length}: leave it out, cut it, or "
                "choose a greater length"
            )
        tokens[i, : len(whole)] = whole
        mask[i, len(prompt) : len(whole)] = True
    return Packed(tokens, mask)


def room(length: int) -> int:
    """Places for a text: a multiple of 16, so that few lengths are compiled.

    Example:
        >>> room(16), room(17)
        (16, 32)
    """
    return -(-length // 16) * 16


def batches(data: Packed, size: int, seed: int, epoch: int) -> Iterator[Packed]:
    """All of the data once, in an order that seed and epoch alone decide.

    Args:
        data: what there is.
        size: sequences of each batch. The last one is filled up with some that are masked wholly, so that
            one compiled program does for all.
        seed: 0 or more.
        epoch: how many times the data has been passed over, with another order each time.

    Example:
        >>> data = pack([([i], [i]) for i in range(5)], length=2)
        >>> [batch.mask.sum().item() for batch in batches(data, 2, seed=0, epoch=0)]
        [2, 2, 1]
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(data.tokens))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        rest = ((0, size - len(chosen)), (0, 0))
        yield Packed(*(np.pad(np.asarray(part)[chosen], rest) for part in data))


def fit(
    model: LanguageModel,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    data: Packed,
    epochs: int,
    batch: int,
    seed: int = 0,
    backward: Backward = PLAIN,
) -> tuple[PyTree, list[float]]:
    """Passes over the data.

    Args:
        model: whose parameters these are.
        params: to begin with.
        optimizer: of :func:`optimizer_of`, or any.
        data: of :func:`pack`.
        epochs: how many passes.
        batch: sequences to an update.
        seed: decides the order of each pass.
        backward: how gradients are computed.

    Returns:
        The parameters, and the loss before each update.

    Raises:
        ValueError: for a token that the model does not have, or a micro_batch that does not divide batch.

    Example:
        >>> from experiments.models.transformer import TransformerConfig
        >>> from experiments.reasoning.language_model import language_model
        >>> model = language_model(TransformerConfig(vocab_size=7, hidden_size=8, intermediate_size=12,
        ...                                          num_hidden_layers=1, num_attention_heads=2))
        >>> data = pack([([2], [3, 4]), ([5], [6])], length=4, end=1)
        >>> params = model.init(jax.random.key(0))
        >>> params, losses = fit(model, params, optimizer_of("adamw", 0.03), data, epochs=30, batch=2)
        >>> losses[0] > 1.9, losses[-1] < 0.1
        (True, True)
    """
    highest = int(np.asarray(data.tokens).max(initial=0))
    if highest >= model.vocab_size:
        raise ValueError(
            f"token {highest} is in the data, but the model has the tokens 0 to {model.vocab_size - 1}"
        )
    update = jax.jit(make_update(model, optimizer, backward), donate_argnums=(0, 1))
    # Copies, since what is donated is gone.
    params, losses = jax.tree.map(lambda x: jnp.array(x, copy=True), params), []
    state = optimizer.init(params)
    for epoch in range(epochs):
        for tokens, mask in batches(data, batch, seed, epoch):
            params, state, row = update(params, state, tokens, mask)
            losses.append(row["loss"])
    return params, [float(one) for one in losses]


def make_update(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    backward: Backward = PLAIN,
) -> Update:
    """(params, optimizer's state, tokens, mask) -> (params, state, metrics), to be compiled; see `fit`."""

    def update(
        params: PyTree,
        state: Any,
        tokens: Int[Array, "sequences length"],
        mask: Bool[Array, "sequences length"],
    ) -> tuple[PyTree, Any, dict[str, Array]]:
        def objective(params: PyTree, part: tuple[Array, Array]) -> tuple[Array, dict[str, Array]]:
            return _weighed(model, params, *part, backward), {}

        batch = (tokens, _shares(mask))
        value, _, grads = accumulate(objective, params, batch, backward.micro_batch)
        updates, state = optimizer.update(grads, state, params)
        row = {"loss": value, "gradient_norm": optax.tree.norm(grads)}
        return optax.apply_updates(params, updates), state, row

    return update


def loss(
    model: LanguageModel,
    params: PyTree,
    tokens: Int[Array | np.ndarray, "sequences length"],
    mask: Bool[Array | np.ndarray, "sequences length"],
) -> Float[Array, ""]:
    """Mean of ``-log p`` over all tokens of completions, in nats; 0 where there is none."""
    return _weighed(model, params, jnp.asarray(tokens), _shares(jnp.asarray(mask)))


def _shares(mask: Array) -> Array:
    return mask / jnp.maximum(mask.sum(), 1).astype(jnp.float32)


def _weighed(
    model: LanguageModel,
    params: PyTree,
    tokens: Array,
    weights: Array,
    backward: Backward = PLAIN,
) -> Array:
    def read(tokens: Array, weights: Array) -> Array:
        places = completion(weights > 0, backward.longest)
        return log_probs_and_entropies(model, params, tokens, at=places, remat=backward.remat)[0]

    return -jnp.where(weights > 0, jax.vmap(read)(tokens, weights) * weights, 0).sum()


# ---------------------------------------------------------------- parts that GRPO shares


def log_probs(
    model: LanguageModel,
    params: PyTree,
    tokens: Int[Array | np.ndarray, "length"],
    temperature: float | Array = 1.0,
) -> Float[Array, "length"]:
    """Log-probability of each token after those before it; 0 for the first.

    Args:
        model: whose parameters these are.
        params: in any float dtype; the softmax is float32 at least.
        tokens: of one sequence.
        temperature: that logits are divided by, as they are in sampling.
    """
    return log_probs_and_entropies(model, params, tokens, temperature)[0]


def log_probs_and_entropies(
    model: LanguageModel,
    params: PyTree,
    tokens: Int[Array | np.ndarray, "length"],
    temperature: float | Array = 1.0,
    at: Int[Array, "kept"] | None = None,
    remat: bool = False,
) -> tuple[Float[Array, "length"], Float[Array, "length"]]:
    """`log_probs`, and the entropy of what each token was drawn from, in nats, without a gradient.

    Args:
        model: whose parameters these are.
        params: in any float dtype.
        tokens: of one sequence.
        temperature: that logits are divided by.
        at: places of the tokens that are looked at, such as those of :func:`completion`, from 1; others are
            0, and places behind the end are nothing. All by default.
        remat: a backward pass computes what is inside of layers again.

    Example:
        >>> flat = LanguageModel(4, *[None] * 6)._replace(apply=lambda *_: jnp.zeros((3, 4)))
        >>> print(*log_probs_and_entropies(flat, {}, np.array([3, 0, 2])))
        [ 0.        -1.3862944 -1.3862944] [0.        1.3862944 1.3862944]
    """
    tokens = jnp.asarray(tokens)
    if at is None:
        seen, logits = jnp.arange(1, len(tokens)), model.apply(params, tokens, None, remat)[:-1]
    else:
        seen = jnp.clip(at, 1, len(tokens) - 1)
        logits = model.apply(params, tokens, seen - 1, remat)
    every = jax.nn.log_softmax(logits.astype(_wide(logits.dtype)) / temperature)
    chosen = jnp.take_along_axis(every, tokens[seen, None], axis=-1)[:, 0]
    fixed = lax.stop_gradient(every)
    entropies = -(jnp.exp(fixed) * fixed).sum(-1)
    if at is None:
        return jnp.pad(chosen, (1, 0)), jnp.pad(entropies, (1, 0))
    put = lambda x: jnp.zeros(len(tokens), x.dtype).at[at].set(x, mode="drop")
    return put(chosen), put(entropies)


def completion(mask: Bool[Array, "length"], longest: int | None) -> Int[Array, "longest"] | None:
    """Places of a completion's tokens, and of as many behind them as make `longest`; None for None.

    Example:
        >>> print(completion(jnp.array([False, False, True, True, False]), 4))
        [2 3 4 5]
    """
    return None if longest is None else jnp.argmax(mask) + jnp.arange(longest)


def accumulate(
    objective: Callable[[PyTree, Any], tuple[Array, dict[str, Array]]],
    params: PyTree,
    batch: PyTree,
    micro_batch: int | None = None,
) -> tuple[Array, dict[str, Array], PyTree]:
    """Value, metrics and gradient of an objective that is a sum over sequences, part by part.

    Args:
        objective: ``(params, batch) -> (value, metrics)``, all of them sums.
        params: of floats.
        batch: leaves ``[sequences, ...]``.
        micro_batch: sequences to a part; all by default.

    Returns:
        Sums over all parts, in float32 at least.

    Raises:
        ValueError: where micro_batch does not divide the sequences.

    Example:
        >>> objective = lambda w, x: ((w * x).sum(), {"many": jnp.float32(len(x))})
        >>> value, metrics, grad = accumulate(objective, jnp.bfloat16(2), jnp.arange(6.0), micro_batch=3)
        >>> print(value, metrics["many"], grad)
        30.0 6.0 15.0
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    micro_batch = size if micro_batch is None else micro_batch
    if micro_batch < 1 or size % micro_batch:
        raise ValueError(f"micro_batch must divide the {size} sequences, got {micro_batch}")
    parts = jax.tree.map(lambda x: x.reshape(-1, micro_batch, *x.shape[1:]), batch)
    grad = jax.value_and_grad(objective, has_aux=True)
    found = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, _wide(x.dtype)), found)
    add = lambda total, part: (jax.tree.map(jnp.add, total, grad(params, part)), None)
    ((value, metrics), grads), _ = lax.scan(add, zeros, parts)
    return value, metrics, grads


def optimizer_of(
    name: str,
    learning_rate: Any,
    gradient_norm: float | None = 1.0,
    after: optax.GradientTransformation | None = None,
    **settings: Any,
) -> optax.GradientTransformation:
    """An optimizer by name, behind a bound on the gradient's norm, with float32 weights.

    Args:
        name: such as "adamw" (optax) or "optim.lion" (this project).
        learning_rate: a number or a schedule.
        gradient_norm: longer gradients are scaled down to it; None for no bound.
        after: changes the optimizer's updates, such as `anchored`.
        **settings: further arguments of the optimizer.
    """
    inner = make_optimizer(name, learning_rate, **settings)
    inner = inner if after is None else optax.chain(inner, after)
    if gradient_norm is not None:
        inner = optax.chain(optax.clip_by_global_norm(gradient_norm), inner)
    return master_weights(inner)


class MasterWeightsState(NamedTuple):
    """What `master_weights` carries.

    Attributes:
        master: float32 copies of narrower parameters; None beside the others.
        inner: the state of the optimizer, which sees the copies.
    """

    master: PyTree
    inner: Any


def master_weights(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer on float32 copies of narrower parameters, which are always the copies rounded.

    Raises (from `init`):
        ValueError: for a parameter that is no float.

    Example:
        >>> params = {"w": jnp.ones(3, jnp.bfloat16)}
        >>> def trained(optimizer, params):
        ...     state = optimizer.init(params)
        ...     for _ in range(100):
        ...         updates, state = optimizer.update({"w": -jnp.ones(3)}, state, params)
        ...         params = optax.apply_updates(params, updates)
        ...     return params["w"][0]
        >>> print(trained(optax.sgd(1e-3), params), trained(master_weights(optax.sgd(1e-3)), params))
        1 1.10156
    """
    optimizer = optax.with_extra_args_support(optimizer)
    # The trees of parameters lead: where they have an array, the copies may have None.
    pick = lambda params, master: jax.tree.map(lambda p, m: p if m is None else m, params, master)

    def init_fn(params: PyTree) -> MasterWeightsState:
        for path, leaf in leaf_paths(params):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(f"{path} is {leaf.dtype}: backpropagation trains floats alone")
        copy = lambda p: p.astype(jnp.float32) if is_narrow(p.dtype) else None
        master = jax.tree.map(copy, params)
        return MasterWeightsState(master, optimizer.init(pick(params, master)))

    def update_fn(
        updates: PyTree, state: MasterWeightsState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, MasterWeightsState]:
        if params is None:
            raise ValueError("master_weights needs params in update(grads, state, params)")
        old = pick(params, state.master)
        updates, inner = optimizer.update(updates, state.inner, old, **extra)
        new = optax.apply_updates(old, updates)
        master = jax.tree.map(lambda _, m, n: None if m is None else n, params, state.master, new)
        # From the rounded parameter to the copy; apply_updates adds it in float32, and rounds.
        move = lambda p, m, n, u: u if m is None else n - p.astype(n.dtype)
        updates = jax.tree.map(move, params, state.master, new, updates)
        return updates, MasterWeightsState(master, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


# ---------------------------------------------------------------- as a fitness


def cross_entropy_score(
    model: LanguageModel,
    params: PyTree,
    key: Any,
    tokens: Int[Array, "tasks length"],
    mask: Bool[Array, "tasks length"],
) -> Float[Array, "tasks"]:
    """Mean log-probability of the tokens of each completion; the greater the better.

    Args:
        model: bound by ``functools.partial(cross_entropy_score, model)``, which is a fitness for an
            `EvolutionStrategy` with the tokens and mask of :func:`pack` as arguments.
        params: of a member.
        key: not looked at.
        tokens: of each example.
        mask: of completions.
    """
    each = jax.vmap(lambda one: log_probs(model, params, one))(tokens)
    return jnp.where(mask, each, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def exact_match_score(
    model: LanguageModel,
    params: PyTree,
    key: Any,
    tokens: Int[Array, "tasks length"],
    mask: Bool[Array, "tasks length"],
) -> Float[Array, "tasks"]:
    """1 where each token of the completion is the likeliest after the right ones before it, else 0.

    That is where greedy decoding would write it. Arguments as in :func:`cross_entropy_score`.
    """
    best = jax.vmap(lambda one: model.apply(params, one).argmax(-1))(tokens)
    right = (best[:, :-1] == tokens[:, 1:]) | ~mask[:, 1:]
    return right.all(-1).astype(jnp.float32)
