"""What is drawn, which runs that makes, and which of them are one program."""

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from experiments.sweep.plan import Plan, make_plan
from experiments.sweep.space import Axis, points
from experiments.sweep.spec import read_spec

AXES = (
    Axis("sigma", "log-uniform", (1e-3, 0.5)),
    Axis("rank", "grid", (1, "full")),
    Axis("batch", "uniform", (2, 9), unit=1),
    Axis("optimizer", "choice", ("adam", "sgd", "lion")),
)


@given(seed=st.integers(0, 2**40), samples=st.integers(1, 6), more=st.integers(1, 5))
def test_more_samples_keep_the_earlier_ones(seed: int, samples: int, more: int) -> None:
    few, many = (list(points(AXES, n, seed)) for n in (samples, samples + more))
    assert many[: len(few)] == few
    assert len(many) == 2 * (samples + more)


@given(seed=st.integers(0, 2**40), number=st.integers(0, 10**6))
def test_a_draw_does_not_depend_on_the_rest_of_the_space(seed: int, number: int) -> None:
    whole = list(points(AXES, number % 5 + 1, seed))[-1]
    for axis in AXES:
        if axis.kind != "grid":
            assert list(points([axis], number % 5 + 1, seed))[-1] == {axis.field: whole[axis.field]}


@given(
    seed=st.integers(0, 2**40),
    ends=st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)).filter(lambda e: e[0] < e[1]),
    kind=st.sampled_from(["uniform", "log-uniform"]),
)
def test_draws_stay_in_their_range(seed: int, ends: tuple[float, float], kind: str) -> None:
    for number in range(20):
        assert ends[0] <= Axis("x", kind, ends).draw(seed, number) <= ends[1]


def test_draws_are_spread_as_they_should_be() -> None:
    numbers = range(3000)
    plain = [Axis("x", "uniform", (0.0, 1.0)).draw(1, n) for n in numbers]
    assert abs(sum(plain) / 3000 - 0.5) < 0.02
    decades = [Axis("x", "log-uniform", (1e-4, 1.0)).draw(1, n) for n in numbers]
    for low in (1e-4, 1e-3, 1e-2, 1e-1):
        assert abs(sum(low <= x < 10 * low for x in decades) / 3000 - 0.25) < 0.03
    for kind in ("uniform", "log-uniform"):
        even = {Axis("x", kind, (3, 9), unit=2).draw(1, n) for n in numbers}
        assert even == {4, 6, 8}
        whole = [Axis("x", kind, (1, 4), unit=1).draw(1, n) for n in numbers]
        assert set(whole) == {1, 2, 3, 4}
        assert all(isinstance(x, int) for x in whole)
    shares = [whole.count(x) / 3000 for x in (1, 4)]
    assert shares[0] > 2 * shares[1]  # the last kind was logarithmic
    names = [Axis("x", "choice", tuple("abc")).draw(1, n) for n in numbers]
    assert all(abs(names.count(x) / 3000 - 1 / 3) < 0.03 for x in "abc")
    assert plain != [Axis("x", "uniform", (0.0, 1.0)).draw(2, n) for n in numbers]


def plan(path: Path, **changes: Any) -> Plan:
    text = {
        "driver": "supervised",
        "fixed": {"population": 32},
        "space": {"sigma": [0.1, 0.2, 0.3], "width": [8, 16]},
        "seeds": 2,
        "out": str(path),
        **changes,
    }
    (path / "sweep.yaml").write_text(repr(text))  # YAML reads what Python writes
    return make_plan(read_spec(path / "sweep.yaml"))


def test_the_runs_are_all_points_with_all_seeds(tmp_path: Path) -> None:
    runs = plan(tmp_path).runs
    assert [run.number for run in runs] == list(range(12))
    found = [(run.config.evolution.sigma, run.config.width, run.config.seed) for run in runs]
    assert found == [(s, w, seed) for s in (0.1, 0.2, 0.3) for w in (8, 16) for seed in (0, 1)]
    assert [run.setting for run in runs] == [i // 2 for i in range(12)]
    assert len({run.id for run in runs}) == 12
    assert runs[3].config.run_dir == tmp_path / "runs" / runs[3].id


def test_an_id_is_of_the_settings_alone(tmp_path: Path) -> None:
    before = [run.id for run in plan(tmp_path).runs]
    longer = {"population": 32, "generations": 99, "checkpoint_seconds": 1.0}
    assert [run.id for run in plan(tmp_path, fixed=longer).runs] == before
    assert before[:4] == [
        run.id for run in plan(tmp_path, space={"sigma": [0.1], "width": [8, 16]}).runs
    ]
    other = [run.id for run in plan(tmp_path, fixed={"population": 64}).runs]
    assert not set(other) & set(before)
    lengths = plan(tmp_path, space={"generations": [3, 5]}).runs
    assert len({run.id for run in lengths}) == 4


def test_settings_drawn_twice_are_one(tmp_path: Path) -> None:
    found = plan(tmp_path, space={"width": {"choice": [8, 16]}}, samples=9)
    assert sorted(run.config.width for run in found.runs) == [8, 8, 16, 16]
    assert [run.setting for run in found.runs] == [0, 0, 1, 1]


@pytest.mark.parametrize(("together", "sizes"), [(8, [6, 6]), (4, [4, 4, 2, 2]), (1, [1] * 12)])
def test_runs_of_one_program_are_a_job(together: int, sizes: list[int], tmp_path: Path) -> None:
    found = plan(tmp_path, executor={"together": together})
    assert [len(job) for job in found.jobs] == sizes
    assert sorted(number for job in found.jobs for number in job) == list(range(12))
    for job in found.jobs:
        assert len({found.runs[number].config.width for number in job}) == 1


def test_runs_that_cannot_share_are_alone(tmp_path: Path) -> None:
    found = plan(tmp_path, driver="optimizers", fixed={}, space={"learning_rate": [0.1, 0.2]})
    assert found.jobs == ((0,), (1,), (2,), (3,))
