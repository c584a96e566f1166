"""Supervised fine-tuning against direct sums, float32 copies against float32 runs, and ES on the same scores."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from experiments.models.transformer import TransformerConfig
from experiments.reasoning.language_model import LanguageModel, language_model
from experiments.reasoning.sft import (
    Backward,
    Packed,
    accumulate,
    batches,
    cross_entropy_score,
    exact_match_score,
    fit,
    log_probs,
    loss,
    make_update,
    master_weights,
    optimizer_of,
    pack,
)

MODEL = language_model(
    TransformerConfig(
        vocab_size=11, hidden_size=16, intermediate_size=20, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.3,
    )
)  # fmt: skip
# Two share a prompt's first token, two a completion's.
EXAMPLES = [([2, 3], [7, 8, 9]), ([2, 4], [9]), ([5], [6, 6]), ([10, 9, 8], [6, 2])]
DATA = pack(EXAMPLES, length=6, end=1)


def of_logits(shape: tuple[int, ...]) -> LanguageModel:
    """Its one parameter is the logits at each place, whatever the tokens."""
    whole = LanguageModel(shape[-1], *[None] * 6)  # type: ignore[arg-type]
    return whole._replace(apply=lambda params, tokens, *_: params)


# One product: compiled in no time. What is likely follows from the token before alone.
BIGRAM = of_logits((11, 11))._replace(apply=lambda params, tokens, *_: params["table"][tokens])
BIGRAM_PARAMS = {"table": jax.random.normal(jax.random.key(3), (11, 11))}


def slow_log_probs(params: Any, tokens: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Of all tokens but the first, in float64."""
    logits = np.asarray(jax.jit(MODEL.apply)(params, tokens), np.float64) / temperature
    return np.array(
        [row[token] - np.log(np.exp(row).sum()) for row, token in zip(logits, tokens[1:])]  # noqa: B905
    )


def test_the_loss_is_the_mean_over_tokens_of_completions() -> None:
    params = MODEL.init(jax.random.key(0))
    read = jax.jit(functools.partial(log_probs, MODEL))
    found = read(params, DATA.tokens[0])
    np.testing.assert_allclose(found[1:], slow_log_probs(params, DATA.tokens[0]), rtol=1e-5)
    assert found[0] == 0
    warm = read(params, DATA.tokens[0], temperature=2.0)[1:]
    np.testing.assert_allclose(warm, slow_log_probs(params, DATA.tokens[0], 2.0), rtol=1e-5)
    right = [slow_log_probs(params, tokens)[mask[1:]] for tokens, mask in zip(*DATA, strict=True)]
    # Three tokens, one, two and two, and an end each.
    assert [len(one) for one in right] == [4, 2, 3, 3]
    value = jax.jit(functools.partial(loss, MODEL))(params, *DATA)
    np.testing.assert_allclose(value, -np.concatenate(right).mean(), rtol=1e-5)
    score = jax.jit(functools.partial(cross_entropy_score, MODEL))(params, None, *DATA)
    np.testing.assert_allclose(score, [one.mean() for one in right], rtol=1e-5)


def test_prompts_and_padding_have_no_gradient() -> None:
    model = of_logits((6, 11))
    logits = jax.random.normal(jax.random.key(0), (6, 11))
    grad = jax.grad(lambda logits: loss(model, logits, DATA.tokens[1:2], DATA.mask[1:2]))(logits)
    # The third and the fourth token are those of the completion; the ones before them predict them.
    right = jax.nn.softmax(logits) - jax.nn.one_hot(DATA.tokens[1, [1, 2, 3, 4, 5, 5]], 11)
    np.testing.assert_allclose(grad[1:3], right[1:3] / 2, atol=1e-6)
    np.testing.assert_array_equal(grad[jnp.array([0, 3, 4, 5])], 0)


def test_nothing_to_learn_is_no_loss() -> None:
    nothing = np.zeros_like(DATA.mask)
    value, grad = jax.value_and_grad(functools.partial(loss, of_logits((6, 11))))(
        jnp.ones((6, 11)), DATA.tokens, nothing
    )
    assert value == 0 and not grad.any()


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (([], [1]), "example 1 has an empty prompt: give it one token at least"),
        (([1, 2], [3, 4]), "example 1 has 5 tokens, where length is 4"),
    ],
)
def test_examples_that_do_not_fit_are_refused(example: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack([([1], [2]), example], length=4, end=0)


def test_an_epoch_has_all_examples_once_in_an_order_of_its_own() -> None:
    data = pack([([i], [i]) for i in range(10)], length=2)
    first = lambda seed, epoch: [
        batch.tokens[:, 0][batch.mask.any(-1)].tolist() for batch in batches(data, 4, seed, epoch)
    ]
    assert [len(one) for one in first(0, 0)] == [4, 4, 2]
    assert all(batch.tokens.shape == (4, 2) for batch in batches(data, 4, 0, 0))
    assert sorted(itertools.chain(*first(0, 0))) == list(range(10))
    assert first(3, 1) == first(3, 1)
    assert first(3, 1) != first(3, 2) and first(3, 1) != first(4, 1)


def test_it_remembers_four_examples() -> None:
    start = MODEL.init(jax.random.key(0))
    before = jax.tree.map(np.array, start)
    params, losses = fit(MODEL, start, optimizer_of("adamw", 0.02), DATA, epochs=40, batch=4)
    assert losses[0] > 1.5 and losses[-1] < 0.05 and len(losses) == 40
    score = jax.jit(functools.partial(exact_match_score, MODEL))
    assert score(start, None, *DATA).sum() < 2
    assert score(params, None, *DATA).tolist() == [1, 1, 1, 1]
    jax.tree.map(np.testing.assert_array_equal, start, before)  # no one's buffers were taken


def test_an_exact_match_needs_every_token() -> None:
    tokens, mask = pack([([2], [3, 4]), ([2], [3, 5])], length=4)
    logits = jnp.zeros((4, 11)).at[0, 3].set(1).at[1, 4].set(1).at[2, 9].set(1)
    found = exact_match_score(of_logits((4, 11)), logits, None, *map(jnp.asarray, (tokens, mask)))
    assert found.tolist() == [1, 0]


@pytest.mark.parametrize("optimizer", ["adamw", "optim.lion"])
def test_micro_batches_change_nothing(optimizer: str) -> None:
    chain = optimizer_of(optimizer, 0.01)
    updated = lambda size: jax.jit(make_update(BIGRAM, chain, Backward(size)))(
        BIGRAM_PARAMS, chain.init(BIGRAM_PARAMS), *DATA
    )
    whole, parts = updated(None), updated(2)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, parts[::2], whole[::2])
    np.testing.assert_allclose(parts[2]["loss"], loss(BIGRAM, BIGRAM_PARAMS, *DATA), rtol=1e-5)
    assert (whole[0]["table"] != BIGRAM_PARAMS["table"]).any()


def test_micro_batches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch must divide the 4 sequences, got 3"):
        accumulate(lambda w, x: ((w * x).sum(), {}), jnp.ones(()), jnp.ones(4), micro_batch=3)


def test_tokens_that_the_model_does_not_have_are_refused() -> None:
    data = pack([([3], [11])], length=2)
    with pytest.raises(ValueError, match="token 11 is in the data, but the model has .* 0 to 10"):
        fit(MODEL, MODEL.init(jax.random.key(0)), optax.sgd(0.1), data, epochs=1, batch=1)


# ---------------------------------------------------------------- float32 copies


def test_copies_go_as_float32_goes_and_parameters_are_the_copies_rounded() -> None:
    chance = iter(jax.random.split(jax.random.key(0), 30))
    wide = {"w": jax.random.normal(next(chance), (5, 3)), "b": jnp.ones(3)}
    wide["w"] = wide["w"].astype(jnp.bfloat16).astype(jnp.float32)
    mixed = {**wide, "w": wide["w"].astype(jnp.bfloat16)}
    plain, copied = optax.adamw(3e-4), master_weights(optax.adamw(3e-4))
    plain_state, state, start = plain.init(wide), copied.init(mixed), mixed["w"]
    assert state.master["b"] is None and state.master["w"].dtype == jnp.float32
    for _ in range(10):
        grads = jax.tree.map(lambda x: jax.random.normal(next(chance), x.shape), wide)
        updates, plain_state = plain.update(grads, plain_state, wide)
        wide = optax.apply_updates(wide, updates)
        updates, state = copied.update(grads, state, mixed)
        mixed = optax.apply_updates(mixed, updates)
        np.testing.assert_array_equal(mixed["w"], state.master["w"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(state.master["w"], wide["w"])
    np.testing.assert_array_equal(mixed["b"], wide["b"])
    assert mixed["w"].dtype == jnp.bfloat16 and (mixed["w"] != start).any()


def test_bfloat16_learns_in_small_steps() -> None:
    """Steps of SGD that rounding would lose one by one."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BIGRAM_PARAMS)

    def falls(optimizer: Any) -> float:
        params, losses = fit(BIGRAM, half, optimizer, DATA, epochs=100, batch=4)
        assert params["table"].dtype == jnp.bfloat16
        return losses[0] - losses[-1]

    kept, lost = falls(master_weights(optax.sgd(0.01))), falls(optax.sgd(0.01))
    assert kept > 0.05 and kept > 2 * lost


def test_only_floats_are_trained() -> None:
    params = {"up_proj": {"int8": jnp.zeros(3, jnp.int8), "scale": jnp.ones(3)}}
    with pytest.raises(ValueError, match="up_proj/int8 is int8: backpropagation trains floats"):
        master_weights(optax.sgd(0.1)).init(params)


# ---------------------------------------------------------------- as a fitness


@pytest.mark.parametrize("score", [cross_entropy_score, exact_match_score])
def test_evolution_strategies_learn_from_the_same_scores(score: Any) -> None:
    """Which token of eleven comes next, of eight tokens."""
    data = pack([([i], [(3 * i + 1) % 11]) for i in range(8)], length=2)
    arrays = Packed(*map(jnp.asarray, data))
    es = eggroll.EvolutionStrategy(
        optimizer=optax.adam(0.05), population=64, sigma=0.1, plan=MODEL.plan, on_dense="error"
    )
    fitness = functools.partial(score, MODEL)
    state = es.init(MODEL.init(jax.random.key(0)), jax.random.key(1))
    values = es.evaluate(state, fitness, *arrays)
    assert values.shape == (64, 8)
    members = jax.jit(lambda member: fitness(member, None, *arrays))
    np.testing.assert_allclose(values[5], members(es.member(state, 5)), atol=1e-4)
    before = members(es.params(state)).mean()
    state = es.optimize(state, fitness, 40, *arrays)
    after = members(es.params(state)).mean()
    assert after > before + (1 if score is cross_entropy_score else 0.4)
