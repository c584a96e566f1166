"""The loop: rows, resuming, stopping, and giving up, on a trainer that takes no time."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest

from experiments.run.driver import Column, Driver, Figure
from experiments.run.errors import Interrupted, RunError, UsageError
from experiments.run.folder import open_run_folder
from experiments.run.loop import run
from experiments.run.metrics import read_metrics
from experiments.run.settings import RunSettings
from experiments.run.stopwatch import Stopwatch
from experiments.run.trainer import Carry, Conclusion, Outcome, Trainer


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    driver: ClassVar[str] = "toy"
    max_generations: int = 9
    rate: float = 0.5
    lucky: float = 0.0
    """What held-out figures are too high by."""


class Toy(Trainer[Settings]):
    """A number that goes to 1; `before` is called with every generation before it is run."""

    measured = ("held_out",)
    totals = ("steps",)

    def __init__(self, config: Settings, before: Callable[[int], None] = lambda g: None) -> None:
        super().__init__(config)
        self.before = before

    def start(self) -> Carry:
        return Carry(jnp.float32(0), None, jnp.int32(0), jnp.int32(self.config.seed))

    def generation(self, carry: Carry) -> tuple[Carry, dict[str, Any]]:
        self.before(int(carry.generation))
        x = carry.learner
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(carry.seed), carry.generation))
        after = x + self.config.rate * (1 - x) + 0.01 * noise
        row = {"fitness_mean": -abs(1 - x), "steps": 3}
        return carry._replace(learner=after, generation=carry.generation + 1), row

    def measure(self, carry: Carry) -> dict[str, Any]:
        return {"held_out": carry.learner + self.config.lucky}

    def confirm(self, carry: Carry) -> dict[str, Any]:
        return {"fresh": carry.learner}

    def conclude(self, config: Settings, outcome: Outcome) -> Conclusion:
        raise NotImplementedError

    def evaluate(self, carry: Carry, episodes: int, seed: int) -> dict[str, list[float]]:
        raise NotImplementedError


class Broken(Toy):
    def generation(self, carry: Carry) -> tuple[Carry, dict[str, Any]]:
        return carry, {"fitness_mean": float("nan"), "steps": 0}


DRIVER = Driver(
    name="toy",
    summary="",
    config=Settings,
    presets={},
    figure=Figure("held_out", "fresh"),
    columns=(Column("held_out", "held out", ".2f"),),
    results=(),
    trainer="test_loop:Toy",
)


def go(settings: Settings, toy: Toy | None = None) -> Outcome:
    with open_run_folder("toy", settings) as folder:
        return run(DRIVER, toy or Toy(settings), folder, Stopwatch())


def untimed(path: Path) -> list[dict[str, Any]]:
    return [{**row, "timing": None} for row in read_metrics(path / "metrics.jsonl")]


def test_a_run_has_a_row_a_generation(tmp_path: Path) -> None:
    outcome = go(Settings(run_dir=tmp_path, generations=7, evaluate_every=3))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows == outcome.rows
    assert [row["generation"] for row in rows] == list(range(7))
    assert [row["held_out"] is not None for row in rows] == [True, False, False] * 2 + [True]
    assert [row["steps"] for row in rows] == [3 * (g + 1) for g in range(7)]
    assert all(row["timing"]["seconds"] >= 0 for row in rows)
    assert outcome.before == {"held_out": 0.0}
    assert outcome.after == {"held_out": float(outcome.state.learner)}
    assert outcome.generations == 7


def test_a_reached_target_stops_unless_generations_are_given(tmp_path: Path) -> None:
    early = go(Settings(run_dir=tmp_path / "a", target=0.9))
    assert 2 < early.generations < 9
    assert early.after["held_out"] > 0.9
    assert early.rows[-1]["held_out"] <= 0.9
    assert go(Settings(run_dir=tmp_path / "b", target=0.9, generations=9)).generations == 9
    # The same command again finds it finished.
    again = go(Settings(run_dir=tmp_path / "a", target=0.9))
    assert (again.generations, again.after, again.rows) == (
        early.generations,
        early.after,
        early.rows,
    )


def test_a_target_that_fresh_data_do_not_confirm_does_not_stop(tmp_path: Path) -> None:
    honest = go(Settings(run_dir=tmp_path / "a", target=0.9))
    lucky = go(Settings(run_dir=tmp_path / "b", target=0.9, lucky=0.2))
    assert lucky.rows[1]["held_out"] < 0.9 <= lucky.rows[2]["held_out"]
    assert (honest.learned, lucky.learned) == (True, True)
    assert lucky.generations == honest.generations
    unlearned = go(Settings(run_dir=tmp_path / "c", target=1.1, lucky=0.2))
    assert (unlearned.generations, unlearned.learned) == (9, False)
    assert unlearned.after["held_out"] > 1.1 > unlearned.fresh["fresh"]


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    patient = go(Settings(run_dir=tmp_path / "a", max_generations=60, patience=3))
    values = [row["held_out"] for row in patient.rows] + [patient.after["held_out"]]
    assert 3 < patient.generations < 60
    assert max(values[-3:]) <= max(values[:-3])
    assert all(
        max(values[: g + 1][-3:]) > max(values[: g + 1][:-3]) for g in range(3, len(values) - 1)
    )


class Sinking(Toy):
    """A figure that is better in generation 2 than it will ever be; `bad` is what it then is."""

    bad: float | list[float] = -1.0

    def measure(self, carry: Carry) -> dict[str, Any]:
        first = (
            float(carry.generation)
            if isinstance(self.bad, float)
            else [float(carry.generation)] * 2
        )
        return {"held_out": first if carry.generation <= 2 else self.bad}


@pytest.mark.parametrize("bad", [-1.0, 2.0, float("nan"), [9.0, float("nan")]])
def test_patience_counts_measurements_also_those_that_are_not_finite(
    tmp_path: Path, bad: float | list[float]
) -> None:
    toy = Sinking(Settings(run_dir=tmp_path, max_generations=60, patience=3))
    toy.bad = bad
    # Generation 2 is the best; 3, 4 and 5 are no better.
    assert go(toy.config, toy).generations == 5


@pytest.mark.parametrize("at", [2, 3, 4, 5])
def test_patience_goes_on_where_a_run_stood_and_may_be_more(tmp_path: Path, at: int) -> None:
    def generations(**changes: Any) -> int:
        settings = Settings(run_dir=tmp_path, max_generations=60, evaluate_every=2, **changes)
        return go(settings, Sinking(settings)).generations

    assert generations(generations=at) == at
    # The best is of generation 2; 4, 6 and 8 are no better.
    assert generations(patience=3) == 8
    assert generations(patience=4) == 10


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1000.0])
@pytest.mark.parametrize("at", [0, 1, 4, 6])
def test_a_run_that_fails_anywhere_is_continued_to_the_same_end(
    tmp_path: Path, at: int, checkpoint_seconds: float
) -> None:
    def settings(name: str) -> Settings:
        return Settings(
            run_dir=tmp_path / name,
            generations=7,
            evaluate_every=2,
            checkpoint_seconds=checkpoint_seconds,
        )

    whole = go(settings("whole"))

    class PowerCut(Exception):
        pass

    def cut(g: int) -> None:
        if g == at:
            raise PowerCut

    with pytest.raises(PowerCut):
        go(settings("cut"), Toy(settings("cut"), cut))
    resumed = go(settings("cut"))
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    assert float(resumed.state.learner) == float(whole.state.learner)
    assert resumed.before == whole.before


def test_more_generations_continue_a_run(tmp_path: Path) -> None:
    go(Settings(run_dir=tmp_path / "a", generations=3))
    go(Settings(run_dir=tmp_path / "a", generations=8))
    go(Settings(run_dir=tmp_path / "b", generations=8))
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")]
)
def test_a_signal_saves_and_ends(tmp_path: Path, number: int, name: str) -> None:
    settings = Settings(run_dir=tmp_path / "a", generations=7)
    before = signal.getsignal(number)

    def send(g: int) -> None:
        if g == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(
        Interrupted, match=f"Stopped by {name} after 3 generations.*same command again"
    ):
        go(settings, Toy(settings, send))
    assert signal.getsignal(number) is before
    begun: list[int] = []
    go(settings, Toy(settings, begun.append))
    assert begun == [3, 4, 5, 6]
    go(Settings(run_dir=tmp_path / "b", generations=7))
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    settings = Settings(run_dir=tmp_path, generations=7)

    def send_twice(g: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        go(settings, Toy(settings, send_twice))


def test_scores_that_are_never_usable_end_the_run(tmp_path: Path) -> None:
    settings = Settings(run_dir=tmp_path, generations=40)
    with pytest.raises(RunError, match="no member had a usable score in the last 10 generations"):
        go(settings, Broken(settings))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 10


def test_other_settings_are_refused_unless_told(tmp_path: Path) -> None:
    go(Settings(run_dir=tmp_path, generations=2))
    with pytest.raises(
        UsageError, match=r"other settings \(--rate 0.5 -> 0.25\).*--accept-changes"
    ):
        go(Settings(run_dir=tmp_path, generations=4, rate=0.25))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    changed = go(Settings(run_dir=tmp_path, generations=4, rate=0.25, accept_changes=True))
    assert changed.generations == 4
    assert len(changed.rows) == 4
    anew = go(Settings(run_dir=tmp_path, generations=1, rate=0.125, overwrite=True))
    assert len(anew.rows) == 1


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    settings = Settings(run_dir=tmp_path)
    with (
        open_run_folder("toy", settings),
        pytest.raises(UsageError, match="in use by another process"),
        open_run_folder("toy", settings),
    ):
        pass


def test_files_of_the_user_survive_overwriting(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    go(Settings(run_dir=tmp_path, generations=1))
    go(Settings(run_dir=tmp_path, generations=1, overwrite=True))
    assert (tmp_path / "notes.txt").read_text() == "mine"
