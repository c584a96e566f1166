"""GRPO against finite differences, numbers worked out by hand, identities, and a bandit that it must learn."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.models.rwkv7 import RWKV7Config
from experiments.models.transformer import TransformerConfig
from experiments.reasoning import scores, sft
from experiments.reasoning.grpo import (
    GRPO,
    Rollouts,
    kl_estimate,
    log_probs,
    loss,
    make_update,
    prepare,
    surrogate,
)
from experiments.reasoning.language_model import LanguageModel, language_model
from experiments.reasoning.sft import Backward

TRANSFORMER = language_model(
    TransformerConfig(
        vocab_size=7, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.3,
    )
)  # fmt: skip
RWKV7 = language_model(RWKV7Config(vocab_size=7, hidden_size=8, head_dim=4, num_hidden_layers=1))
EXAMPLES = [
    ([2, 3], [4, 5, 1]), ([2, 3], [4, 4]), ([2, 3], [6, 1]), ([2, 3], [1]),
    ([5], [5, 5, 5]), ([5], [1]), ([5], [2, 1]), ([5], [3, 3, 3, 1]),
]  # fmt: skip
TOKENS, MASK = sft.pack(EXAMPLES, length=6)
told = jax.jit(loss, static_argnums=(0, 3))
REWARDS = [[1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0]]


def of_functions(apply: Any) -> LanguageModel:
    return LanguageModel(5, *[None] * 6)._replace(apply=apply)  # type: ignore[arg-type]


def running_mean(params: Any, tokens: Any, *_: Any) -> Any:
    """Embeddings, their mean so far, tanh, a head: in the type of the parameters throughout."""
    x = jnp.cumsum(params["embed"][tokens], 0) / jnp.arange(1, len(tokens) + 1)[:, None]
    return jnp.tanh(x) @ params["head"]


def rollouts_of(model: LanguageModel, config: GRPO) -> tuple[Any, Rollouts]:
    """Written by other parameters than those returned, so that some ratios are out of bounds."""
    params, old, reference = (
        jax.tree.map(lambda x, i=i: x + 0.1 * jax.random.normal(jax.random.key(i), x.shape), start)
        for i, start in enumerate([model.init(jax.random.key(9))] * 3)
    )
    return params, prepare(model, old, TOKENS, MASK, REWARDS, config, reference)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    "changes",
    [
        dict(beta=0.3),
        dict(aggregation="token", dual_clip=1.3, temperature=0.7),
        dict(aggregation="constant", length=9, clip_low=0.1, clip_high=0.28, beta=0.04),
    ],
    ids=["sequence", "token", "constant"],
)
def test_the_gradient_is_that_of_finite_differences(changes: dict[str, Any]) -> None:
    config, chance = GRPO(**changes), np.random.default_rng(0)
    with jax.enable_x64(True):
        params = {
            "embed": jnp.asarray(chance.normal(size=(7, 3))),
            "head": jnp.asarray(chance.normal(size=(3, 7))),
        }
        model = of_functions(running_mean)
        current = jax.jit(jax.vmap(lambda one: log_probs(model, params, one)))(TOKENS)
        assert current.dtype == jnp.float64
        noise = lambda scale: jnp.asarray(current + scale * chance.normal(size=current.shape))
        rollouts = Rollouts(
            TOKENS, MASK, noise(0.3), jnp.asarray(chance.normal(size=8)), noise(0.5)
        )
        flat, back = jax.flatten_util.ravel_pytree(params)
        objective = lambda flat: loss(model, back(flat), rollouts, config)
        f = jax.jit(jax.value_and_grad(objective, has_aux=True))
        steps = 1e-6 * jnp.eye(flat.size)
        right = [(f(flat + step)[0][0] - f(flat - step)[0][0]) / 2e-6 for step in steps]
        (_, row), found = f(flat)
        assert 0.1 < row["clip_fraction"] < 0.9 and np.abs(found).max() > 0.01
        np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-9)


def worked_out() -> tuple[LanguageModel, Any, Rollouts]:
    """New and old chances .5/.4, .75/.9 of the tokens of a good completion, .5/.25 of a bad one."""
    params = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]))
    rollouts = Rollouts(
        np.array([[0, 1, 1], [0, 0, 1]]),
        np.array([[False, True, True], [False, True, False]]),
        np.log(np.float32([[1, 0.4, 0.9], [1, 0.25, 0.1]])),
        np.float32([1, -1]),
        np.log(np.float32([[1, 0.5, 0.5], [1, 0.25, 0.1]])),
    )
    return of_functions(lambda params, tokens, *_: params), params, rollouts


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        # 1.25 is cut to 1.2, .83 is within, -2 is not cut: -((1.2 + .83333) / 2 - 2) / 2.
        (dict(), 0.4916667),
        (dict(aggregation="token"), -(1.2 + 0.8333333 - 2) / 3),
        (dict(aggregation="constant", length=4), -((1.2 + 0.8333333) / 4 - 2 / 4) / 2),
        (dict(clip_high=0.28), -((1.25 + 0.8333333) / 2 - 2) / 2),
        (dict(dual_clip=1.5), -((1.2 + 0.8333333) / 2 - 1.5) / 2),
        # d = 0, log(.5 / .75), log(.25 / .5): 0, .0721318, .1931472.
        (dict(beta=0.5), 0.4916667 + 0.5 * (0.0721318 / 2 + 0.1931472) / 2),
    ],
)
def test_a_loss_worked_out_by_hand(changes: dict[str, Any], right: float) -> None:
    value, row = told(*worked_out(), GRPO(**changes))
    assert float(value) == pytest.approx(right, abs=2e-6)
    assert float(row["ratio"]) == pytest.approx((1.25 + 0.8333333 + 2) / 3, rel=1e-5)
    assert float(row["kl"]) == pytest.approx((0.0721318 + 0.1931472) / 3, rel=1e-5)
    assert float(row["entropy"]) == pytest.approx((2 * 0.6931472 + 0.5623351) / 3, rel=1e-5)
    cut = 1 / 3 * ((changes.get("clip_high") is None) + ("dual_clip" in changes))
    assert float(row["clip_fraction"]) == pytest.approx(cut)
    assert row["left_out"] == 0


def test_at_a_ratio_of_one_it_is_the_plain_policy_gradient() -> None:
    config = GRPO()
    params = TRANSFORMER.init(jax.random.key(0))
    rollouts = prepare(TRANSFORMER, params, TOKENS, MASK, REWARDS, config)

    def plain(params: Any) -> Any:
        each = jax.vmap(lambda one: log_probs(TRANSFORMER, params, one))(TOKENS)
        means = jnp.where(MASK, each, 0).sum(-1) / MASK.sum(-1)
        return -(rollouts.advantages * means).mean()

    objective = lambda params: loss(TRANSFORMER, params, rollouts, config)
    found, row = jax.jit(jax.grad(objective, has_aux=True))(params)
    assert float(row["ratio"]) == pytest.approx(1, abs=1e-5) and row["clip_fraction"] == 0
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, found, jax.jit(jax.grad(plain))(params))


def test_bounds_cut_the_gradient_on_the_side_that_would_gain() -> None:
    ratio = np.float32([0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2.9, 3.1])
    config = GRPO(clip_high=0.28)
    slope = lambda a, config: jax.vmap(
        jax.grad(lambda x, a: surrogate(x, a, config)[0]), (0, None)
    )(jnp.log(ratio), jnp.float32(a))
    within, above = ratio < 1.28, ratio > 0.8
    np.testing.assert_allclose(slope(2.0, config), 2 * ratio * within, rtol=1e-6)
    np.testing.assert_allclose(slope(-2.0, config), -2 * ratio * above, rtol=1e-6)
    dual = dataclasses.replace(config, dual_clip=3.0)
    np.testing.assert_allclose(slope(2.0, dual), 2 * ratio * within, rtol=1e-6)
    np.testing.assert_allclose(slope(-2.0, dual), -2 * ratio * above * (ratio < 3), rtol=1e-6)


def test_ratios_that_would_overflow_do_not() -> None:
    value = lambda x: surrogate(x, jnp.float32(-1), GRPO())[0] + kl_estimate(x, jnp.float32(200))
    assert np.isfinite(jax.value_and_grad(value)(jnp.float32(150))).all()
    assert np.isfinite(jax.value_and_grad(value)(jnp.float32(-150))).all()


def test_the_mean_of_the_estimate_is_the_divergence() -> None:
    p, q = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (2, 6)))
    assert (kl_estimate(p, q) >= 0).all()
    right = (jnp.exp(p) * (p - q)).sum()
    np.testing.assert_allclose((jnp.exp(p) * kl_estimate(p, q)).sum(), right, rtol=1e-5)
    slope = jax.vmap(jax.grad(kl_estimate))(p, q)
    np.testing.assert_allclose(slope, 1 - jnp.exp(q - p), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", [TRANSFORMER, RWKV7], ids=["transformer", "rwkv7"])
def test_padding_is_never_looked_at(model: LanguageModel) -> None:
    config = GRPO(beta=0.1)
    params, rollouts = rollouts_of(model, config)
    padding = np.cumsum(MASK[:, ::-1], 1)[:, ::-1] == 0
    other = rollouts._replace(
        tokens=jnp.where(padding, 4, TOKENS),
        old_log_probs=jnp.where(MASK, rollouts.old_log_probs, jnp.nan),
        reference_log_probs=jnp.where(MASK, rollouts.reference_log_probs, 1e30),
    )
    assert padding.any()
    f = jax.jit(jax.value_and_grad(functools.partial(loss, model, config=config), has_aux=True))
    jax.tree.map(np.testing.assert_array_equal, f(params, rollouts), f(params, other))


# ---------------------------------------------------------------- rewards


@pytest.mark.parametrize("name", scores.ADVANTAGES)
def test_advantages_are_those_of_the_group(name: str) -> None:
    config = GRPO(advantage=name)
    params = TRANSFORMER.init(jax.random.key(0))
    rollouts = prepare(TRANSFORMER, params, TOKENS, MASK, REWARDS, config)
    right = scores.ADVANTAGES[name](np.float32(REWARDS))
    np.testing.assert_array_equal(rollouts.advantages, right.reshape(-1))
    assert (rollouts.advantages[:2] * np.array([1, -1]) > 0).all()
    # The sum of eight tenths is not eight times a tenth.
    np.testing.assert_array_equal(scores.ADVANTAGES[name](np.full((1, 8), 0.1, np.float32)), 0)


@pytest.mark.parametrize(
    ("unknown", "aggregation"),
    [(None, "sequence"), (float("nan"), "token"), (float("inf"), "sequence")],
)
def test_unknown_rewards_are_as_if_their_completions_were_not_there(
    unknown: float | None, aggregation: str
) -> None:
    config = GRPO(advantage="dr_grpo", aggregation=aggregation, beta=0.1)
    params, _ = rollouts_of(TRANSFORMER, config)
    prepared = functools.partial(prepare, TRANSFORMER, params, config=config, reference=params)
    with_it = prepared(TOKENS[:4], MASK[:4], [[1.0, unknown, 0.0, 0.0]])
    kept = np.array([0, 2, 3])
    without = prepared(TOKENS[kept], MASK[kept], [[1.0, 0.0, 0.0]])
    other = jax.tree.map(lambda x: 1.1 * x, params)
    value, row = told(TRANSFORMER, other, with_it, config)
    right, right_row = told(TRANSFORMER, other, without, config)
    assert (row.pop("left_out"), right_row.pop("left_out")) == (1, 0)
    np.testing.assert_allclose(value, right, rtol=1e-5)
    for name in right_row:
        np.testing.assert_allclose(row[name], right_row[name], rtol=1e-5, err_msg=name)


def test_nothing_known_is_no_gradient() -> None:
    params = TRANSFORMER.init(jax.random.key(0))
    rollouts = prepare(TRANSFORMER, params, TOKENS[:2], MASK[:2], [[None, None]], GRPO())
    optimizer = optax.sgd(1.0)
    update = jax.jit(make_update(TRANSFORMER, optimizer, GRPO()))
    after, _, row = update(params, optimizer.init(params), rollouts)
    assert row["left_out"] == 2 and row["gradient_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, after, params)


def test_rewards_of_another_shape_are_refused() -> None:
    words = r"rewards must have the shape \[questions, samples\] of the 4 sequences, got \[2, 4\]"
    with pytest.raises(ValueError, match=words):
        prepare(TRANSFORMER, {}, TOKENS[:4], MASK[:4], REWARDS, GRPO())


# ---------------------------------------------------------------- updates


def test_micro_batches_are_the_whole_batch() -> None:
    config = GRPO(beta=0.1)
    params, rollouts = rollouts_of(TRANSFORMER, config)
    optimizer = optax.sgd(1.0)

    def updated(config: GRPO) -> Any:
        update = jax.jit(make_update(TRANSFORMER, optimizer, config))
        return update(params, optimizer.init(params), rollouts)

    whole, parts = updated(config), updated(dataclasses.replace(config, backward=Backward(2)))
    assert whole[2]["gradient_norm"] > 0.1
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), parts, whole)
    value, row = told(TRANSFORMER, params, rollouts, config)
    for name in row:
        np.testing.assert_allclose(parts[2][name], row[name], rtol=1e-4, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(parts[2]["loss"], value, rtol=1e-4)
    with pytest.raises(ValueError, match="micro_batch must divide the 8 sequences, got 3"):
        updated(dataclasses.replace(config, backward=Backward(3)))


@pytest.mark.parametrize("model", [TRANSFORMER, RWKV7], ids=["transformer", "rwkv7"])
def test_how_gradients_are_computed_changes_nothing(model: LanguageModel) -> None:
    """Logits of completions alone, layers computed again: the same update and figures."""

    def updated(backward: Backward) -> Any:
        config = GRPO(beta=0.1, backward=backward)
        params, rollouts = rollouts_of(model, config)
        optimizer = optax.sgd(1.0)
        update = jax.jit(make_update(model, optimizer, config))
        known = np.where(rollouts.mask, rollouts.old_log_probs, 0)
        return known, update(params, optimizer.init(params), rollouts)

    plain = updated(Backward())
    assert plain[1][2]["gradient_norm"] > 0.1
    # The last completion begins at place 1 and the first at 2: places behind the end are dropped.
    for backward in (Backward(longest=4), Backward(4, 5, True)):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=3e-6), updated(backward), plain
        )


def test_one_update_needs_no_probabilities_beforehand() -> None:
    config = GRPO(beta=0.1)
    params, reference = (TRANSFORMER.init(jax.random.key(i)) for i in (9, 10))
    optimizer = optax.sgd(1.0)
    update = jax.jit(make_update(TRANSFORMER, optimizer, config))
    rows = []
    for once in (False, True):
        rollouts = prepare(TRANSFORMER, params, TOKENS, MASK, REWARDS, config, reference, once=once)
        assert (rollouts.old_log_probs is None) == once
        rows.append(update(params, optimizer.init(params), rollouts))
    assert rows[0][2]["gradient_norm"] > 0.1
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-6), rows[1], rows[0])
    twice = dataclasses.replace(config, epochs=2)
    with pytest.raises(ValueError, match="once must be false for 2 epochs"):
        prepare(TRANSFORMER, params, TOKENS, MASK, REWARDS, twice, once=True)


def test_epochs_are_updates_by_the_same_rollouts() -> None:
    config = GRPO(beta=0.1)
    params, rollouts = rollouts_of(TRANSFORMER, config)
    optimizer = sft.optimizer_of("radam", 0.01)
    once = jax.jit(make_update(TRANSFORMER, optimizer, config))
    twice = jax.jit(make_update(TRANSFORMER, optimizer, dataclasses.replace(config, epochs=2)))
    first, state, row = once(params, optimizer.init(params), rollouts)
    second, _, next_row = once(first, state, rollouts)
    found, _, mean_row = twice(params, optimizer.init(params), rollouts)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, second)
    for name in mean_row:
        mean = (row[name] + next_row[name]) / 2
        np.testing.assert_allclose(mean_row[name], mean, rtol=1e-3, atol=1e-6, err_msg=name)


def test_bfloat16_sums_in_float32_and_keeps_its_type() -> None:
    config = GRPO(backward=Backward(4))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), TRANSFORMER.init(jax.random.key(0)))
    rollouts = prepare(TRANSFORMER, half, TOKENS, MASK, REWARDS, config)
    assert rollouts.old_log_probs.dtype == jnp.float32
    optimizer = sft.optimizer_of("adamw", 1e-6)
    update = make_update(TRANSFORMER, optimizer, config)
    after, state, row = jax.jit(update)(half, optimizer.init(half), rollouts)
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in row.values()} == {jnp.dtype(jnp.float32)}
    # Steps of 1e-6 are kept by the copies, where the parameters are still the same.
    moved = jax.tree.map(lambda m, p: m - p.astype(jnp.float32), state.master, half)
    assert all((jnp.abs(x) > 5e-7).any() for x in jax.tree.leaves(moved))


def test_a_divergence_needs_a_reference() -> None:
    params = TRANSFORMER.init(jax.random.key(0))
    rollouts = prepare(TRANSFORMER, params, TOKENS, MASK, REWARDS, GRPO())
    with pytest.raises(ValueError, match="beta is 0.1, but the rollouts have no reference"):
        loss(TRANSFORMER, params, rollouts, GRPO(beta=0.1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(advantage="rlo"), "advantage must be one of grpo, dr_grpo, rloo, got 'rlo'"),
        (dict(clip_low=0.0), "clip_low must be more than 0 and at most 1, got 0.0"),
        (dict(clip_high=float("nan")), "clip_high must be more than 0, got nan"),
        (dict(dual_clip=1.0), "dual_clip must be more than 1, or None, got 1.0"),
        (dict(beta=-0.1), "beta must be 0 or more, got -0.1"),
        (dict(temperature=0.0), "temperature must be more than 0, got 0.0"),
        (dict(epochs=0), "epochs must be a whole number from 1, got 0"),
        (dict(aggregation="constant"), "aggregation is 'constant' and length is None"),
        (dict(length=8), "aggregation is 'sequence' and length is 8"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GRPO(**changes)


def test_it_learns_which_token_is_rewarded() -> None:
    """Six prompts of one token, each with a right answer of its own; eight samples of each."""
    prompts, answers = jnp.arange(1, 7), (jnp.arange(1, 7) * 3) % 7
    config, optimizer = GRPO(epochs=2), sft.optimizer_of("adam", 0.02)
    params = TRANSFORMER.init(jax.random.key(0))
    state, update = optimizer.init(params), jax.jit(make_update(TRANSFORMER, optimizer, config))

    @jax.jit
    def answer(params: Any, key: Any) -> Any:
        logits = jax.vmap(lambda token: TRANSFORMER.apply(params, token[None])[0])(prompts)
        return jax.random.categorical(key, logits[:, None], shape=(6, 8))

    right = []
    for i in range(40):
        written = answer(params, jax.random.key(i))
        rewards = np.asarray(written == answers[:, None], np.float32)
        tokens = jnp.stack([jnp.repeat(prompts, 8), written.reshape(-1)], 1)
        mask = jnp.tile(jnp.array([False, True]), (48, 1))
        rollouts = prepare(TRANSFORMER, params, tokens, mask, rewards, config)
        params, state, _ = update(params, state, rollouts)
        right.append(rewards.mean())
    assert np.mean(right[:3]) < 0.4 and np.mean(right[-3:]) > 0.9
