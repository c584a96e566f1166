"""The decoder against a slow float64 one, its causality and positions, and EGGROLL on it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from experiments.models.transformer import TransformerConfig, apply, attend, init, rotate

CONFIG = TransformerConfig(
    vocab_size=11, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 6))
run = functools.partial(jax.jit, static_argnums=2)(apply)


def reference(params: Any, tokens: np.ndarray, config: TransformerConfig) -> np.ndarray:
    """One token after another, one head after another, in float64: logits [length, vocab]."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    width = config.hidden_size // config.num_attention_heads
    shared = config.num_attention_heads // config.kv_heads

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2) + config.rms_norm_eps) * weight

    def turn(x: np.ndarray, position: int) -> np.ndarray:
        # As numbers in the complex plane, each with a wavelength of its own.
        z = x[: width // 2] + 1j * x[width // 2 :]
        z = z * np.exp(1j * position * config.rope_theta ** (-2 * np.arange(width // 2) / width))
        return np.concatenate([z.real, z.imag])

    stream = [p["embed_tokens"][token] for token in tokens]
    for number in range(config.num_hidden_layers):
        layer = {name: leaf[number] for name, leaf in p["layers"].items()}
        normed = [norm(x, layer["input_layernorm"]) for x in stream]
        part = lambda name, head, normed=normed, layer=layer: [
            x @ layer[name][:, head * width : (head + 1) * width] for x in normed
        ]
        seen = [np.zeros(0) for _ in stream]
        for head in range(config.num_attention_heads):
            q = [turn(x, t) for t, x in enumerate(part("q_proj", head))]
            k = [turn(x, t) for t, x in enumerate(part("k_proj", head // shared))]
            v = part("v_proj", head // shared)
            for t in range(len(tokens)):
                score = np.exp([q[t] @ k[s] / np.sqrt(width) for s in range(t + 1)])
                mean = sum(w * one for w, one in zip(score / score.sum(), v[: t + 1], strict=True))
                seen[t] = np.concatenate([seen[t], mean])
        stream = [x + one @ layer["o_proj"] for x, one in zip(stream, seen, strict=True)]
        for t, x in enumerate(stream):
            h = norm(x, layer["post_attention_layernorm"])
            gate = h @ layer["gate_proj"]
            gate = gate / (1 + np.exp(-gate))
            stream[t] = x + (gate * (h @ layer["up_proj"])) @ layer["down_proj"]
    head = p["embed_tokens"].T if config.tie_word_embeddings else p["lm_head"]
    return np.stack([norm(x, p["norm"]) @ head for x in stream])


@pytest.mark.parametrize(
    "changes", [{}, dict(tie_word_embeddings=True, num_key_value_heads=None)], ids=["gqa", "tied"]
)
def test_it_is_the_slow_one(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    params = init(jax.random.key(0), config)
    chance = iter(jax.random.split(jax.random.key(1), 20))
    noisy = lambda x: x + 0.3 * jax.random.normal(next(chance), x.shape)  # norms other than 1
    params = jax.tree.map(noisy, params)
    assert ("lm_head" in params) == (not config.tie_word_embeddings)
    logits = run(params, TOKENS, config)
    assert logits.shape == (3, 6, 11)
    right = np.stack([reference(params, one, config) for one in TOKENS])
    np.testing.assert_allclose(logits, right, atol=1e-4, rtol=1e-4)


def test_a_later_token_never_changes_an_earlier_logit() -> None:
    params = init(jax.random.key(0), CONFIG)
    right = run(params, TOKENS, CONFIG)
    for position in range(1, 6):
        changed = TOKENS.copy()
        changed[:, position:] = (changed[:, position:] + 1) % 11
        logits = run(params, changed, CONFIG)
        np.testing.assert_array_equal(logits[:, :position], right[:, :position])
        assert not np.allclose(logits[:, position], right[:, position])


def test_rotary_products_know_the_distance_alone() -> None:
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 3, 8))
    at = lambda x, position: rotate(x, jnp.array([position]), 10000.0)[0]
    product = lambda s, t: jnp.einsum("hd,hd->h", at(q, s), at(k, t))
    np.testing.assert_allclose(product(9, 4), product(25, 20), atol=1e-4)
    assert not np.allclose(product(9, 4), product(9, 5), atol=1e-2)
    np.testing.assert_array_equal(at(q, 0), q[0])
    np.testing.assert_allclose(jnp.linalg.norm(at(q, 77)), jnp.linalg.norm(q), rtol=1e-5)


def test_attention_may_look_back_on_more_than_it_asks_for() -> None:
    """As it does where keys and values of earlier calls are kept."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 4))
    whole = attend(q, k, v, jnp.tri(5, dtype=bool))
    last = attend(q[:, 3:], k, v, jnp.tri(5, dtype=bool)[3:])
    np.testing.assert_allclose(last, whole[:, 3:], atol=1e-6)


def test_bfloat16_stays_bfloat16() -> None:
    params = init(jax.random.key(0), CONFIG)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    logits = run(half, TOKENS, CONFIG)
    assert logits.dtype == jnp.bfloat16
    right = run(params, TOKENS, CONFIG)
    assert jnp.abs(logits - right).max() < 0.1 * jnp.abs(right).max()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(hidden_size=18), "hidden_size 18 is no multiple of num_attention_heads 4"),
        (dict(head_dim=3), "heads are 3 wide: rotary positions need an even head_dim"),
        (dict(num_key_value_heads=3), "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **changes)


def test_eggroll_trains_it_and_builds_nothing() -> None:
    """Words that always follow each other are learned, by layers that have noise of their own."""
    params = init(jax.random.key(0), CONFIG)
    tokens = jnp.arange(12).reshape(2, 6) % 11

    def fitness(params: Any, key: Any, tokens: Any) -> Any:
        logits = apply(params, tokens[:, :-1], CONFIG)
        return -optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    es = eggroll.EvolutionStrategy(
        optimizer=optax.adam(0.05),
        population=64,
        sigma=0.05,
        plan=eggroll.plan.infer(fitness, params, tokens),
        on_dense="error",
    )
    state = es.init(params, jax.random.key(1))
    before = fitness(es.params(state), None, tokens)
    state = es.optimize(state, fitness, 30, tokens)
    assert fitness(es.params(state), None, tokens) > before + 1
