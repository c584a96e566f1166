"""Digits are learned, by every way; data in MNIST's format is read, or refused in a sentence."""

import gzip
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.run.cli import main
from experiments.run.errors import UsageError
from experiments.run.fields import changed
from experiments.run.metrics import read_metrics
from experiments.run.train import train
from experiments.supervised.config import PRESETS
from experiments.supervised.data import FILES, digits, load
from experiments.supervised.train import Classifier, halves


def test_digits_are_divided_once_and_for_all() -> None:
    data = load(None)
    assert data.x.shape == (1437, 64)
    assert data.held_out_x.shape == (360, 64)
    assert data.classes == 10
    assert abs(data.x.mean()) < 1e-4
    assert abs(data.x.std() - 1) < 1e-4
    x, _, held_out, _ = digits()
    both = {row.tobytes() for row in x} & {row.tobytes() for row in held_out}
    assert not both


def write_mnist(folder: Path, packed: bool = True, **changes: bytes) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(0)
    arrays = {
        FILES[0]: chance.integers(0, 256, (20, 4, 4), np.uint8), FILES[1]: chance.integers(0, 3, 20, np.uint8),
        FILES[2]: chance.integers(0, 256, (8, 4, 4), np.uint8), FILES[3]: chance.integers(0, 3, 8, np.uint8),
    }  # fmt: skip
    for name, array in arrays.items():
        head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        content = changes.get(name, head + array.tobytes())
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return arrays


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_format_is_read(tmp_path: Path, packed: bool) -> None:
    arrays = write_mnist(tmp_path, packed)
    data = load(tmp_path)
    images = arrays[FILES[0]].reshape(20, 16).astype(float)
    np.testing.assert_allclose(
        data.x, (images - images.mean()) / images.std(), rtol=1e-4, atol=1e-5
    )
    assert data.held_out_x.shape == (8, 16)
    assert data.y.tolist() == arrays[FILES[1]].tolist()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (FILES[0], b"PNG", "does not begin as an IDX file of 3 axes"),
        (FILES[2], bytes([0, 0, 8, 3]) + struct.pack(">3I", 9, 4, 4) + bytes(5), r"5 bytes of data.*\[9, 4, 4\] needs 144"),
        (FILES[3], bytes([0, 0, 8, 1]) + struct.pack(">I", 7) + bytes(7), "8 held-out images, but 7 labels"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    write_mnist(tmp_path, **{name: content})
    with pytest.raises(UsageError, match=words):
        load(tmp_path)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither train-images-idx3-ubyte nor"):
        load(tmp_path)
    write_mnist(tmp_path)
    path = tmp_path / f"{FILES[0]}.gz"
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path)


SMALL: dict[str, Any] = dict(width=16, generations=60, evaluate_every=20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "changes", "right"),
    [
        ("digits", dict(population=256), 0.75),
        # So few members and updates learn faster from a smaller sigma than the preset's.
        ("digits-accuracy", dict(population=256, sigma=0.1), 0.5),
        ("digits-dense", dict(population=128), 0.8),
        ("digits-sgd", {}, 0.85),
        ("digits-adamw", dict(optimizer="adamw", learning_rate=0.02), 0.85),
    ],
)
def test_digits_are_learned(
    preset: str, changes: dict[str, Any], right: float, tmp_path: Path
) -> None:
    result = train(changed(PRESETS[preset], {**SMALL, **changes}, run_dir=tmp_path))
    assert result["held_out_accuracy_before"] < 0.3
    assert result["held_out_accuracy"] > right
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(rows) == 60
    assert rows[20]["held_out_accuracy"] > rows[0]["held_out_accuracy"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_nodes_learn_from_few_members(tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(population=8, batch=256, width=16, seeds=2)
    config = changed(PRESETS["digits-nodes"], run_dir=tmp_path, **settings)
    result = train(changed(config, generations=25, evaluate_every=25))
    assert result["held_out_accuracy_before"] < 0.3
    assert result["held_out_accuracy"] > 0.8
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(rows) == 25
    for low, mean, high in zip(
        *(rows[0][f"fitness_{name}"] for name in ("worst", "mean", "best")), strict=True
    ):
        assert low < mean < high


def test_batch_that_is_as_wide_as_the_layer() -> None:
    config = changed(PRESETS["digits-nodes"], width=32, population=4, batch=32)
    task = Classifier(config)
    _, row = task.generation(task.start())
    assert float(row["update_norm"]) > 0


@pytest.mark.parametrize("preset", ["digits", "digits-nodes"])
def test_seeds_in_one_program_are_the_runs_one_by_one(preset: str) -> None:
    config = changed(PRESETS[preset], width=4, population=16, batch=32, seed=5)

    # One program for both runs alone: everything random is in the state.
    single, several = Classifier(config), changed(config, seeds=2)

    def after(config: Any, task: Any, generations: int = 3) -> Any:
        state = Classifier(config).start()
        for _ in range(generations):
            state, _ = task.generation(state)
        return state, task.measure(state)["held_out_accuracy"]

    together, accuracies = after(several, Classifier(several))
    for i in range(2):
        alone, accuracy = after(changed(config, seed=5 + i), single)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-4)
        assert abs(float(accuracies[i]) - float(accuracy)) < 0.02


def test_every_image_is_used_once_a_pass() -> None:
    config = changed(PRESETS["digits-sgd"], width=4, depth=0, batch=479)
    assert 3 * config.batch == len(load(None).y)
    task = Classifier(config)
    # With rate 0 for weights, nothing moves: the mean loss of a pass is that of all images.
    still = Classifier(changed(config, learning_rate=1e-12))
    state, losses = still.start(), []
    for _ in range(3):
        state, row = still.generation(state)
        losses.append(float(row["loss"]))
    whole = Classifier(changed(config, batch=1437, learning_rate=1e-12))
    _, row = whole.generation(whole.start())
    assert abs(np.mean(losses) - float(row["loss"])) < 1e-4
    assert len(set(losses)) == 3
    assert task.measured == ("held_out_accuracy", "train_accuracy")


def test_evaluation_is_the_measurement() -> None:
    config = changed(PRESETS["digits"], width=4, population=4, batch=8, seeds=2)
    task = Classifier(config)
    state = task.start()
    found = task.evaluate(state, 1, 0)
    assert list(found) == ["held-out accuracy, seed 0", "held-out accuracy, seed 1"]
    measured = task.measure(state)["held_out_accuracy"].tolist()
    assert [values[0] for values in found.values()] == measured


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--population", "3"], "an even number"),
        (["--batch", "0"], "--batch 0: choose a whole number of at least 1"),
        (["--target", "1.5"], "--target 1.5: choose an accuracy"),
        (["--sigma-decay", "1.1"], "--sigma-decay 1.1: choose a number above 0, up to 1"),
        (["--optimizer", "adm"], "optax has no such optimizer; did you mean 'adam'"),
        (["--data", "/nowhere"], "--data /nowhere: there is no such file or folder"),
        (["--perturb", "nodes", "--rank", "2"], "--rank 2: noise on nodes has no rank"),
        (["--preset", "digits-sgd", "--perturb", "nodes"], "--algorithm backprop has no noise"),
    ],
)
def test_mistakes_get_one_sentence(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["supervised", *words, "--run-dir", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_target_is_confirmed_on_images_that_did_not_decide(tmp_path: Path) -> None:
    config = changed(PRESETS["digits-sgd"], width=16, target=0.6, run_dir=tmp_path)
    trainer = Classifier(config)
    measured, fresh = halves(trainer.data, two=True)
    assert len(measured[1]) + len(fresh[1]) == len(trainer.data.held_out_y)
    assert not {x.tobytes() for x in np.asarray(measured[0])} & {
        x.tobytes() for x in np.asarray(fresh[0])
    }
    result = train(config)
    assert result.learned
    assert result.generations < 600
    assert min(result["held_out_accuracy"], result["fresh_accuracy"]) >= 0.6
