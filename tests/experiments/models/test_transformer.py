"""The decoder against a slow float64 one, its causality and positions, its cache, and EGGROLL on it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from experiments.models.decoder_parts import RopeScaling, attend, rotate
from experiments.models.plans import GROUPS
from experiments.models.quantised import dequantise, quantise, steps
from experiments.models.transformer import (
    TransformerConfig,
    apply,
    decode,
    init,
    output_axis,
    plan,
    prefill,
)

CONFIG = TransformerConfig(
    vocab_size=11, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4,
)  # fmt: skip
QWEN2 = dataclasses.replace(CONFIG, qkv_bias=True, tie_word_embeddings=True)
QWEN3 = dataclasses.replace(CONFIG, qk_norm=True, head_dim=6, num_key_value_heads=1)
FAMILY = pytest.mark.parametrize("config", [CONFIG, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 6))
run = functools.partial(jax.jit, static_argnums=2)(apply)


@functools.partial(jax.jit, static_argnums=0)
def random_params(config: TransformerConfig) -> Any:
    """With norms other than 1 and biases other than 0."""
    chance = iter(jax.random.split(jax.random.key(1), 20))
    noisy = lambda x: x + 0.3 * jax.random.normal(next(chance), x.shape)
    return jax.tree.map(noisy, init(jax.random.key(0), config))


def read_on(params: Any, prompt: Any, length: Any, rest: Any, config: TransformerConfig) -> Any:
    """Logits [1 + rest, vocab] after a prompt and each of the tokens behind it, by the cache."""
    first, cache = prefill(params, prompt, length, config, len(prompt) + len(rest))

    def one(cache: Any, step: Any) -> Any:
        logits, cache = decode(params, cache, step[1], step[0], config)
        return cache, logits

    steps = jnp.arange(len(rest)), jnp.asarray(rest)
    return jnp.concatenate([first[None], jax.lax.scan(one, cache, steps)[1]])


PROMPTS, LENGTHS, REST = TOKENS[:, :4], np.array([1, 4, 3]), np.array([3, 0, 7])


@functools.partial(jax.jit, static_argnums=1)
def read_all(params: Any, config: TransformerConfig) -> Any:
    """Logits [prompts, 1 + rest, vocab]."""
    one = lambda prompt, length: read_on(params, prompt, length, REST, config)
    return jax.vmap(one)(PROMPTS, LENGTHS)


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
    params = random_params(config)
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
        (dict(rope_scaling=dict(rope_type="yarn", factor=2.0)), "rope_type 'yarn' is not supported"),
        (dict(rope_scaling=dict(rope_type="linear", factor=0.0)), "factor 0.0, .* must be positive"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        if "rope_scaling" in changes:
            changes = dict(rope_scaling=RopeScaling(**changes["rope_scaling"]))
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


@FAMILY
def test_prompts_of_any_length_are_read_on_from_a_cache(config: TransformerConfig) -> None:
    """What stands behind the end of a prompt is not seen, and positions go on from its end."""
    params = random_params(config)
    logits = read_all(params, config)
    assert logits.shape == (3, 4, 11)
    for prompt, length, one in zip(PROMPTS, LENGTHS, logits, strict=True):
        text = np.concatenate([prompt[:length], REST, np.zeros(4 - length, int)])
        right = run(params, text, config)[length - 1 : length + 3]
        np.testing.assert_allclose(one, right, atol=1e-5)


def test_a_cache_without_room_for_the_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="slots=3 is less than the 4 of the padded prompt"):
        prefill(init(jax.random.key(0), CONFIG), jnp.arange(4), 2, CONFIG, slots=3)


@FAMILY
def test_perturbed_members_decode_as_built_ones_do(config: TransformerConfig) -> None:
    """No member's matrices are built, and its logits are those of the built member."""
    params = random_params(config)
    groups = [name for name in GROUPS if name != "head" or not config.tie_word_embeddings]
    es = eggroll.EvolutionStrategy(
        optimizer=optax.sgd(0.1), population=4, sigma=0.1, plan=plan(groups), on_dense="error"
    )
    state = es.init(params, jax.random.key(2))
    treatments = [leaf.treatment for leaf in es.plan_of(params).leaves]
    assert not any(isinstance(one, eggroll.Frozen) for one in treatments)
    members = es.map(state, lambda params, key: read_all(params, config))
    for i in range(4):
        right = read_all(es.member(state, i), config)
        assert np.abs(right - read_all(params, config)).max() > 0.1
        np.testing.assert_allclose(members[i], right, atol=2e-4)


def test_a_quantised_model_is_close_and_perturbed_as_floats_are() -> None:
    config = dataclasses.replace(QWEN2, initializer_range=0.1)
    params = init(jax.random.key(0), config)
    small = quantise(params, output_axis)

    def rebuilt(int8: Any, matrix: Any, axis: int) -> Any:
        scale = jnp.expand_dims(int8["scale"], axis)
        built = int8["int8"] * scale
        # No entry is further off than half of a step.
        assert (jnp.abs(built - matrix) <= 0.501 * scale).all()
        return built

    layers = {
        name: rebuilt(int8, params["layers"][name], -2) if isinstance(int8, dict) else int8
        for name, int8 in small["layers"].items()
    }
    table = rebuilt(small["embed_tokens"], params["embed_tokens"], -1)
    built = {**params, "embed_tokens": table, "layers": layers}
    logits, right = run(small, TOKENS, config), run(params, TOKENS, config)
    np.testing.assert_allclose(logits, run(built, TOKENS, config), atol=1e-4)
    assert 0 < jnp.abs(logits - right).max() < 0.02 * jnp.abs(right).max()

    with pytest.raises(ValueError, match="since parameter 'layers/down_proj/int8' is quantised"):
        plan()(small, 1)
    sizes = steps(small)
    es = eggroll.EvolutionStrategy(
        optimizer=optax.sgd(0.1), population=4, sigma=0.1, plan=plan([], sizes), on_dense="error"
    )
    state = es.init(small, jax.random.key(2))
    trained = {leaf.path: leaf.sigma for leaf in es.plan_of(small).leaves if leaf.trainable}
    matrices = {f"layers/{name}" for name in small["layers"] if "_proj" in name}
    assert set(trained) == {f"{name}/{part}" for name in matrices for part in ("int8", "scale")}
    assert {trained[f"{name}/scale"] for name in matrices} == {1 / 127}
    # What a weight moves by is that of the float model.
    assert all(trained[f"{name}/int8"] * sizes[name] == pytest.approx(1) for name in matrices)
    tokens = jnp.asarray(TOKENS)
    members = es.map(state, lambda params, key: apply(params, tokens, config))
    for i in range(4):
        right = run(es.member(state, i), TOKENS, config)
        np.testing.assert_allclose(members[i], right, atol=2e-4)
    assert jnp.abs(members[0] - logits).max() > 0.01
    back = dequantise(small, jnp.float32, output_axis)
    np.testing.assert_allclose(run(back, TOKENS, config), logits, atol=1e-4)


def test_a_plan_of_unknown_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="train must name some of 'embeddings', 'head', "):
        plan(["norms"])
    with pytest.raises(ValueError, match="the head is the embedding: name 'embeddings' instead"):
        plan(["head"])(init(jax.random.key(0), QWEN2), 1)


def test_a_stretched_model_turns_slowly_where_waves_are_long() -> None:
    """Of 4 wavelengths 6.3, 63, 628, 6283 with a context of 400: kept, kept, between, divided by 8."""
    scaling = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=400)
    scaling = dataclasses.replace(scaling, low_freq_factor=0.5, high_freq_factor=2.0)
    x = jnp.ones((1, 1, 8))
    turned = rotate(x, jnp.array([1]), 10000.0, scaling)[0, 0]
    # cos - sin and cos + sin of the angle, which is below a right one.
    angles = jnp.arctan2(turned[4:], turned[:4]) - jnp.pi / 4
    kept = (400 / (2 * np.pi * 100) - 0.5) / 1.5
    right = [1, 0.1, 0.01 * (kept + (1 - kept) / 8), 0.001 / 8]
    np.testing.assert_allclose(angles, right, rtol=1e-3, atol=1e-7)
