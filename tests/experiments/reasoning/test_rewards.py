"""Arithmetic of hostile text, finding answers, and what each reward gives."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.reasoning import rewards
from experiments.reasoning.answers import extract, number, tagged
from experiments.reasoning.arithmetic import ExpressionError, evaluate, numbers_used
from experiments.reasoning.reward_values import LARGEST, RewardError, call, weighted
from experiments.reasoning.rewards import load
from experiments.run.errors import UsageError

# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("7/2/7", Fraction(1, 2)),
        ("0.1+0.2", Fraction(3, 10)),
        ("-(-3)--4", 7),
        (" 8 / (3 - 8/3) ", 24),
    ],
)
def test_arithmetic_is_exact(text: str, value: Fraction | int) -> None:
    assert evaluate(text) == value


@given(st.lists(st.integers(0, 99), min_size=1, max_size=9), st.data())
def test_arithmetic_is_that_of_python(values: list[int], data: Any) -> None:
    text, right = str(values[0]), values[0]
    for value in values[1:]:
        sign = data.draw(st.sampled_from("+-*"))
        text = f"({text}){sign}{value}"
        right = {"+": right + value, "-": right - value, "*": right * value}[sign]
    assert evaluate(text) == right
    assert numbers_used(text) == values


HOSTILE = {
    "95**36**21**3": "the operator Pow",
    "9//2": "the operator FloorDiv",
    "__import__('os').system('true')": 'the character "\'"',
    "x+1": "the character 'x'",
    "1e9": "the character 'e'",
    "1_000": "the character '_'",
    "10j": "the character 'j'",
    "٣+٤": "the character '٣'",
    "1\n+2": "the character '\\n'",
    "2(3)": "Call is not arithmetic",
    "(2)(3)": "Call is not arithmetic",
    "()": "Tuple is not arithmetic",
    "...": "the constant Ellipsis is no number",
    "1 2": "no arithmetic expression",
    "1+": "no arithmetic expression",
    "": "no arithmetic expression",
    "1/(2-2)": "a division by 0",
    "9" * 150: "a number of more than 256 bits",
    "*".join(["99999999"] * 20): "a number of more than 256 bits",
    "9" * 10**6: "1000000 characters are more than 200",
    "(" * 90 + "1" + ")" * 90: "parentheses 90 deep are deeper than 20",
    "(" * 10**6: "1000000 characters",
    "." + "9" * 190: "a number of more than 256 bits",
}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:20])
def test_hostile_arithmetic_is_refused_at_once(text: str) -> None:
    began = time.process_time()
    with pytest.raises(ExpressionError, match=re.escape(HOSTILE[text])):
        evaluate(text)
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize("text", ["2**3", "x", "2(3)", "", "9" * 150])
def test_numbers_are_not_listed_of_what_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        numbers_used(text)


@given(st.text(alphabet="0123456789.+-*/() ", max_size=210))
def test_any_text_of_its_characters_is_a_number_or_refused(text: str) -> None:
    try:
        assert isinstance(evaluate(text), Fraction)
    except ExpressionError:
        pass


def test_long_chains_of_signs_do_not_exhaust_the_stack() -> None:
    assert evaluate("-" * 198 + "1") == 1
    assert evaluate("1" + "+1" * 99) == 100


# ---------------------------------------------------------------- finding the answer


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<answer>1</answer> <answer>\n2 </answer> 3", "2"),
        (r"<answer>so \boxed{\frac{1}{2}}</answer>", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{{2}+{3}} end", "{2}+{3}"),
        ("<answer>3", None),
        ("3</answer>", None),
        (r"\boxed{{3}", None),
        ("3", None),
        ("<answer>1</answer>" + "x" * 20_000, None),
    ],
)
def test_tagged_answers(text: str, found: str | None) -> None:
    assert tagged(text) == found


@pytest.mark.parametrize(
    "piece", ["<answer>", "</answer>", "\\boxed{", "{", "}", "####\n", "1,111"]
)
def test_answers_are_sought_in_linear_time(piece: str) -> None:
    text = piece * 200_000
    began = time.process_time()
    for reward in (rewards.format_, rewards.exact):
        reward([text], ["1"])
    rewards.countdown([text], ["1"], numbers=[[1]], target=[1])
    assert time.process_time() - began < 1


def test_untagged_answers_are_the_last_lines() -> None:
    assert extract("2+3=5\n\n 5 \n\n") == "5"
    assert extract("thus:\n1 2\n3 4\n", lines=2) == "1 2\n3 4"
    assert extract("It is 5.\n#### 5\nNext question: 6") == "5"
    assert extract("") == ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("it costs $1,234.50.", Fraction(2469, 2)), ("x=-3", -3), ("10-3", 3), ("3 apples, 4", 4),
        (".5", Fraction(1, 2)), ("1,2", 2), ("x2", None), ("9" * 101, None), ("٣", None),
    ],
)  # fmt: skip
def test_the_last_number(text: str, value: Any) -> None:
    assert number(text) == value


# ---------------------------------------------------------------- rewards


# Columns that rewards need of a question, for those that need any.
COLUMNS: dict[str, dict[str, Any]] = {"countdown": dict(numbers=[1, 2], target=3)}
TEXTS = [
    "",
    "\0",
    "1/0",
    "2**3",
    "<answer>",
    "<answer></answer>",
    "\\boxed{",
    "####",
    "{" * 99,
    "9" * 999,
]


@pytest.mark.parametrize("name", sorted(set(rewards.REWARDS) - {"gym"}))
def test_a_reward_takes_whatever_was_written(name: str) -> None:
    if name == "math":
        pytest.importorskip("math_verify")
    given = COLUMNS.get(name, {})
    columns = {key: [value] * len(TEXTS) for key, value in given.items()}
    assert call(load(name), [], [], {key: [] for key in given}).rewards == []
    found = call(load(name), TEXTS, ["5"] * len(TEXTS), columns).rewards
    assert found == [0.0] * len(TEXTS)


def test_exact_compares_numbers_or_words() -> None:
    rows = [
        ("the total is 1,000", "1000", 1.0),
        ("18.00", "18", 1.0),
        ("$18", "$18.0", 1.0),
        ("5 and then 18\nno: 5", "18", 0.0),
        ("<answer>18</answer> and 5", "18", 1.0),
        ("nothing", "18", 0.0),
        ("nothing", "9" * 200, 0.0),  # beyond what counts as a number
        ("North  West.", "north west", 1.0),
        ("1 0\n0 1", "1 0\n0 1", 1.0),
        ("0 0\n0 1", "1 0\n0 1", 0.0),
    ]
    completions, answers, right = map(list, zip(*rows, strict=True))
    assert rewards.exact(completions, answers) == right


def test_countdown_accepts_every_right_expression_and_no_other() -> None:
    right = ["2*3+7", "7+3*2", "(7+(2*3))", "-(-7)+2*3", "2*3=6\n6+7=13\n2*3+7", "2*3+7=13"]
    wrong = ["13", "2+3+7", "2*3+7+0", "6+7", "2*3+7*1", "2*3", "", "13=2*3+7", "2**3+7", "٢*3+7"]
    texts = right + wrong
    found = rewards.countdown(
        texts, [""] * len(texts), numbers=[[7, 3, 2]] * len(texts), target=[13] * len(texts)
    )
    assert found == [1.0] * len(right) + [0.0] * len(wrong)
    assert rewards.countdown(["8/(3-8/3)"], [""], numbers=[[3, 3, 8, 8]], target=[24]) == [1.0]
    # Each number once: two of the same have to be given twice.
    assert rewards.countdown(["5+5"], [""], numbers=[[5]], target=[10]) == [0.0]


def test_math_verify_works_in_any_thread() -> None:
    pytest.importorskip("math_verify")
    found: list[float] = []
    texts = [r"\boxed{\frac{2}{4}}", "<answer>50\\%</answer>", "it is 1/3", "", r"\boxed{"]
    thread = threading.Thread(
        target=lambda: found.extend(rewards.math_(texts, [r"\frac{1}{2}"] * 5))
    )
    thread.start()
    thread.join()
    assert found == [1.0, 1.0, 0.0, 0.0, 0.0]


# ---------------------------------------------------------------- sums, checks


def ones(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def unknown(completions: list[str], answers: list[str], **_: Any) -> list[float | None]:
    return [None if text == "?" else float("nan") if text == "nan" else 2.0 for text in completions]


def level(completions: list[str], answers: list[str], *, level: list[int], **_: Any) -> list[int]:
    return level


def test_weighted_sums_and_keeps_apart() -> None:
    reward = weighted({"ones": (ones, 0.5), "unknown": (unknown, 2.0), "level": (level, -1.0)})
    scores = call(reward, ["a", "?", "nan"], ["x"] * 3, {"level": [1, 2, 3]})
    assert scores.rewards == [3.5, None, None]
    assert scores.parts == {
        "ones": [1.0, 1.0, 1.0], "unknown": [2.0, None, None], "level": [1.0, 2.0, 3.0]
    }  # fmt: skip
    assert reward(["a"], ["x"], level=[4]) == [0.5]
    with pytest.raises(UsageError, match="no reward is given"):
        weighted({})
    with pytest.raises(UsageError, match="the weight of the reward 'ones' is nan"):
        weighted({"ones": (ones, float("nan"))})


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        ([1.0], "the reward 'bad' gave 1 values for 2 completions; .*'first', the right answer 'x'"),
        (1.0, r"the reward 'bad' must give a list of 2 values, got 1.0 \(float\); the first of 2"),
        ([1.0, "2"], r"the reward 'bad' must give numbers or None, got '2' \(str\); the first of 2"),
        (KeyError("k"), "the reward 'bad' raised KeyError: 'k'; the first of 2 completions was 'first'"),
    ],
)  # fmt: skip
def test_a_reward_that_fails_is_told(gives: Any, words: str) -> None:
    def bad(completions: list[str], answers: list[str]) -> Any:
        if isinstance(gives, Exception):
            raise gives
        return gives

    for reward in (bad, weighted({"bad": (bad, 1.0)})):
        with pytest.raises(RewardError, match=words):
            call(reward, ["first", "second"], ["x", "y"], {})


def gives(values: Any, completions: int = 2) -> list[float | None]:
    """What `call` makes of the values that a reward gives."""
    texts = ["first", "second", "third", "fourth"][:completions]
    return call(lambda completions, answers: values, texts, ["right"] * completions, {}).rewards


HUGE = 10**400
# What a reward may give for two completions, and what counts.
NUMBERS: dict[str, tuple[Callable[[], Any], list[float | None]]] = {
    "numbers": (lambda: [1, 0.5], [1.0, 0.5]),
    "truth": (lambda: (True, False), [1.0, 0.0]),
    "None": (lambda: [None, 1], [None, 1.0]),
    "fractions": (lambda: [Fraction(1, 2), Fraction(HUGE, HUGE // 2)], [0.5, 2.0]),
    "decimals": (lambda: [Decimal("0.5"), Decimal("sNaN")], [0.5, None]),
    "not finite": (lambda: [float("nan"), -float("inf")], [None, None]),
    "not finite, NumPy": (lambda: np.array([np.nan, np.inf]), [None, None]),
    "more than a float": (lambda: [-HUGE, Decimal(HUGE)], [None, None]),
    "more than a float, a fraction": (lambda: [Fraction(HUGE, 3), 1], [None, 1.0]),
    "more than a float32": (lambda: [1e39, -3.4028235677973366e38], [None, None]),
    "the largest float32": (lambda: [LARGEST, -LARGEST], [LARGEST, -LARGEST]),
    "less than a float": (lambda: [Fraction(1, HUGE), 5e-324], [0.0, 5e-324]),
    "an equality of arrays": (lambda: np.array(["a", "b"]) == np.array(["a", "c"]), [1.0, 0.0]),
    "np.bool_": (lambda: [np.bool_(True), np.bool_(False)], [1.0, 0.0]),
    "scalars of NumPy": (lambda: [np.float16(0.5), np.uint8(3)], [0.5, 3.0]),
    "long doubles": (lambda: np.array([1, "1e400"], np.longdouble), [1.0, None]),
    "bfloat16": (lambda: np.array([1.5, 2], ml_dtypes.bfloat16), [1.5, 2.0]),
    "an array": (lambda: np.array([1, 0]), [1.0, 0.0]),
    "arrays without axes": (lambda: [np.array(1.0), np.array(True)], [1.0, 1.0]),
    "an array of objects": (lambda: np.array([None, Fraction(1, 2)], object), [None, 0.5]),
    "a masked entry": (lambda: np.ma.array([1.0, 7.0], mask=[False, True]), [1.0, None]),
    "an array of JAX": (lambda: jnp.array([1.0, 0.0]), [1.0, 0.0]),
    "scalars of JAX": (lambda: [jnp.bfloat16(2), jnp.array(False)], [2.0, 0.0]),
    "a range": (lambda: range(2), [0.0, 1.0]),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_of_all_kinds_count(case: str) -> None:
    make, right = NUMBERS[case]
    found = gives(make())
    assert found == right
    assert all(x is None or type(x) is float for x in found)


def test_numbers_of_other_libraries_count() -> None:
    torch, sympy = pytest.importorskip("torch"), pytest.importorskip("sympy")
    assert gives(torch.tensor([1.0, float("nan")], requires_grad=True)) == [1.0, None]
    assert gives([torch.tensor(2), torch.tensor(True)]) == [2.0, 1.0]
    assert gives([sympy.Integer(3), sympy.Rational(1, 2)]) == [3.0, 0.5]
    with pytest.raises(RewardError, match=r"must give numbers or None, got sqrt\(2\) "):
        gives([sympy.sqrt(2), 1])


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


# What is no list of two numbers, and how it is named.
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a dict": (lambda: {0: 1.0, 1: 2.0}, r"must give a list of 2 values, got {0: 1.0, 1: 2.0} \(dict\)"),
    "a set": (lambda: {1.0, 2.0}, r"must give a list of 2 values, got .*\(set\)"),
    "text": (lambda: "10", r"must give a list of 2 values, got '10' \(str\)"),
    "bytes": (lambda: b"10", r"must give a list of 2 values, got .*\(bytes\)"),
    "None": (lambda: None, r"must give a list of 2 values, got None \(NoneType\)"),
    "a generator": (lambda: (x for x in [1, 2]), r"must give a list of 2 values, got .*\(generator\)"),
    "an array without axes": (lambda: np.array(1.0), r"must give a list of 2 values, got .*\(ndarray\)"),
    "a number of JAX": (lambda: jnp.array(1.0), "must give a list of 2 values, got"),
    "too many": (lambda: np.zeros(3), "gave 3 values for 2 completions"),
    "numbers as text": (lambda: ["1", "0"], r"must give numbers or None, got '1' \(str\)"),
    "an array of text": (lambda: np.array(["1", "0"]), r"must give numbers or None, got"),
    "complex": (lambda: [1, 1j], r"must give numbers or None, got 1j \(complex\)"),
    "complex of NumPy": (lambda: np.array([1, 1j]), r"must give numbers or None, got"),
    "complex of JAX": (lambda: jnp.array([1, 1j]), r"must give numbers or None, got"),
    "nested": (lambda: [[1.0], [0.0]], r"must give numbers or None, got \[1.0\] \(list\)"),
    "a column": (lambda: np.zeros((2, 1)), r"must give numbers or None, got array\(\[0.\]\) \(ndarray\)"),
    "dicts": (lambda: [{"score": 1}, {}], r"must give numbers or None, got {'score': 1} \(dict\)"),
    "spans of time": (lambda: np.array([1, 2], "timedelta64[ns]"), "must give numbers or None, got"),
    "dates": (lambda: np.array(["2020", "2021"], "datetime64[ns]"), "must give numbers or None, got"),
    "a key of JAX": (lambda: [jax.random.key(0), 1], "must give numbers or None, got"),
    "an array within itself": (lambda: [itself(), 1], "must give numbers or None, got"),
    "what does not print": (lambda: [Unprintable(), 1], "must give numbers or None, got a value of the type Unprintable"),
    "what is too large to print": (lambda: [[10**5000], 1], "must give numbers or None, got a value of the type list"),
    "what is long": (lambda: ["x" * 10**6, 1], r"must give numbers or None, got 'x{96}\.\.\. \(str\)"),
}  # fmt: skip


def itself() -> np.ndarray:
    array = np.empty((), object)
    array[()] = array
    return array


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_number_is_told(case: str) -> None:
    make, words = WRONG[case]
    with pytest.raises(
        RewardError,
        match=f"the reward '<lambda>' (?s:.*){words}.*'first', the right answer 'right'",
    ):
        gives(make())


def test_a_sum_that_is_too_large_is_no_score() -> None:
    level: Any = lambda completions, answers, *, level: level
    reward = weighted({"a": (level, 2.0), "b": (level, 2.0)})
    scores = call(reward, ["x", "y"], ["", ""], {"level": [LARGEST / 2, 1.0]})
    assert scores.rewards == [None, 4.0]
    huge = weighted({"a": (level, 1e308)})
    assert call(huge, ["x"], [""], {"level": [10.0]}).rewards == [None]


# ---------------------------------------------------------------- a user's own


def test_a_users_reward_is_loaded_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def length(completions, answers, **_):\n    return [len(x) for x in completions]\n"
    )
    reward = load(f"{path}:length")
    scores = call(reward, ["abc", ""], ["", ""], {})
    assert scores.parts == {"length": [3.0, 0.0]}
    assert call(load("operator:concat"), [], [], {}).rewards == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exct", "there is no reward 'exct'; choose one of exact, .*; did you mean 'exact'"),
        ("mine.py", "--reward mine.py: must name a function in a file, as mine.py:NAME does"),
        ("{}/none.py:f", "--reward .*none.py:f: there is no file .*none.py"),
        ("{}/broken.py:f", "broken.py, line 1 raised ZeroDivisionError: division by zero"),
        ("{}/good.py:lenght", "good.py has no function 'lenght'; did you mean 'length'"),
        ("{}/good.py:value", r"value in .*good.py must be a function, got 3 \(int\)"),
        ("no_such_module:f", "--reward no_such_module:f: there is no module 'no_such_module'"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_told(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1/0\n")
    (tmp_path / "good.py").write_text("def length(completions, answers): ...\nvalue = 3\n")
    with pytest.raises(UsageError, match=words):
        load(name.format(tmp_path))


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    heavy = "jax torch numpy sympy math_verify reasoning_gym transformers".split()
    program = f"""
import sys
from experiments.reasoning import pool, rewards, tasks
assert rewards.exact(["1"], ["1"]) == [1.0]
print([name for name in {heavy} if name in sys.modules])
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert told.stdout.strip() == "[]", told.stderr
