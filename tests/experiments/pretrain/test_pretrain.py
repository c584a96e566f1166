"""Language models are pretrained, in integers and in floats; runs go on where they stopped."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from eggroll import integer
from eggroll.plan import by_shape
from eggroll.shaping import rules
from experiments.models import transformer as llama
from experiments.pretrain.anchors import Anchors
from experiments.pretrain.backprop import ByBackprop
from experiments.pretrain.config import PRESETS, Config
from experiments.pretrain.data import Text, join, pieces, windows
from experiments.pretrain.evolution import ByEvolution
from experiments.pretrain.models import Head, Model, bits_of, make_model, sample
from experiments.pretrain.train import Pretraining, in_words
from experiments.run.cli import main
from experiments.run.fields import changed
from experiments.run.metrics import read_metrics
from experiments.run.samples import add_sample
from experiments.run.train import train

TINY = PRESETS["tiny"]
MODELS = ("egg", "float-egg", "gru", "transformer")
# A source of this project: real text, and soon read.
SOURCE = str(Path(rules.__file__))
PROVERB = b"a stitch in time saves nine; "


def settings(**changes: Any) -> Config:
    return changed(TINY, {"data": SOURCE, **changes})


def proverbs(config: Config) -> Text:
    """A text that is learned in no time, and its held-out part."""
    count = config.held_out_streams * config.held_out_tokens
    return Text(join([PROVERB * 40]), join([PROVERB * 40])[: count + 1])


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("name", MODELS)
def test_models_are_of_the_same_size(name: str) -> None:
    config = settings(model=name, layers=6, width=256)
    params = jax.eval_shape(make_model(config).init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    # The paper's model has 4,856,064.
    assert abs(count / 4_856_064 - 1) < 0.01
    assert count == 4_856_064 or name == "transformer"


@pytest.fixture(scope="module", params=MODELS)
def begun(request: pytest.FixtureRequest) -> tuple[Model, Any]:
    model = make_model(settings(model=request.param, tokens=8, width=8))
    compiled = {name: jax.jit(getattr(model, name)) for name in ("init", "loss", "bits", "write")}
    return model._replace(**compiled), compiled["init"](jax.random.key(0))


def test_a_stream_goes_on_where_it_stopped(begun: tuple[Model, Any]) -> None:
    model, params = begun
    text = jnp.asarray(join([PROVERB])[:17], jnp.uint8)
    state, first = model.loss(params, model.state, text[:9])
    _, second = model.loss(params, state, text[8:])
    bits = model.bits(params, text)["bits_per_byte"]
    assert bits.shape == (16,)
    if not isinstance(model.state, tuple):
        # The loss is that of the softmax, exactly or (in integers) by less than 1/16 bit a byte.
        total = float(first + second) / model.unit
        assert abs(total - float(bits.sum())) < (1e-3 if model.unit == 1 else 1.0)


def test_a_zero_begins_a_document(begun: tuple[Model, Any]) -> None:
    model, params = begun
    if isinstance(model.state, tuple):
        return  # windows of a transformer may hold two documents
    after = [
        model.bits(params, jnp.asarray(join([start, b"same"]), jnp.uint8))["bits_per_byte"][-4:]
        for start in (b"one beginning", b"another start")
    ]
    np.testing.assert_array_equal(*after)


def test_what_is_written_is_what_is_measured(begun: tuple[Model, Any]) -> None:
    model, params = begun
    text = join([b"abcdefg"])
    writer, costs = model.writer, []
    for byte, target in itertools.pairwise(text):
        writer, logits = model.write(params, writer, jnp.int32(byte))
        costs.append(float(bits_of(logits, jnp.int32(target))))
    right = model.bits(params, jnp.asarray(text))["bits_per_byte"]
    np.testing.assert_allclose(costs, right, rtol=1e-4)


def test_a_transformer_sees_at_least_half_a_context() -> None:
    model = make_model(settings(model="transformer", tokens=6))
    params = jax.jit(model.init)(jax.random.key(0))
    text = jnp.asarray(join([b"0123456789ABC"]), jnp.int32)  # 14 bytes, 13 predictions
    shape = llama.TransformerConfig(
        vocab_size=256, hidden_size=16, intermediate_size=42, num_hidden_layers=1, num_attention_heads=1
    )  # fmt: skip

    @jax.jit
    def right(params: Any) -> Any:
        windows = jnp.stack([jnp.pad(text, (0, 2))[i : i + 7] for i in (0, 3, 6, 9)])
        logits = jax.nn.log_softmax(llama.apply(params, windows[:, :-1], shape)) / -np.log(2)
        costs = jnp.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]
        return jnp.concatenate([costs[0], *costs[1:, 3:]])[:13]

    found = jax.jit(model.bits)(params, text)["bits_per_byte"]
    np.testing.assert_allclose(found, right(params), rtol=1e-4)


# ---------------------------------------------------------------- generations


def a_model(dtype: Any) -> Model:
    """One weight; a member's state is the last byte that it has read, and its loss that weight."""

    def loss(params: Any, state: Any, tokens: Any) -> Any:
        return tokens[-2].astype(jnp.int32), (params["w"] * 1).astype(jnp.int32)

    def losses(params: Any, state: Any, tokens: Any) -> Any:
        state, one = loss(params, state, tokens)
        return state, one[None], jnp.zeros((1, 1), dtype)

    return Model(
        init=lambda key: {"w": jnp.zeros((), dtype)}, plan=by_shape(), losses=losses, nodes={},
        head=Head("w", lambda w, x, targets: w), state=jnp.int32(0), loss=loss, unit=16, bits=lambda params, tokens: {},
        writer=(), write=lambda params, writer, byte: (writer, jnp.zeros(256).at[byte + 1].set(99.0)),
    )  # fmt: skip


def test_members_of_a_group_read_the_same_stream() -> None:
    config = settings(population=12, group=4, tokens=5)
    text = join([PROVERB])
    method = ByEvolution(config, a_model(jnp.int8))
    carry = method.start(jnp.int32(0))
    for cursor in range(3):
        read = windows(text, 3, 5, cursor)
        carry, row = method.generation(carry, jnp.asarray(read))
        assert carry.own.tolist() == np.repeat(read[:, -2], 4).tolist()
        assert int(carry.generation) == cursor + 1
    assert row["train_bits_per_byte"].shape == ()


def test_floats_in_an_integer_model_are_refused() -> None:
    method = ByEvolution(settings(), a_model(jnp.float32))
    with pytest.raises(
        ValueError, match="parameter 'w' is float32 in an integer model: must be int8"
    ):
        method.start(jnp.int32(0))


def test_no_float_decides_anything() -> None:
    config = settings(update="error_feedback")
    method = ByEvolution(config, make_model(config))
    carry = method.start(jnp.int32(0))
    tokens = jnp.zeros((config.streams, config.tokens + 1), jnp.uint8)
    assert integer.float_operations(lambda c, t: method.generation(c, t)[0], carry, tokens) == []


def test_a_text_is_written_byte_by_byte() -> None:
    model, key = a_model(jnp.int8), jax.random.key(0)
    assert sample(model, {}, key, 5) == bytes([1, 2, 3, 4, 5])
    assert sample(model, {}, key, 4, b"xA") == b"BCDE"


def test_texts_differ_by_their_key(begun: tuple[Model, Any]) -> None:
    model, params = begun
    texts = [sample(model, params, jax.random.key(i), 24) for i in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]
    assert len(texts[0]) == 24


def test_samples_of_a_continued_run_replace_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "samples.txt"
    for generation in (0, 10, 20, 10):
        add_sample(path, generation, b"after 99 updates\n\x85x%d" % generation)
    lines = path.read_text().split("\n")
    assert lines[0] == "after 0 updates"
    assert lines[3:] == ["after 10 updates", "    after 99 updates", "    \\x85x10", ""]


# ---------------------------------------------------------------- learning


def learn(config: Config, generations: int) -> tuple[float, float]:
    """Held-out bits per byte of proverbs before and after training."""
    trainer = Pretraining(config, proverbs(config))
    state = trainer.start()
    before = trainer.measure(state)["held_out_bits_per_byte"]
    for _ in range(generations):
        state, _ = trainer.generation(state)
    return float(before), float(trainer.measure(state)["held_out_bits_per_byte"])


SMALL: dict[str, Any] = dict(held_out_streams=2, held_out_tokens=32, width=8)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "optim.lion", "optim.adamp", "optim.frugal"])
def test_every_optimizer_learns(optimizer: str) -> None:
    # A table of what follows each byte: soon compiled, soon learned.
    logits = lambda params, tokens: params["in"][tokens] @ params["out"]

    def loss(params: Any, state: Any, tokens: Any) -> Any:
        tokens = tokens.astype(jnp.int32)
        return state, bits_of(logits(params, tokens[:-1]), tokens[1:]).sum()

    def init(key: Any) -> Any:
        inner, outer = jax.random.split(key)
        return {
            "in": jax.random.normal(inner, (256, 16)),
            "out": jax.random.normal(outer, (16, 256)) / 4,
        }

    rate = {"sgd": 10.0, "optim.lion": 0.03}.get(optimizer, 0.1)
    config = settings(
        model="gru",
        algorithm="backprop",
        optimizer=optimizer,
        learning_rate=rate,
        batch=2,
        tokens=29,
    )
    model = a_model(jnp.float32)._replace(init=init, state=(), loss=loss, unit=1)
    method = ByBackprop(config, model)
    carry, text = method.start(jnp.int32(0)), join([PROVERB * 3])
    update = jax.jit(method.generation)
    for _ in range(60):
        carry, row = update(carry, jnp.asarray(windows(text, 2, 29, int(carry.generation))))
        if int(carry.generation) == 1:
            assert row["train_bits_per_byte"] > 6
    # Spaces and some letters are followed by more than one byte. Plain SGD is slow on rare ones.
    assert row["train_bits_per_byte"] < (6 if optimizer == "sgd" else 2)


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        (dict(model="transformer", algorithm="backprop", learning_rate=0.02), 4.0),
        (dict(model="gru", algorithm="backprop", learning_rate=0.03), 4.0),
        (dict(model="float-egg", optimizer="sgd", learning_rate=0.03, tokens=8), 6.0),
    ],
)
def test_every_model_learns(changes: dict[str, Any], bits: float) -> None:
    before, after = learn(settings(**{**SMALL, **changes}), 40)
    assert before > 7
    assert after < bits


@pytest.mark.parametrize("target", [None, 4.0])
def test_a_target_is_confirmed_by_streams_that_decided_nothing(target: float | None) -> None:
    config = settings(target=target, held_out_streams=4, held_out_tokens=8, width=8)
    text = proverbs(config)
    trainer = Pretraining(config, text)
    measured, fresh = trainer.held_out(fresh=False), trainer.held_out(fresh=True)
    whole = pieces(text.held_out, 4)
    np.testing.assert_array_equal(measured, whole if target is None else whole[0::2])
    np.testing.assert_array_equal(fresh, whole if target is None else whole[1::2])
    state = trainer.start()
    bits = trainer.model.bits
    right = jax.vmap(bits, (None, 0))(state.learner.params, fresh)["bits_per_byte"].mean()
    assert float(trainer.confirm(state)["fresh_bits_per_byte"]) == pytest.approx(float(right))


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny preset."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = settings(
        run_dir=folder, generations=60, sample_every=40, evaluate_every=20, checkpoint_seconds=0.0
    )
    result = train(config)
    assert result["held_out_bits_per_byte"] < result["held_out_bits_per_byte_before"] - 1
    return folder


def test_a_run_leaves_its_anchors_rows_and_samples(run: Path) -> None:
    found, result = (json.loads((run / f"{n}.json").read_text()) for n in ("anchors", "result"))
    assert list(found) == ["unigram", "bigram", "trigram", "gzip", "xz"]
    assert result["anchors"] == found
    assert result["tokens"] == 60 * 64 * 16
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["generation"] for row in rows if row["held_out_bits_per_byte"]] == [0, 20, 40]
    for row in rows[::20]:
        # What integers round down.
        assert 0 <= row["held_out_bits_per_byte"] - row["held_out_integer_bits_per_byte"] < 1 / 8
        assert 0 < row["weights_moved"] <= 1
        assert row["timing"]["tokens_per_second"] > 0
    text = (run / "samples.txt").read_text()
    assert [line for line in text.split("\n") if line.startswith("after")] == [
        f"after {g} updates" for g in (0, 40, 60)
    ]
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_reported_evaluated_and_exported(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["report", str(run), "--out", str(tmp_path)]) == 0
    assert main(["eval", str(run)]) == 0
    told = capsys.readouterr().out
    bits = json.loads((run / "result.json").read_text())["held_out_bits_per_byte"]
    assert f"held-out bits per byte: {bits:.6g} ±" in told
    assert main(["export", str(run), "--to", str(tmp_path / "params.safetensors")]) == 0
    tensors = load_file(tmp_path / "params.safetensors")
    assert {x.dtype for x in tensors.values()} == {np.dtype(np.int8)}
    assert tensors["params/layers/w1"].shape == (1, 16, 64)


def test_a_run_is_sampled(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", str(run), "--prompt", "def ", "import ", "--length", "9"]
    told = []
    for seed in ("0", "0", "1"):
        assert main([*words, "--seed", seed]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] != told[2]
    assert told[0].startswith("def ") and "\n\nimport " in told[0]
    greedy = []
    for seed in ("0", "1"):
        assert main([*words, "--seed", seed, "--temperature", "0"]) == 0
        greedy.append(capsys.readouterr().out)
    assert greedy[0] == greedy[1]
    assert main(["sample", str(run), "--temperature", "-1"]) == 2
    assert "--temperature -1.0: choose 0 or a positive number" in capsys.readouterr().err
    assert main(["sample", str(run), "--length", "0"]) == 2
    assert "--length 0: choose a whole number" in capsys.readouterr().err


def test_what_was_learned_is_told_by_the_anchors() -> None:
    known = Anchors(5.0, 4.0, 3.0, 2.0, 1.0)
    assert "less than how often" in in_words(5.5, known)
    assert "at 4.500 bits per byte, below unigrams (5.000)" in in_words(4.5, known)
    assert "below trigrams (3.000)" in in_words(2.9, known)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--population", "72", "--group", "16"], "--population 72: groups of 16 members do not divide it; choose a multiple, such as 80"),
        (["--population", "7"], "an even number of at least 2"),
        (["--group", "7"], "--group 7: members come in opposite pairs, so choose an even number"),
        (["--sigma", "0.1"], "--sigma 0.1: the noise of int8 models is shifted"),
        (["--algorithm", "backprop"], "an int8 model has no gradient"),
        (["--alpha", "1.5"], "--alpha 1.5: choose a number above 0, up to 1"),
        (["--alpha-decay", "-1"], "--alpha-decay -1.0: choose 0 or a positive number"),
        (["--held-out", "1"], "--held-out 1.0: choose a number above 0, below 1"),
        (["--chunk", "7"], "--chunk 7: members come in opposite pairs, so choose an even number"),
        (["--tokens", "0"], "--tokens 0: choose a whole number of at least 1"),
        (["--data", "minipil"], "did you mean 'minipile'"),
        (["--model", "gru", "--algorithm", "backprop", "--optimizer", "adamv"], "optax has no such optimizer; did you mean"),
        (["--target", "0"], "--target 0.0: choose a positive number of bits"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["pretrain", "--preset", "tiny", "--data", SOURCE, "--run-dir", str(tmp_path / "run")]
    assert main([*start, *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()
