"""A task of one's own, in a file: made, checked, rewarded in processes, and mistakes in one sentence."""

import json
import operator
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.reasoning.config import PRESETS
from experiments.reasoning.pool import RewardPool
from experiments.reasoning.questions import Questions
from experiments.reasoning.start import start
from experiments.reasoning.tasks import Question, Task, check, files, load, split
from experiments.reasoning.tasks.task import checked
from experiments.run.errors import UsageError
from experiments.run.fields import changed
from experiments.run.train import train

OWN = """
import functools
from experiments.reasoning.tasks import Question, Task, split

class Near:
    def __init__(self, far): self.far = far
    def __call__(self, completions, answers, **_):
        return [1 - abs(int(a) - int(b)) / self.far for a, b in zip(completions, answers)]

def make(size: int = 100, far: float = 10) -> Task:
    train, held_out, fresh = split([Question(f"2*{i}=", str(2 * i)) for i in range(size)])
    return Task(name="doubles", train=train, held_out=held_out, fresh=fresh, reward=Near(far),
                max_new_tokens=5)
"""


def test_a_task_of_ones_own_is_made_with_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "doubles.py"
    path.write_text(OWN)
    task = load(f"{path}:make", size=50)
    everything = [*task.train, *task.held_out, *task.fresh]
    assert sorted(int(q.answer) for q in everything) == list(range(0, 100, 2))
    assert (task.name, task.max_new_tokens) == ("doubles", 5)
    assert files(f"{path}:make", {}) == [path]
    with pytest.raises(UsageError, match="has no setting 'sise'; did you mean 'size'"):
        load(f"{path}:make", sise=50)
    with pytest.raises(UsageError, match="size must be a whole number, got 'x'"):
        load(f"{path}:make", size="x")
    path.write_text(OWN.replace("size: int = 100", "size"))
    with pytest.raises(UsageError, match="needs the setting 'size': --task-settings"):
        load(f"{path}:make")


def test_its_reward_reaches_processes(tmp_path: Path) -> None:
    """An object of a class of the file, which no process can import by name."""
    path = tmp_path / "doubles.py"
    path.write_text(OWN)
    with RewardPool(1, 60.0, load(f"{path}:make", far=4).reward) as pool:
        path.write_text("1 / 0")
        assert pool.submit(["4", "3"], ["4", "4"]).result().rewards == [1.0, 0.75]


def test_a_file_of_questions_may_have_a_colon_in_its_path(tmp_path: Path) -> None:
    path = tmp_path / "my:data.jsonl"
    path.write_text("\n".join(f'{{"question": "{i}+0=", "answer": {i}}}' for i in range(60)))
    check(str(path))
    assert load(str(path)).name == "my:data.jsonl"
    assert files(str(path), {}) == [path]


SCORE = "def score(completions, answers, **_): return [1.0] * len(answers)\n"


def test_a_reward_in_the_settings_of_a_file_of_questions_is_one_of_its_files(
    tmp_path: Path,
) -> None:
    path, own = tmp_path / "a.jsonl", tmp_path / "own.py"
    path.write_text("\n".join(f'{{"question": "{i}+0=", "answer": {i}}}' for i in range(60)))
    with pytest.raises(UsageError, match=f"^reward {own}:score: there is no file {own}$"):
        check(str(path), reward=f"{own}:score")
    own.write_text(SCORE)
    with pytest.raises(UsageError, match="own.py has no function 'scorr'; did you mean 'score'"):
        check(str(path), reward=f"exact,{own}:scorr")
    with pytest.raises(UsageError, match="there is no reward 'exat'.*; did you mean 'exact'"):
        check(str(path), reward="exat")
    check(str(path), reward=f"{own}:score")
    assert files(str(path), {"reward": f"{own}:score"}) == [path, own]

    words = {"reward": f"{own}:score"}
    config = changed(
        PRESETS["tiny"], run_dir=tmp_path / "run", task=str(path), task_settings=json.dumps(words)
    )
    train(changed(config, generations=1))
    own.write_text(SCORE.replace("1.0", "0.5"))
    with pytest.raises(UsageError, match="own.py has other content"):
        train(config)


def questions(begin: int, end: int) -> list[Question]:
    return [Question(f"{i}+0=", str(i)) for i in range(begin, end)]


GIVEN: Task | None = None
RIGHT: dict[str, Any] = dict(name="own", train=questions(0, 9), held_out=questions(9, 15))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(name=3), r"the task's name must be a text, got 3 \(int\)"),
        (dict(train=[]), "the task's train must have one question at least"),
        (dict(held_out="abc"), "the task's held_out must be a list of Questions, got 'abc'"),
        (dict(train=["abc"]), "question 0 of train must be a Question, got 'abc'"),
        (dict(train=[("2+3=", "5")]), "question 0 of train must be a Question, got .'2.3=', '5'."),
        (dict(fresh=[Question("", "5")]), "question 0 of fresh: its prompt must be a text, got ''"),
        (dict(fresh=[Question("5", 5)]), r"question 0 of fresh: its answer must be a text, got 5"),
        (dict(train=[Question("a", "b", {"answers": 1})]), "a column .* cannot be called 'answers'"),
        (dict(train=[Question("a", "b", 3)]), "its columns must be a dict, got 3"),
        (dict(train=[Question("a", "b", trace=3)]), "its trace must be a text or None, got 3"),
        (dict(fresh=questions(14, 16)), "the question '14.0=' is in held_out and in fresh"),
        (dict(train=[Question(" 9+0=\n", "9")]), "the question '9.0=' is in train and in held_out"),
        (dict(reward="exact"), "the task's reward must be a function, got 'exact'"),
        (dict(max_new_tokens=0), "max_new_tokens must be a whole number of at least 1, got 0"),
        (None, "must give an experiments.reasoning.tasks.Task, got None"),
    ],
)  # fmt: skip
def test_what_a_function_gives_is_checked(
    changes: dict[str, Any] | None,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = Task(**RIGHT)
    # Not as arguments, whose types these tests check.
    for name, value in (changes or {}).items():
        object.__setattr__(given, name, value)
    monkeypatch.setitem(globals(), "GIVEN", None if changes is None else given)
    (tmp_path / "own.py").write_text(f"import {__name__} as t\ndef make(): return t.GIVEN\n")
    with pytest.raises(UsageError, match=f"^--task .*own.py:make: .*{sentence}") as told:
        load(f"{tmp_path}/own.py:make")
    assert "\n" not in str(told.value)


def test_a_third_of_held_out_questions_is_fresh_where_none_are_given(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        f"import {__name__} as t\ndef make(): return t.Task(**t.RIGHT)\n"
    )
    task = load(f"{tmp_path}/own.py:make")
    assert (len(task.held_out), len(task.fresh)) == (4, 2)
    assert sorted([*task.held_out, *task.fresh]) == sorted(RIGHT["held_out"])


class Made(Sequence[Question]):
    """Questions that are made one by one, when they are asked for."""

    def __init__(self, begin: int, end: int) -> None:
        self.numbers, self.made = range(begin, end), 0

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        self.made += 1
        return Question(f"{self.numbers[operator.index(index)]}+0=", "0")


def test_questions_that_are_made_when_they_are_asked_for_are_a_task(tmp_path: Path) -> None:
    task = Task(name="own", train=Made(0, 9), held_out=Made(9, 15), fresh=Made(15, 18))
    assert checked(task, "--task own") == task
    train: Any = task.train
    assert train.made < len(train)
    config = changed(PRESETS["tiny"], held_out_questions=2)
    asked = Questions(config, start(config), lambda: task)
    assert [one.prompt for one in asked.measured] == ["9+0=", "10+0="]
    assert [one.prompt for one in asked.fresh] == ["15+0=", "16+0="]
    wrong = replace(task, train=Made(9, 12))
    with pytest.raises(UsageError, match="the question '9.0=' is in train and in held_out"):
        checked(wrong, "--task own")


def test_questions_are_divided_by_their_prompts_alone() -> None:
    parts = split(questions(0, 300), held_out=0.2)
    assert sum(map(len, parts)) == 300
    again = split([*questions(0, 300)[::-1], *questions(5, 9)], held_out=0.2)
    assert [sorted(part) for part in parts] == [sorted(part) for part in again]
    assert 30 < len(parts[1]) + len(parts[2]) < 90
