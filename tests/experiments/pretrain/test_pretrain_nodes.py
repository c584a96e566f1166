"""Language models are pretrained by node noise, with the exact gradient of their head."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import integer
from eggroll.shaping import rules
from experiments.models import egg
from experiments.pretrain.config import PRESETS, Config
from experiments.pretrain.data import Text, join, windows
from experiments.pretrain.models import make_model
from experiments.pretrain.nodes import ByNodeNoise, head_gradient
from experiments.pretrain.train import Pretraining, make_method
from experiments.run.cli import main
from experiments.run.fields import changed
from experiments.run.metrics import read_metrics
from experiments.run.train import train
from experiments.run.trainer import Carry

SOURCE = str(Path(rules.__file__))
PROVERB = b"a stitch in time saves nine; "
MODELS = ("egg", "float-egg", "gru", "transformer")
# No axis of an activation is as long as what a member reads.
SMALL: dict[str, Any] = dict(
    perturb="nodes", population=64, group=2, tokens=7, width=8, held_out_streams=2, held_out_tokens=32
)  # fmt: skip
FLOATS: dict[str, Any] = dict(sigma=0.1, optimizer="adam", learning_rate=0.03)


def settings(**changes: Any) -> Config:
    own = dict(sigma=0.25, alpha_decay=0.02) if changes.get("model", "egg") == "egg" else FLOATS
    return changed(PRESETS["tiny"], {"data": SOURCE, **SMALL, **own, **changes})


def proverbs(config: Config) -> Text:
    """A text that is learned in no time, and its held-out part."""
    count = config.held_out_streams * config.held_out_tokens
    return Text(join([PROVERB * 40]), join([PROVERB * 40])[: count + 1])


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("name", MODELS)
def test_losses_of_bytes_sum_to_the_loss(name: str) -> None:
    model = make_model(settings(model=name))
    params = jax.jit(model.init)(jax.random.key(0))
    text = jnp.asarray(join([PROVERB])[:8], jnp.uint8)
    state, total = jax.jit(model.loss)(params, model.state, text)
    after, losses, inputs = jax.jit(model.losses)(params, model.state, text)
    assert losses.shape == (7,) and inputs.shape == (7, 8)
    np.testing.assert_allclose(losses.sum(), total, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after, state)


@pytest.mark.parametrize("name", MODELS[1:])
def test_the_heads_gradient_is_that_of_the_mean_loss(name: str) -> None:
    model = make_model(settings(model=name))
    head, params = model.head, jax.jit(model.init)(jax.random.key(0))
    texts = jnp.asarray(windows(join([PROVERB * 3]), 4, 7, 0))

    def losses(weights: Any) -> Any:
        run = jax.vmap(model.losses, (None, None, 0))
        _, losses, inputs = run({**params, head.name: weights}, model.state, texts)
        return losses.mean(), inputs

    @jax.jit
    def both(weights: Any) -> Any:
        right, inputs = jax.grad(losses, has_aux=True)(weights)
        return right, head_gradient(head, weights, inputs, texts[:, 1:].astype(jnp.int32))

    right, found = both(params[head.name])
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)


def test_the_error_of_integer_logits_is_the_rounded_softmax() -> None:
    chance = np.random.default_rng(0)
    sizes = chance.uniform(0, 100, (50, 1))
    logits = np.clip(np.round(sizes * chance.standard_normal((50, 256))), -127, 127)
    logits = jnp.asarray(np.concatenate([logits, [[127] * 256, [-127] * 256]]), jnp.int8)
    targets = jnp.asarray(chance.integers(0, 256, 52), jnp.int32)
    found = jax.jit(jax.vmap(egg.error))(logits, targets)
    softmax = jax.nn.softmax(logits.astype(jnp.float32) / 16 * jnp.log(2.0), axis=-1)
    right = 127 * 2**7 * (softmax - jax.nn.one_hot(targets, 256))
    # Half a unit of rounding, and what the tables round down: a hundredth at most.
    np.testing.assert_allclose(found, right, rtol=0.01, atol=64)
    assert float(jnp.abs(found - right).mean()) < 2
    # Shares below 1/254 are seen, or bytes that never come would never get less.
    small = (softmax > 0.0005) & (softmax < 1 / 254) & (found != right)
    assert small.any() and jnp.all(found[small] != 0)


@pytest.mark.parametrize(("population", "count"), [(1024, 7), (4096, 50)])
def test_integer_gradients_of_the_head_are_in_deviations(population: int, count: int) -> None:
    model, chance = make_model(settings()), np.random.default_rng(0)
    weights = jnp.asarray(np.round(16 * chance.standard_normal((8, 256))), jnp.int8)
    pairs = np.round(16 * chance.standard_normal((population // 2, count, 8)))
    inputs = jnp.asarray(np.repeat(np.clip(pairs, -127, 127), 2, 0), jnp.int8)
    targets = jnp.repeat(jnp.asarray(chance.integers(0, 3, (population // 2, count))), 2, 0)
    found = jax.jit(lambda *args: head_gradient(model.head, *args))(weights, inputs, targets)
    assert found.dtype == jnp.int32
    flat = [x[::2].reshape(-1, *x.shape[2:]) for x in (inputs, targets)]
    x, errors = (np.asarray(y, float) for y in (flat[0], model.head.errors(weights, *flat)))
    likely = np.sqrt((errors**2).mean(0)) > 32
    deviation = np.sqrt(np.outer((x**2).sum(0), (errors**2).sum(0)) / len(x))
    right = ((x.T @ errors) / np.maximum(deviation, 1))[:, likely]
    # What is far beyond any threshold is cut off.
    right, scores = (
        np.clip(right, -9, 9),
        np.asarray(found)[:, likely] / (256 * (population / 2) ** 0.5),
    )
    assert likely.sum() > 20 and np.abs(right).max() > 4
    np.testing.assert_allclose(np.clip(scores, -9, 9), right, rtol=0.03, atol=0.1)


def test_the_heads_sum_of_integers_fits_32_bits() -> None:
    model = make_model(settings())
    inputs = jnp.full((4096, 50, 8), 127, jnp.int8)
    weights = jnp.full((8, 256), -127, jnp.int8).at[:, 3].set(127)
    targets = jnp.full((4096, 50), 9, jnp.int32)
    found = jax.jit(lambda *args: head_gradient(model.head, *args))(weights, inputs, targets)
    # The derivative along what came is negative, that along what was predicted positive.
    assert int(found[0, 3]) > 2**17 and int(found[0, 9]) < -(2**17)
    assert jnp.all(found == found[0])


# ---------------------------------------------------------------- generations


def test_no_float_decides_anything() -> None:
    config = settings(update="momentum")
    method = make_method(config, make_model(config))
    assert isinstance(method, ByNodeNoise)
    carry = jax.eval_shape(method.start, jax.ShapeDtypeStruct((), jnp.int32))
    tokens = jax.ShapeDtypeStruct((config.streams, config.tokens + 1), jnp.uint8)
    assert integer.float_operations(lambda c, t: method.generation(c, t)[0], carry, tokens) == []


def run(config: Config, generations: int) -> tuple[Carry, dict[str, Any], float]:
    """The state, the last row, and held-out bits per byte of proverbs."""
    trainer = Pretraining(config, proverbs(config))
    state = trainer.start()
    for _ in range(generations):
        state, row = trainer.generation(state)
    return state, row, float(trainer.measure(state)["held_out_bits_per_byte"])


@pytest.mark.parametrize(
    ("changes", "generations", "bits"),
    [
        (dict(), 40, 6.0),
        (dict(model="gru"), 30, 4.5),
        pytest.param(dict(head="noise", gamma=0.0), 40, 7.0, marks=pytest.mark.soak),
        pytest.param(dict(model="float-egg"), 30, 6.0, marks=pytest.mark.soak),
        pytest.param(dict(model="transformer", sigma=0.5), 30, 4.5, marks=pytest.mark.slow),
    ],
)
def test_every_model_learns(changes: dict[str, Any], generations: int, bits: float) -> None:
    _, row, after = run(settings(**changes), generations)
    assert after < bits  # more than 7 before
    assert row["fitness_worst"] <= row["fitness_mean"] <= row["fitness_best"]
    assert row["invalid"] == 0 < row["weights_moved"]


@pytest.mark.soak
@pytest.mark.parametrize("changes", [dict(), dict(model="gru", same_bits=True)])
def test_devices_change_no_bit(changes: dict[str, Any]) -> None:
    one, four = (run(settings(devices=n, **changes), 2)[0] for n in (1, 4))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------- runs


@pytest.mark.soak
def test_a_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    whole, parts = (
        settings(run_dir=tmp_path / name, evaluate_every=2, checkpoint_seconds=0.0, sample_bytes=4)
        for name in ("whole", "parts")
    )
    train(changed(whole, generations=5))
    for generations in (3, 5):
        train(changed(parts, generations=generations))
    rows, results = [], []
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        rows.append([{**row, "timing": 0} for row in read_metrics(folder / "metrics.jsonl")])
        results.append(json.loads((folder / "result.json").read_text()))
    assert rows[0] == rows[1] and len(rows[0]) == 5
    assert results[0]["held_out_bits_per_byte"] == results[1]["held_out_bits_per_byte"]
    assert "by node noise in int8" in results[0]["sentence"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gamma", "2"], "--gamma 2.0: choose a number from 0 to 1"),
        (["--gamma", "0.3"], "--gamma 0.3: the credit of int8 models is shifted, so choose 0 or a power of 1/2"),
        (["--sigma", "0.1"], "--sigma 0.1: the noise of int8 models is shifted"),
        (["--model", "gru", "--algorithm", "backprop"], "--perturb nodes: backpropagation has no noise"),
        (["--population", "262144", "--group", "262144"], "the sum of the head's rule would not fit 32 bits"),
        (["--rank", "2"], "--rank 2: node noise has no rank"),
        (["--perturb", "weights", "--head", "noise"], "--head noise: a setting of --perturb nodes alone"),
        (["--perturb", "weights", "--gamma", "0.25"], "--gamma 0.25: a setting of --perturb nodes alone"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["pretrain", "--preset", "tiny", "--data", SOURCE, "--run-dir", str(tmp_path / "run")]
    assert main([*start, "--perturb", "nodes", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()
