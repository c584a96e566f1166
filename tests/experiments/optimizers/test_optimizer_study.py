"""Models are trained by any optimizer, go on where they stood, and are compared by what was measured."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import optim
from experiments.models import normalised
from experiments.optimizers import study as studies
from experiments.optimizers.config import PRESETS, Config
from experiments.optimizers.methods import LADDER, METHODS, STUDIES, config_of, methods_of, middle
from experiments.optimizers.results import Found, line, table
from experiments.optimizers.settings import optimizer_of
from experiments.optimizers.study import StudySettings, climb, study
from experiments.optimizers.tasks import digits_task, half, text_task, windows
from experiments.optimizers.train import OptimizerRun, programs, schedule
from experiments.run.cli import main
from experiments.run.errors import UsageError
from experiments.run.fields import changed, from_json, to_json
from experiments.run.metrics import read_metrics
from experiments.run.result import Result
from experiments.run.train import train

TINY = PRESETS["tiny"]
FRUGAL: dict[str, Any] = dict(optimizer="optim.frugal", density=0.5, gap=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Result]:
    config = changed(TINY, FRUGAL, run_dir=tmp_path_factory.mktemp("tiny"))
    return config, train(config)


def test_text_is_learned(trained: tuple[Config, Result]) -> None:
    config, result = trained
    assert abs(result["held_out_loss_before"] - math.log(256)) < 0.1
    loss = result["held_out_loss"]
    assert loss < 4
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    assert [row["generation"] for row in rows if row["held_out_loss"]] == [0, 10, 20]
    assert loss < rows[20]["held_out_loss"] < rows[0]["held_out_loss"]
    assert result.sentence.startswith(f"Learned to write: held-out text costs {loss:.3f} nats")
    assert (config.run_dir / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_other_commands_take_its_folder(
    trained: tuple[Config, Result], capsys: pytest.CaptureFixture[str]
) -> None:
    config, result = trained
    folder = str(config.run_dir)
    assert main(["eval", folder]) == 0
    assert f"held out loss: {result['held_out_loss']:.6g}" in capsys.readouterr().out
    assert main(["export", folder]) == 0
    assert f"{result.parameters:,} numbers" in capsys.readouterr().out
    assert main(["report", folder]) == 0


def test_the_state_is_as_small_as_it_should_be(trained: tuple[Config, Result]) -> None:
    """Adam's two moments of half of the columns, and of all that is not split; little beside them."""
    _, result = trained
    layer = 4 * 16 * 16 + 3 * 16 * 32
    others = 2 * 256 * 16 + 16 + 2 * 2 * 16
    assert result.parameters == 2 * layer + others
    moments = 8 * (layer + others)
    assert moments < result["state_bytes"] < 1.03 * moments


def test_a_run_that_was_cut_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = changed(TINY, FRUGAL)
    whole = changed(config, run_dir=tmp_path / "whole", generations=9)
    cut = changed(whole, run_dir=tmp_path / "cut")
    train(whole)
    train(changed(cut, generations=4))  # in the midst of a split
    assert train(cut).generations == 9
    params = []
    for folder in (whole.run_dir, cut.run_dir):
        assert main(["export", str(folder)]) == 0
        params.append(load_file(folder / "params.safetensors"))
    assert params[0].keys() == params[1].keys()
    for name, right in params[0].items():
        np.testing.assert_array_equal(params[1][name], right)
    losses = [
        [row["loss"] for row in read_metrics(c.run_dir / "metrics.jsonl")] for c in (cut, whole)
    ]
    assert losses[0] == losses[1]


def test_all_learning_rates_and_seeds_are_one_program() -> None:
    programs.cache_clear()
    OptimizerRun(changed(TINY, learning_rate=0.01, seed=0))
    other = OptimizerRun(changed(TINY, learning_rate=0.03, seed=7))
    assert programs.cache_info().misses == 1
    state, _ = other.generation(other.start())
    assert (float(state.own), int(state.seed)) == (pytest.approx(0.03), 7)
    OptimizerRun(changed(TINY, batch=4))
    assert programs.cache_info().misses == 2


def test_matrices_of_layers_may_take_smaller_steps() -> None:
    moved = []
    for rate in (1.0, 0.25):
        run = OptimizerRun(changed(TINY, optimizer="sgd", learning_rate=10.0, linear_rate=rate))
        before = jax.device_get(run.start().learner.params)
        after = jax.device_get(run.generation(run.start())[0].learner.params)
        moved.append(jax.tree.map(lambda a, b: np.abs(a - b).sum(), after, before))
    share = jax.tree.map(lambda a, b: float(a / b), moved[1], moved[0])
    layers = share.pop("layers")
    for name, one in {**share, **layers}.items():
        assert one == pytest.approx(0.25 if name.endswith("_proj") else 1, rel=0.01), name


def test_digits_are_learned_by_weights_without_scale(tmp_path: Path) -> None:
    config = changed(STUDIES["digits"], run_dir=tmp_path, width=32, generations=100)
    result = train(config)
    assert result["held_out_accuracy"] > 0.9
    # Steps at right angles only add to the norm.
    assert result["weight_norm"] > 1.01
    trainer = OptimizerRun(config)
    found = trainer.evaluate(trainer.start(), 1, 0)
    assert set(found) == {"held out loss", "held out accuracy", "weight norm"}
    assert found["held out accuracy"][0] < 0.3


def test_gradients_are_at_right_angles_to_weights_without_scale() -> None:
    task = digits_task(STUDIES["digits"])
    params = task.init(jax.random.key(0))
    batch = task.batch(jax.random.key(1), jnp.int32(0))
    grads = jax.grad(task.loss)(params, batch)
    for name, layer in params.items():
        w, g = layer["kernel"], grads[name]["kernel"]
        cosine = (w * g).sum(0) / (jnp.linalg.norm(w, axis=0) * jnp.linalg.norm(g, axis=0) + 1e-9)
        assert jnp.abs(cosine).max() < 1e-4
    assert abs(float(normalised.norms(params)) - 1) < 1e-5


def test_batches_depend_on_the_generation_and_held_out_bytes_count_once() -> None:
    task = text_task(TINY)
    first, again, second = (task.batch(jax.random.key(0), jnp.int32(g)) for g in (0, 0, 1))
    assert first.shape == (8, 33)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)
    found = windows(np.arange(101, dtype=np.uint8), 10, 99)
    assert found.shape == (10, 11)
    np.testing.assert_array_equal(np.sort(found[:, 1:].ravel()), np.arange(1, 101))
    assert windows(np.arange(101, dtype=np.uint8), 10, 3)[:, 0].tolist() == [0, 40, 90]


def test_a_target_is_confirmed_by_data_that_decided_nothing() -> None:
    rows = jnp.arange(5)
    parts = [half(rows, changed(TINY, target=2.0), fresh).tolist() for fresh in (False, True)]
    assert parts == [[0, 2, 4], [1, 3]]
    assert half(rows, TINY, fresh=True).tolist() == half(rows, TINY, fresh=False).tolist()
    # Of an odd number of sequences the halves have other losses.
    trainer = OptimizerRun(changed(TINY, target=2.0, held_out_sequences=3))
    state = trainer.start()
    measured, fresh = trainer.measure(state)["held_out_loss"], trainer.confirm(state)["fresh_loss"]
    assert measured != fresh
    assert float(fresh) == pytest.approx(math.log(256), abs=0.1)


def test_the_learning_rate_rises_falls_and_stays() -> None:
    over = schedule(changed(TINY, schedule=100, warmup=0.1, final=0.1))
    values = [float(over(g)) for g in range(120)]
    np.testing.assert_allclose(values[:11], np.arange(1, 12) / 11, rtol=1e-5)
    assert max(values) == values[10] == 1
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))
    np.testing.assert_allclose(values[100:], 0.1, rtol=1e-5)


PARAMS = {
    "layers": {"w": jnp.ones((2, 6, 4)), "norm": jnp.ones((2, 6))},
    "lm_head": jnp.ones((6, 4)),
}
STACKED = jax.tree.map(lambda x: x.ndim == 3, PARAMS)
LINEAR = {"layers": {"w": True, "norm": False}, "lm_head": False}
HEAD_TOO = {**LINEAR, "lm_head": True}
LAYERS = {"layers": {"w": optax.contrib.MuonDimensionNumbers(1, 2), "norm": None}, "lm_head": None}


@pytest.mark.parametrize(
    ("settings", "right"),
    [
        (dict(optimizer="sgd", momentum=0.9), optax.sgd(0.1, momentum=0.9)),
        (dict(optimizer="adamw", weight_decay=0.5), optax.adamw(0.1, weight_decay=0.5)),
        (dict(optimizer="optim.lion_k", kappa="huber:0.5"), optim.lion_k(0.1, optim.kappa.huber(0.5), weight_decay=0.0)),
        # The layers of a stack are decided and split one by one.
        (dict(optimizer="optim.adamp"), optim.adamp(0.1, batch_axes=jax.tree.map(int, STACKED))),
        (
            dict(optimizer="optim.frugal", density=0.25, projector="rows", also_split="lm_head"),
            optim.frugal(0.1, 0.25, optim.projector.rows(), split=HEAD_TOO, dimension_numbers=LAYERS),
        ),
        # A rank of 4 in a width of 16, one layer of two; by FRUGAL's choice of what is split.
        (dict(optimizer="optim.galore", density=0.25, scale=0.5), optim.galore(0.1, 4, scale=0.5, split=LINEAR, weight_dimension_numbers=LAYERS)),
        (dict(optimizer="optim.badam", density=0.5, gap=7), optim.badam(0.1, 7, split=LINEAR, active=1, dimension_numbers=LAYERS)),
    ],
)  # fmt: skip
def test_settings_reach_the_optimizer(
    settings: dict[str, Any], right: optax.GradientTransformation
) -> None:
    found = optimizer_of(changed(TINY, settings), 0.1, STACKED)
    grads = jax.tree.map(lambda x: jnp.arange(x.size, dtype=float).reshape(x.shape) / 9 - 1, PARAMS)
    a, _ = jax.jit(found.update)(grads, found.init(PARAMS), PARAMS)
    b, _ = jax.jit(right.update)(grads, right.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer", "optim.lyon"], "optim has no such optimizer; did you mean 'lion'"),
        (["--optimizer", "optim.frugal", "--density", "2"], "--density 2.0: choose a number from 0 to 1"),
        (["--density", "0.5"], "--density 0.5: adamw has no such setting"),
        (["--optimizer", "sgd", "--weight-decay", "0.1"], "--weight-decay 0.1: sgd has no weight decay"),
        (["--optimizer", "optim.lion_k", "--kappa", "l3"], "--kappa l3: there is no such function; did you mean"),
        (["--optimizer", "optim.lion_k", "--kappa", "huber:no"], "--kappa huber:no: the number behind the colon must be a positive number"),
        (["--optimizer", "optim.lion_k", "--kappa", "huber"], "--kappa huber: "),
        (["--optimizer", "optim.frugal", "--also-split", "head"], "--also-split head: there is no such parameter; did you mean 'lm_head'"),
        (["--target", "2", "--held-out-sequences", "1"], "--held-out-sequences 1: with --target one half"),
        (["--heads", "3"], "--heads 3: 16 units are not so many heads"),
        (["--warmup", "1.5"], "--warmup 1.5: choose a number from 0 to 1"),
        (["--depth", "0"], "--depth 0: choose a whole number from 1 to 1000"),
        (["--data", "/nowhere"], "--data /nowhere: there is no such file"),
        (["--length", "999999"], "the text is too short"),
        (["--task", "digits", "--data", "x"], "--data x: digits are scikit-learn's"),
        (["--task", "digits", "--batch", "5000"], "--batch 5000: there are 1437 images"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--preset", "tiny", "--run-dir", str(tmp_path / "run")]
    assert main(["optimizers", *run, *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_an_optimizer_refuses_names_its_flag() -> None:
    message = "--optimizer optim.frugal: density must be a number from 0 to 1, got 2.0"
    with pytest.raises(UsageError, match=message):
        OptimizerRun(changed(TINY, optimizer="optim.frugal", density=2.0))


def test_projectors_are_a_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["optimizers", "--preset", "tiny", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--optimizer", "optim.frugal", "--projector", "row"])
    assert ended.value.code == 2
    assert "--projector" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_right(name: str) -> None:
    PRESETS[name].check()
    assert PRESETS[name].preset == name
    assert PRESETS[name].optimizer.schedule == PRESETS[name].max_generations
    assert from_json(Config, json.loads(json.dumps(to_json(PRESETS[name])))) == PRESETS[name]


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_are_right(name: str, tmp_path: Path) -> None:
    """Each makes an optimizer on each task that it belongs to, and begins on the ladder."""
    for base in (TINY, STUDIES["digits"]):
        if name not in methods_of(base):
            continue
        rung = middle(METHODS[name], base)
        config = config_of(base, name, LADDER[rung], 0, tmp_path)
        config.check()
        state = jax.eval_shape(OptimizerRun(config).start)
        assert state.own.shape == ()


@pytest.mark.parametrize(
    ("best", "start", "tried"),
    [(5, 5, {4, 5, 6}), (8, 5, set(range(4, 10))), (2, 5, set(range(1, 7))), (0, 1, {0, 1, 2})],
)
def test_the_search_goes_on_while_the_best_is_at_an_end(
    best: int, start: int, tried: set[int]
) -> None:
    found = climb(lambda rung: float(abs(rung - best)), start)
    assert set(found) == tried
    assert min(found, key=found.__getitem__) == best
    assert climb(lambda rung: math.inf, 5).keys() == {4, 5, 6}


def test_the_table_is_what_the_runs_came_to(tmp_path: Path) -> None:
    settings = StudySettings(
        study="tiny", run_dir=tmp_path, methods=("adamw",), seeds=2, generations=4
    )
    paths = study(settings)
    assert [path.name for path in paths] == ["results.json", "table.md", "study.png"]
    row = json.loads(paths[0].read_text())["adamw"]
    seen = {
        path.parent.relative_to(tmp_path / "adamw").as_posix(): json.loads(path.read_text())
        for path in tmp_path.rglob("result.json")
    }
    tried = {rate: seen[f"rate-{float(rate):g}/seed-0"]["held_out_loss"] for rate in row["tried"]}
    assert row["tried"] == tried
    assert row["rate"] == float(min(tried, key=tried.__getitem__))
    last = [seen[f"rate-{row['rate']:g}/seed-{seed}"] for seed in (0, 1)]
    assert len(seen) == len(tried) + 1
    losses = [one["held_out_loss"] for one in last]
    assert row["losses"] == losses
    loss, spread = sum(losses) / 2, abs(losses[0] - losses[1]) / math.sqrt(2)
    assert f"| adamw | {row['rate']:g} | {loss:.3f} ± {spread:.3f} | | " in paths[1].read_text()
    # Two moments of float32, and the counts of Adam and of the schedule.
    assert row["state_bytes"] == 8 * last[0]["parameters"] + 8
    assert 0 < row["step_seconds"] < 10

    # The same command again makes no run, but for one that is missing.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    lost = tmp_path / f"adamw/rate-{row['rate']:g}/seed-1/result.json"
    lost.unlink()
    study(settings)
    new = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert new == {lost}
    assert json.loads(paths[0].read_text())["adamw"]["losses"] == losses
    with pytest.raises(UsageError, match="holds a run of other settings .*--batch 8 -> 4"):
        studies._finished(
            changed(config_of(settings.base, "adamw", row["rate"], 1, tmp_path), batch=4)
        )


def fake(loss: float | None, **others: Any) -> dict[str, Any]:
    return dict(held_out_loss=loss, state_bytes=80, parameters=10, generations=30, **others)  # fmt: skip


def test_a_study_stops_between_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: dict[Path, dict[str, Any]] = {}

    def run(config: Config) -> dict[str, Any]:
        # One method has its optimum two rungs away, another is finite nowhere.
        away = abs(math.log10(config.optimizer.learning_rate / 0.1)) + config.seed / 100
        done[config.run_dir] = fake(None if config.optimizer.name == "sign_sgd" else 1 + away)
        return done[config.run_dir]

    monkeypatch.setattr(studies, "_finished", lambda config: done.get(config.run_dir))
    monkeypatch.setattr(studies, "_train", run)
    monkeypatch.setattr(studies, "step_seconds", lambda configs: [0.5] * len(configs))
    words = [
        "study",
        "tiny",
        "--run-dir",
        str(tmp_path),
        "--methods",
        "adamw",
        "sign-sgd",
        "--seeds",
        "2",
    ]
    assert main([*words, "--minutes", "1e-9"]) == 75
    assert "0 methods are done; the same command again goes on" in capsys.readouterr().err
    assert not done
    assert main(words) == 0
    row = json.loads((tmp_path / "results.json").read_text())
    assert row["adamw"]["rate"] == 0.1
    np.testing.assert_allclose(row["adamw"]["losses"], [1.0, 1.01])
    assert row["sign-sgd"]["loss"] is None
    # Three rungs and one more, or three, then one more seed.
    assert len(done) == (3 + 2 + 1) + (3 + 1)
    text = (tmp_path / "table.md").read_text().splitlines()
    assert text[2].startswith("| adamw | 0.1 | 1.005 ± 0.007 | | 80 | 8.00 | 500.0 ms |")
    assert text[3].startswith("| sign-sgd |")


def test_a_table_of_digits_has_their_columns() -> None:
    measured = {"held_out_accuracy": 0.5, "weight_norm": 2.0}
    one = line("adamp", Found(0.1, {}, [{**fake(1.0), **measured}]), 0.5)
    assert "| adamp | 0.1 | 1.000 | | 50.00% | 2.00 | 80 | 8.00 | 500.0 ms |" in table([one])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "adamv"], "--methods adamv: there is no such method; did you mean"),
        (["--seeds", "0"], "--seeds 0: choose"),
        (["--minutes", "0"], "--minutes 0.0: choose a positive number"),
    ],
)
def test_wrong_studies_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "tiny", "--run-dir", str(tmp_path / "x"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
