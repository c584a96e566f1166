"""Questions: no text on both sides, right answers and traces, and mistakes that are told."""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from experiments.reasoning import rewards
from experiments.reasoning.arithmetic import evaluate
from experiments.reasoning.tasks import Question, Task, columns, load
from experiments.reasoning.tasks.files import jsonl
from experiments.reasoning.tasks.gym import PRESETS, RUN_ANSWERS, Generated
from experiments.reasoning.tasks.home_made import HOME_MADE, countdown_easy, sums
from experiments.run.errors import UsageError


def score(task: Task, questions: list[Question], completions: list[str]) -> list[Any]:
    return task.reward(completions, [q.answer for q in questions], **columns(questions))


def everything_of(task: Task) -> list[Question]:
    return [*task.train, *task.held_out, *task.fresh]


# ---------------------------------------------------------------- home-made


@pytest.mark.parametrize("name", HOME_MADE)
def test_a_home_made_task_is_whole(name: str) -> None:
    task = load(name, size=300)
    everything = everything_of(task)
    assert task.train and task.held_out and task.fresh
    assert task.name == name and len({q.prompt for q in everything}) == len(everything)
    solutions = [str(q.trace) for q in everything]
    # With its end, for a model that reads bytes.
    assert max(len(text.encode()) for text in solutions) < task.max_new_tokens
    assert set(score(task, everything, solutions)) == {1.0}
    assert set(score(task, everything, [q.answer for q in everything])) == {1.0}
    assert set(score(task, everything, [f"{q.answer} 777" for q in everything])) == {0.0}


def test_sums_are_all_there_and_right() -> None:
    task = sums(digits=2)
    everything = everything_of(task)
    assert len({q.prompt for q in everything}) == len(everything) == 10_000
    assert 700 < len(task.held_out) + len(task.fresh) < 1300
    assert 0.4 < len(task.fresh) / len(task.held_out) < 0.6
    everything = everything[::20]
    for question in everything:
        assert int(question.answer) == evaluate(question.prompt.rstrip("="))
        trace = question.trace
        assert trace is not None
        for line in trace.split("\n")[:-1]:
            left, right = line.split("=")
            assert evaluate(left) == int(right)
    assert set(score(task, everything, [str(q.trace) for q in everything])) == {1.0}
    assert set(score(task, everything, [f"{int(q.answer) + 1}" for q in everything])) == {0.0}
    asked = sums(least=1, most=20, form="{a} and {b}", template="What is {question}?").train[0]
    a, b = asked.prompt.removeprefix("What is ").removesuffix("?").split(" and ")
    assert asked.answer == str(int(a) + int(b))
    few = everything_of(sums(least=3, most=22))
    assert {q.prompt for q in few} == {f"{a}+{b}=" for a in range(3, 23) for b in range(3, 23)}
    # Nor is the other order of what is held out trained on.
    pairs = lambda questions: {frozenset(q.prompt[:-1].split("+")) for q in questions}
    kinds = [pairs(task.train), pairs(task.held_out), pairs(task.fresh)]
    assert sum(map(len, kinds)) == len(set.union(*kinds))


def test_a_sample_of_sums_is_a_function_of_the_seed() -> None:
    first, again, other = (sums(digits=5, size=100, seed=seed) for seed in (1, 1, 2))
    assert first.train == again.train
    assert first.train != other.train
    assert len(everything_of(first)) == 100


def test_numbers_are_sorted_and_held_out_in_any_order() -> None:
    task = load("sorting", count=2, least=10, most=15, size=1000, held_out=0.4)
    everything = [*task.train, *task.held_out, *task.fresh]
    assert len(everything) == 6 * 5  # each pair of different numbers, in both orders
    sets = [{one.answer for one in part} for part in (task.train, task.held_out, task.fresh)]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 15
    for one in everything:
        numbers = sorted(map(int, one.prompt.rstrip(":").split(", ")))
        assert one.answer == one.trace == ", ".join(map(str, numbers))
    assert task.reward(["10, 14", "14, 10", "10"], ["10, 14"] * 3) == [1.0, 0.0, 0.0]


def test_countdown_questions_have_the_answers_they_say() -> None:
    task = load("countdown-easy", size=500, seed=3)
    everything = everything_of(task)
    assert len({q.prompt for q in everything}) == len(everything) == 500
    assert task == countdown_easy(size=500, seed=3)
    assert {len(q.columns["numbers"]) for q in everything} == {3, 4}
    assert set("".join(q.prompt + str(q.trace) for q in everything)) <= set("0123456789,=:+-*()\n")
    for question in everything:
        for line in str(question.trace).split("\n")[:-1]:
            left, right = line.split("=")
            assert evaluate(left) == int(right)
            assert 0 <= int(right)
    for completions in ([q.answer for q in everything], [str(q.trace) for q in everything]):
        assert set(score(task, everything, completions)) == {1.0}
    assert not {q.prompt for q in task.train} & {q.prompt for q in task.held_out}


def test_a_template_goes_around_the_question() -> None:
    task = sums(digits=1, template="Q: {question} {}")
    assert task.train[0].prompt.startswith("Q: ")
    assert task.train[0].prompt.endswith("= {}")


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("sums", dict(digit=1), "the task 'sums' has no setting 'digit'; did you mean 'digits'"),
        ("sums", dict(digits="two"), "the task 'sums': digits must be a whole number, got 'two'"),
        ("sums", dict(most="two"), "the task 'sums': most must be a whole number, got 'two'"),
        ("sums", dict(form="{a}+"), "form must have {a} and {b} in it, got '{a}[+]'"),
        ("sums", dict(least=5, most=4), "least must be from 0 to 4, the largest number, got 5"),
        ("sorting", dict(form="{number}"), "form must have {numbers} in it, got '{number}'"),
        ("sorting", dict(count=5, most=3), "most must be at least 4, for 5 different numbers from 0, got 3"),
        ("sorting", dict(least=-1), "least must be 0 or more, got -1"),
        ("sums", dict(template=3), "template must be a text, got 3"),
        ("sums", dict(held_out=True), "held_out must be a number, got True"),
        ("a.jsonl", dict(columns="level"), "columns must be a list of names, got 'level'"),
        ("a.jsonl", dict(columns=[1]), r"columns must be a list of names, got \[1\]"),
        ("a.jsonl", dict(held_out=[0.1]), "held_out must be a share, or the path of a file, got"),
        ("a.jsonl", dict(qestion="q"), "no setting 'qestion'; did you mean 'question'"),
        ("a.jsonl", dict(path="b.jsonl"), "no setting 'path'"),
        ("a.jsonl", dict(reward="exat"), "there is no reward 'exat'.* did you mean 'exact'"),
        ("a.jsonl", dict(reward="exact=x"), "reward exact=x: a weight must be a number, as in exact=0.5, got 'x'"),
        ("sums", dict(digits=0), "digits is 0: choose a whole number of at least 1"),
        ("sums", dict(held_out=1.0), "held_out is 1.0: choose a share between 0 and 1"),
        ("sums", dict(template="Q:"), "the template 'Q:' has no {question} in it"),
        ("sums", dict(digits=1, size=1), "of 1 questions, [01] are held out"),
        ("no/such.jsonl", {}, "no/such.jsonl cannot be read: .*No such file"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load(name, **settings)


# ---------------------------------------------------------------- files


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_a_file_in_the_form_of_gsm8k(tmp_path: Path) -> None:
    rows = [
        {"question": f"{i} and {i}?", "answer": f"It is {i}+{i}.\n#### {2 * i}"} for i in range(200)
    ]
    task = load(str(write(tmp_path / "a.jsonl", rows)))
    everything = everything_of(task)
    assert len(everything) == 200
    assert 5 < len(task.held_out) + len(task.fresh) < 40
    one = next(q for q in everything if q.prompt == "7 and 7?\n")
    assert one.answer == "14"
    assert one.trace == "It is 7+7.\n#### 14"
    assert columns([one]) == {}
    assert set(score(task, everything, [str(q.trace) for q in everything])) == {1.0}


def test_what_is_held_out_depends_on_the_text_alone(tmp_path: Path) -> None:
    rows = [{"question": f"question {i}", "answer": i} for i in range(100)]
    twice = [{"question": f" question  {i}", "answer": -1} for i in range(100)]
    first = jsonl(write(tmp_path / "a.jsonl", rows))
    other = jsonl(write(tmp_path / "b.jsonl", [*rows[::-1], "", *twice, *rows[:9]]))
    assert sorted(first.train) == sorted(other.train)
    assert sorted(first.held_out) == sorted(other.held_out)
    assert sorted(first.fresh) == sorted(other.fresh) != []


def test_questions_of_a_held_out_file_are_not_trained_on(tmp_path: Path) -> None:
    rows = [{"q": f"q{i}", "a": f"a{i}", "level": i, "more": 0} for i in range(9)]
    path, other = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[3:5])
    task = jsonl(
        path, held_out=other, question="q", answer="a", columns=["level"], template="{question}"
    )
    assert [q.prompt for q in task.held_out] == ["q3", "q4"]
    assert {q.prompt for q in task.train} == {"q0", "q1", "q2", "q5", "q6", "q7", "q8"}
    assert task.train[0].columns.keys() == {"level"}
    with pytest.raises(
        UsageError, match="every question of .*a.jsonl is held out in .*a.jsonl too"
    ):
        jsonl(path, held_out=path, question="q", answer="a")


def test_a_file_is_read_as_the_settings_of_a_command_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"q{i}", "a": str(i), "how": f"It is {i}, I think."} for i in range(9)]
    write(Path("train.jsonl"), rows)
    write(Path("test.jsonl"), rows[:3])
    words = '{"question": "q", "answer": "a", "trace": "how", "held_out": "test.jsonl", "reward": "exact=2,format"}'
    task = load("train.jsonl", **json.loads(words))
    assert sorted(q.prompt for q in [*task.held_out, *task.fresh]) == ["q0\n", "q1\n", "q2\n"]
    assert len(task.fresh) == 1
    assert [q.answer for q in task.train] == list("345678")
    assert task.train[0].trace == "It is 3, I think.\n#### 3"
    traces = [str(q.trace) for q in task.train]
    assert score(task, list(task.train), traces) == [2.0] * 6
    assert score(task, list(task.train[:1]), ["<answer>3</answer>"]) == [3.0]
    with pytest.raises(UsageError, match="train.jsonl, line 1 has no 'b' but 'q', 'a', 'how'"):
        load("train.jsonl", question="q", answer="a", trace="b")
    write(Path("test.jsonl"), [*rows[:1], {"q": "q1"}])
    with pytest.raises(UsageError, match="test.jsonl, line 2 has no 'a' but 'q'"):
        load("train.jsonl", **json.loads(words))


GOOD = {"question": "1+1", "answer": "2"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GOOD, "", '{"question": '], "a.jsonl, line 3 is no JSON: Expecting value"),
        ([GOOD, "[" * 100_000], "a.jsonl, line 2 is no JSON: "),
        ([GOOD, "[1]"], "a.jsonl, line 2 must be an object {...}, got list"),
        ([GOOD, {"question": "x"}], "a.jsonl, line 2 has no 'answer' but 'question'"),
        ([GOOD, {}], "a.jsonl, line 2 has no 'question' but no column at all"),
        ([GOOD, {"question": "x", "answer": " "}], "a.jsonl, line 2: 'answer' is empty"),
        ([{"question": "x", "answer": "so\n####"}, GOOD], "a.jsonl, line 1: 'answer' is empty"),
        ([{"question": "", "answer": "3"}, GOOD], "a.jsonl, line 1: 'question' is empty"),
        ([{"question": "x", "answer": None}], "line 1: 'answer' must be a text or a number, got None"),
        ([""], "a.jsonl must have a line such as {'question': ..., 'answer': ...}, but is empty"),
        ([GOOD], "of 1 questions, [01] are held out"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_told_with_their_line(
    rows: list[Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        jsonl(write(tmp_path / "a.jsonl", rows))


def test_files_that_are_no_text_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"question": "\xff"}')
    with pytest.raises(UsageError, match="a.jsonl cannot be read: 'utf-8' codec"):
        jsonl(path)
    with pytest.raises(UsageError, match="a column for the reward cannot be called 'answers'"):
        jsonl(path, columns=["answers"])


# ---------------------------------------------------------------- reasoning-gym


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_reasoning_gym_know_their_answers(name: str) -> None:
    pytest.importorskip("reasoning_gym")
    size = 2 if name == "countdown" else 20  # of which each takes a search
    task = load(name, size=size, held_out=size)
    assert len(task.train) == size
    everything = everything_of(task)
    assert len({q.prompt for q in everything}) == len(everything)
    assert set(score(task, everything, [q.answer for q in everything])) == {1.0}
    wrong = score(task, everything, ["none"] * len(everything))
    assert max(wrong) < 0.1
    if everything[0].trace is not None:
        assert set(score(task, everything, [str(q.trace) for q in everything])) == {1.0}


def test_held_out_questions_are_the_same_for_every_seed_and_never_trained_on() -> None:
    pytest.importorskip("reasoning_gym")
    # Of 99 questions, most are drawn by both.
    few = dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    first, other = (load("chain_sum", size=300, held_out=60, seed=seed, **few) for seed in (1, 2))
    prompts = lambda questions: {q.prompt for q in questions}
    assert prompts(first.held_out) == prompts(other.held_out)
    assert len(first.held_out) == len(prompts(first.held_out)) < 60
    assert len(first.train) == 300
    assert not prompts(first.train) & prompts([*first.held_out, *first.fresh])
    assert not prompts(first.held_out) & prompts(first.fresh)
    assert prompts(first.fresh) == prompts(other.fresh) != set()
    assert [q.prompt for q in first.train] != [q.prompt for q in other.train]
    assert first.train[-1] == first.train[299]
    with pytest.raises(IndexError):
        first.train[300]
    with pytest.raises(UsageError, match="all 2 questions to train on are held out too"):
        Generated(lambda i: ("x", Question("x", "", {})), 2, frozenset({"x"}))[0]


def test_answers_of_several_lines_reach_their_verifier() -> None:
    pytest.importorskip("reasoning_gym")
    task = load("rotate_matrix", size=3, held_out=1)
    questions = list(task.train)
    texts = [f"Turned, it is\n\n{q.answer}\n" for q in questions]
    assert score(task, questions, texts) == [1.0] * 3
    assert max(score(task, questions, ["1"] * 3)) < 0.5


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("countdwn", {}, "there is no task 'countdwn'; choose one of sums, sorting, countdown-easy, a task.*; did you mean 'countdown"),
        ("chain_sum", dict(max_term=3), "the task 'chain_sum' does not take .*unexpected keyword argument 'max_term'"),
        ("chain_sum", dict(min_terms=9), "the task 'chain_sum' does not take .*max_terms must be"),
        ("chain_sum", dict(size="3"), "the task 'chain_sum': size must be a whole number, got '3'"),
        ("chain_sum", dict(min_terms="3"), "the task 'chain_sum' does not take .*not supported between"),
        ("chain_sum", dict(size=0), "size is 0: choose a whole number of at least 1"),
        ("n_queens", {}, "the verifier of 'n_queens' in reasoning-gym runs what a model answers as a program"),
    ],
)  # fmt: skip
def test_wrong_names_and_settings_of_reasoning_gym_are_told(
    name: str, settings: dict[str, Any], words: str
) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UsageError, match=words):
        load(name, **settings)


def test_every_verifier_that_would_run_answers_is_known() -> None:
    """By the sources of the installed version, so that another one cannot bring in more."""
    pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    # The functions that evaluate, with an argument that may be an answer.
    suspect = ("eval(answer", "parse_expr(answer", "sympify(answer", "exec(answer")
    found = {
        name
        for name, (kind, _) in DATASETS.items()
        if any(
            text in inspect.getsource(importlib.import_module(kind.__module__)) for text in suspect
        )
    }
    assert found - RUN_ANSWERS == {"countdown"}
    assert RUN_ANSWERS - found == {"composite"}
    assert load("countdown", size=1, held_out=1).reward is rewards.countdown
