"""RWKV-7 against its authors' package, its two recurrences against each other, its files, and EGGROLL."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import eggroll
from experiments.models import families, plans, quantised, rwkv7, rwkv7_recurrence
from experiments.models.rwkv7 import RWKV7Config
from experiments.models.rwkv7_recurrence import inverse_of_one_minus
from experiments.models.rwkv7_weights import convert_pth, load, save, to_pth
from experiments.run.errors import UsageError

CONFIG = RWKV7Config(
    vocab_size=11, hidden_size=16, num_hidden_layers=3, head_dim=8, intermediate_size=24,
    decay_low_rank_dim=4, a_low_rank_dim=5, v_low_rank_dim=6, gate_low_rank_dim=7,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 11, 20)
sequence = functools.partial(jax.jit, static_argnums=3)(rwkv7.sequence)
step = functools.partial(jax.jit, static_argnums=3)(rwkv7.step)
prefill = functools.partial(jax.jit, static_argnums=(3, 4))(rwkv7.prefill)


def noisy(config: RWKV7Config, scale: float) -> Any:
    """Parameters of which none is a zero or a one, as they are after training."""
    params = rwkv7.init(jax.random.key(0), config)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    add = lambda x, key: x + scale * jax.random.normal(key, x.shape)
    return jax.tree.unflatten(tree, map(add, leaves, keys))


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.jit(lambda: noisy(CONFIG, 0.3))()


def close(left: Any, right: Any, atol: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4), left, right)


# ---------------------------------------------------------------- the authors' package

ORACLE = """
import sys
import numpy as np
from rwkv.model import RWKV

model = RWKV(model=sys.argv[1], strategy="cpu fp32")
tokens = np.load(sys.argv[2]).tolist()
whole, after = model.forward(tokens, None, full_output=True)
state, steps = None, []
for token in tokens:
    logits, state = model.forward([token], state)
    steps.append(logits.numpy())
pack = lambda i, state: np.stack([x.numpy() for x in state[i::3]])
found = {f"state{i}": pack(i, after) for i in range(3)}
np.savez(sys.argv[3], whole=whole.numpy(), steps=np.stack(steps), **found)
"""


def test_it_is_the_authors_own(tmp_path: Path) -> None:
    """In a process of its own: the package sets flags of torch, and is told apart by the environment."""
    pytest.importorskip("torch")
    pytest.importorskip("rwkv")
    config = RWKV7Config(vocab_size=50, hidden_size=128, num_hidden_layers=3)
    params = jax.jit(lambda: noisy(config, 0.1))()
    tokens = np.random.default_rng(1).integers(0, 50, 37)
    to_pth(tmp_path / "model.pth", config, params)
    np.save(tmp_path / "tokens.npy", tokens)
    flags = {"RWKV_V7_ON": "1", "RWKV_CUDA_ON": "0", "RWKV_JIT_ON": "0", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [
            sys.executable,
            "-c",
            ORACLE,
            *(str(tmp_path / x) for x in ("model", "tokens.npy", "out")),
        ],
        check=True,
        env={**os.environ, **flags},
        stdout=subprocess.DEVNULL,
    )
    right = np.load(tmp_path / "out.npz")
    assert np.abs(right["whole"]).max() > 1
    assert convert_pth(tmp_path / "model.pth", tmp_path / "folder") == config
    config, params = load(tmp_path / "folder")
    state = rwkv7.initial_state(config)
    logits, after = sequence(params, state, tokens, config)
    close(logits, right["whole"], 1e-4)
    close(tuple(after), tuple(right[f"state{i}"] for i in range(3)), 1e-4)
    for token, expected in zip(tokens, right["steps"], strict=True):
        logits, state = step(params, state, token, config)
        close(logits, expected, 1e-4)
    close(state, after, 1e-4)


# ---------------------------------------------------------------- the recurrence


def inputs(length: int, seed: int, kind: str) -> tuple[jax.Array, ...]:
    """The arguments of a recurrence over 2 heads 8 wide."""
    chance = np.random.default_rng(seed)
    normal = lambda *shape: chance.normal(size=shape).astype(np.float32)
    r, k, v, kk = (normal(length, 2, 8) for _ in range(4))
    w, a = 1 / (1 + np.exp(-3 * normal(2, length, 2, 8)))
    if kind == "fastest":
        w = np.ones_like(w)
    if (
        kind == "repeated"
    ):  # one direction is replaced as a whole again and again, and nothing decays
        kk, w, a = np.broadcast_to(kk[:1], kk.shape), np.zeros_like(w), np.ones_like(a)
    kk = kk / np.linalg.norm(kk, axis=-1, keepdims=True)
    arrays = (normal(2, 8, 8), r, -rwkv7.FASTEST * w, k, v, -kk, kk * a)
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


scanned = jax.jit(rwkv7_recurrence.recurrence_scan)
chunked = functools.partial(jax.jit, static_argnames="chunk")(rwkv7_recurrence.recurrence_chunked)


@settings(max_examples=20)
@given(
    length=st.sampled_from([1, 15, 16, 17, 48]),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["any", "fastest", "repeated"]),
    chunk=st.sampled_from([16, 12]),
)
def test_chunks_are_the_same_as_one_token_after_another(
    length: int, seed: int, kind: str, chunk: int
) -> None:
    arrays = inputs(length, seed, kind)
    close(chunked(*arrays, chunk=chunk), scanned(*arrays), 1e-4)


def test_the_longest_chunk_named_is_within_float32() -> None:
    arrays = inputs(100, 0, "fastest")
    close(chunked(*arrays, chunk=64), scanned(*arrays), 1e-4)


@pytest.mark.parametrize("kind", ["any", "fastest", "repeated"])
def test_gradients_of_chunks_are_the_same_too(kind: str) -> None:
    arrays = inputs(21, 3, kind)
    weight = np.random.default_rng(4).normal(size=(21, 2, 8))

    def gradient(recurrence: Callable) -> Any:
        def loss(arrays: Any) -> Any:
            y, state = recurrence(*arrays)
            return jnp.sum(weight * y) + jnp.sum(state**2)

        return jax.jit(jax.grad(loss))(arrays)

    close(
        gradient(rwkv7_recurrence.recurrence_chunked),
        gradient(rwkv7_recurrence.recurrence_scan),
        1e-3,
    )


# ---------------------------------------------------------------- sequences


def test_a_text_at_once_in_two_parts_and_token_by_token_are_one(params: Any) -> None:
    start = rwkv7.initial_state(CONFIG)
    logits, after = sequence(params, start, TOKENS, CONFIG)
    first, state = sequence(params, start, TOKENS[:9], CONFIG)
    second, state = sequence(params, state, TOKENS[9:], CONFIG)
    close(np.concatenate([first, second]), logits, 1e-4)
    close(state, after, 1e-4)
    state = start
    for token, expected in zip(TOKENS, logits, strict=True):
        got, state = step(params, state, token, CONFIG)
        close(got, expected, 1e-4)
    close(state, after, 1e-4)


def test_padding_touches_nothing(params: Any) -> None:
    start = sequence(params, rwkv7.initial_state(CONFIG), TOKENS[:3], CONFIG)[1]
    logits, right = sequence(params, start, TOKENS[:6], CONFIG)
    for padding in (0, 5):
        padded = np.r_[TOKENS[:6], np.full(14, padding)]
        got, state = sequence(params, start, padded, CONFIG, 6)
        close((got[:6], state), (logits, right))
    _, state = sequence(params, start, TOKENS, CONFIG, 0)
    jax.tree.map(np.testing.assert_array_equal, state, start)


def test_prompts_of_a_batch_are_read_and_gone_on_with(params: Any) -> None:
    """As a sampler does it: prompts of several lengths under vmap, then a token each."""
    prompts, lengths = np.stack([TOKENS[:8], TOKENS[8:16]]), np.array([8, 3])
    logits, cache = jax.vmap(lambda p, n: prefill(params, p, n, CONFIG, 12))(prompts, lengths)
    decode = jax.vmap(lambda c, token, t: rwkv7.decode(params, c, token, t, CONFIG))
    again, _ = decode(cache, np.array([4, 5]), lengths)
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        tokens = np.r_[prompt[:length], 4 + i]
        right, _ = sequence(params, rwkv7.initial_state(CONFIG), tokens, CONFIG)
        close((logits[i], again[i]), (right[-2], right[-1]), 1e-4)


def test_layer_0_mixes_no_values_in(params: Any) -> None:
    att = dict(params["blocks"]["att"])
    for name in ("v0", "v1", "v2"):
        att[name] = att[name].at[0].set(7.0)
    changed = {**params, "blocks": {**params["blocks"], "att": att}}
    start = rwkv7.initial_state(CONFIG)
    right = sequence(params, start, TOKENS, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, sequence(changed, start, TOKENS, CONFIG), right)
    att["v0"] = att["v0"].at[1].set(7.0)
    assert not np.allclose(sequence(changed, start, TOKENS, CONFIG)[0], right[0], atol=1e-3)


def test_bfloat16_stays_bfloat16_but_the_matrices_of_heads(params: Any) -> None:
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    start = rwkv7.initial_state(CONFIG, jnp.bfloat16)
    logits, state = sequence(half, start, TOKENS, CONFIG)
    assert logits.dtype == state.att_x.dtype == state.ffn_x.dtype == jnp.bfloat16
    assert state.kv.dtype == jnp.float32
    same, state = sequence(half, rwkv7.initial_state(CONFIG), TOKENS, CONFIG)
    assert state.att_x.dtype == jnp.float32
    np.testing.assert_array_equal(same, logits)
    right, _ = sequence(params, rwkv7.initial_state(CONFIG), TOKENS, CONFIG)
    assert jnp.abs(logits - right).max() < 0.1 * jnp.abs(right).max()


# ---------------------------------------------------------------- EGGROLL


@pytest.mark.parametrize(
    "train",
    [pytest.param((), marks=pytest.mark.soak), plans.GROUPS],
    ids=["matrices", "all"],
)
def test_eggroll_perturbs_it_as_it_is(train: tuple[str, ...], params: Any) -> None:
    es = eggroll.EvolutionStrategy(
        population=4,
        rank=1,
        sigma=0.1,
        optimizer=optax.sgd(0.1),
        plan=rwkv7.plan(train),
        on_dense="error",
    )
    state = es.init(params, jax.random.key(2))
    frozen = {leaf.path for leaf in es.plan_of(params).leaves if not leaf.trainable}
    assert ("head" in frozen) == ("head" not in train) and "blocks/att/w1" not in frozen

    def run(params: Any, key: Any) -> Any:
        logits, cache = rwkv7.prefill(params, jnp.asarray(TOKENS[:8]), 6, CONFIG, 9)
        return logits, rwkv7.decode(params, cache, logits.argmax(), 6, CONFIG)

    found = es.map(state, run)
    right = jax.jit(jax.vmap(lambda params: run(params, None)))(es.ask(state, range(4)))
    close(found, right, 1e-4)
    assert not np.allclose(found[0][0], found[0][1], atol=1e-2)


# ---------------------------------------------------------------- files


def test_files_give_the_same_back(params: Any, tmp_path: Path) -> None:
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    save(tmp_path, CONFIG, half)
    config, found = load(tmp_path)
    assert config == CONFIG and families.of_folder(tmp_path).config is RWKV7Config
    for name in ("v0", "v1", "v2"):  # those of layer 0 are in no file
        assert not found["blocks"]["att"][name][0].any()
        half["blocks"]["att"][name] = half["blocks"]["att"][name].at[0].set(0)
    jax.tree.map(np.testing.assert_array_equal, found, half)
    assert load(tmp_path, jnp.float32)[1]["head"].dtype == jnp.float32
    tensors = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(
        tensors["blocks.2.ffn.key.weight"], half["blocks"]["ffn"]["key"][2].T
    )
    assert tensors["blocks.1.att.x_r"].shape == (1, 1, 16)
    assert tensors["blocks.0.ln0.weight"].shape == (16,)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_pth_gives_the_same_back(layers: int, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    config = dataclasses.replace(CONFIG, num_hidden_layers=layers)
    params = rwkv7.init(jax.random.key(0), config)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    to_pth(tmp_path / "m.pth", config, params)
    found = convert_pth(tmp_path / "m.pth", tmp_path / "folder")
    again, converted = load(tmp_path / "folder")
    assert found == again
    if layers > 1:
        assert found == config
        jax.tree.map(np.testing.assert_array_equal, converted, params)


def test_a_pth_that_is_no_rwkv_7_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path, folder = tmp_path / "m.pth", tmp_path / "folder"
    for content, words in (
        ({"emb.weight": torch.zeros(7, 4)}, "is no RWKV-7 file: it has no tensor blocks.0.att.r_k"),
        ({"model": {"a": torch.zeros(1)}}, "it holds more than tensors with names"),
        (
            {"emb.weight": torch.zeros(7, 4), "blocks.0.att.r_k": torch.zeros(3, 2)},
            r"blocks.0.att.r_k is \[3, 2\] and emb.weight has 4 columns, not 6",
        ),
        (Path("code"), "cannot be read as a .pth of weights"),  # would be made by running code
    ):
        torch.save(content, path)
        with pytest.raises(UsageError, match=words):
            convert_pth(path, folder)
    path.write_bytes(b"no file of torch's")
    with pytest.raises(UsageError, match="cannot be read as a .pth of weights"):
        convert_pth(path, folder)
    assert not folder.exists()


def add(tensors: dict[str, np.ndarray]) -> None:
    tensors["blocks.1.ffn.s_emb.weight"] = tensors["head.weight"]


def cut(tensors: dict[str, np.ndarray]) -> None:
    tensors["blocks.1.att.key.weight"] = tensors["blocks.1.att.key.weight"][:, :-1].copy()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("blocks.2.att.g1"), "lacks the tensor blocks.2.att.g1"),
        (add, "has the tensor blocks.1.ffn.s_emb.weight, which RWKV-7 with 3 layers does not"),
        (cut, r"blocks.1.att.key.weight must have the shape \[16, 16\], got \[16, 15\]"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(change: Callable, words: str, params: Any, tmp_path: Path) -> None:
    save(tmp_path, CONFIG, params)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=words):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "model_type must be 'rwkv7', got 'llama'"),
        ({"hidden_size": "16"}, "config.json: hidden_size '16' must be a whole number from 1"),
        ({"hidden_size": True}, "config.json: hidden_size True must be a whole number"),
        ({"head_dim": 8.0}, "config.json: head_dim 8.0 must be a whole number"),
        ({"head_dim": None}, "config.json: head_dim None must be a whole number"),
        ({"intermediate_size": 0}, "config.json: intermediate_size 0 must be a whole number"),
        ({"vocab_size": -1}, "config.json: vocab_size -1 must be a whole number"),
        (
            {"num_hidden_layers": 10**30},
            "config.json: num_hidden_layers 1000.* must be a whole number",
        ),
        (
            {"gate_low_rank_dim": [8]},
            r"config.json: gate_low_rank_dim \[8\] must be a whole number",
        ),
        (
            {"a_low_rank_dim": float("nan")},
            "config.json: a_low_rank_dim nan must be a whole number",
        ),
        ({"vocab_size": ...}, "config.json: vocab_size is missing; it must be a whole number"),
        ({"rope": 1}, "config.json: rope is no setting of RWKV-7; a_low_rank_dim, .* are"),
        ({"hidden_size": 17}, "hidden_size 17 is no multiple of head_dim 8"),
    ],
)
def test_wrong_settings_are_named(
    changes: dict[str, Any], words: str, params: Any, tmp_path: Path
) -> None:
    save(tmp_path, CONFIG, params)
    content = json.loads((tmp_path / "config.json").read_text())
    content = {k: v for k, v in {**content, **changes}.items() if v is not ...}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=words):
        load(tmp_path)


def test_files_that_are_missing_or_torn_are_named(params: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder of a model: it has no config.json"):
        load(tmp_path)
    save(tmp_path, CONFIG, params)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UsageError, match="model.safetensors cannot be read as safetensors"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(UsageError, match="model.safetensors cannot be read as safetensors"):
        load(tmp_path)


def test_sizes_and_parts_that_there_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size 16 is no multiple of head_dim 7"):
        dataclasses.replace(CONFIG, head_dim=7)
    with pytest.raises(ValueError, match="num_hidden_layers must be at least 1, got 0"):
        dataclasses.replace(CONFIG, num_hidden_layers=0)
    with pytest.raises(
        ValueError, match="train must name some of 'embeddings', 'head', 'vectors', got 'biases'"
    ):
        rwkv7.plan(["biases"])


def test_neither_beginning_nor_learning_calls_lapack() -> None:
    """OpenBLAS can come to wait for itself in a program that calls it from several threads."""

    def learn(key: Any) -> Any:
        params = rwkv7.init(key, CONFIG)
        read = lambda params: rwkv7.sequence(
            params, rwkv7.initial_state(CONFIG), jnp.asarray(TOKENS), CONFIG
        )
        return jax.grad(lambda params: read(params)[0].sum())(params)

    assert "custom_call" not in jax.jit(learn).lower(jax.random.key(0)).as_text()


@pytest.mark.parametrize("n", [1, 5, 16])
def test_triangular_systems_are_solved(n: int) -> None:
    lower = np.tril(np.random.default_rng(n).normal(size=(3, n, n)), -1).astype(np.float32)
    found = inverse_of_one_minus(jnp.asarray(lower))
    right = np.linalg.inv(np.eye(n) - lower.astype(np.float64))
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4 * np.abs(right).max())


def test_a_quantised_model_is_close_and_perturbed_as_floats_are(params: Any) -> None:
    small = quantised.quantise(params, rwkv7.output_axis)
    begin = rwkv7.initial_state(CONFIG)
    logits, _ = sequence(small, begin, TOKENS, CONFIG)
    back = quantised.dequantise(small, jnp.float32, rwkv7.output_axis)
    close(logits, sequence(back, begin, TOKENS, CONFIG)[0], atol=1e-4)
    right = sequence(params, begin, TOKENS, CONFIG)[0]
    assert 0 < jnp.abs(logits - right).max() < 0.1 * jnp.abs(right).max()
    sizes = quantised.steps(small)
    es = eggroll.EvolutionStrategy(
        optimizer=optax.sgd(0.1), population=2, sigma=0.1, on_dense="error",
        plan=rwkv7.plan(["embeddings", "head"], sizes),
    )  # fmt: skip
    state, tokens = es.init(small, jax.random.key(2)), jnp.asarray(TOKENS)
    members = es.map(state, lambda params, key: rwkv7.sequence(params, begin, tokens, CONFIG)[0])
    assert jnp.abs(members[0] - logits).max() > 0.01
    for i in range(2):
        close(members[i], sequence(es.member(state, i), begin, TOKENS, CONFIG)[0], atol=3e-4)
