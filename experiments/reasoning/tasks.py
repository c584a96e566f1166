"""Tasks with answers that can be checked: home-made ones, those of reasoning-gym, files of one's own."""

import functools
import hashlib
import inspect
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.reasoning import rewards
from experiments.reasoning.rewards import Reward
from experiments.run.errors import UsageError, suggestion

# As it stands; a model that was trained on conversations needs its own form around it.
TEMPLATE = "{question}\n"

# Of reasoning-gym, sized for models of up to a few billion parameters.
PRESETS: dict[str, dict[str, Any]] = {
    "countdown": dict(min_numbers=3, max_numbers=4, min_target=10, max_target=100),
    "chain_sum": dict(min_terms=2, max_terms=4, max_digits=2),
    # Without division, which there may mean whole numbers or not.
    "basic_arithmetic": dict(max_terms=4, max_digits=2, operators=["+", "-", "*"]),
    "gsm_symbolic": {},
}

# Their verifiers run an answer as a program of Python, or let SymPy do so; a composite may hold any.
RUN_ANSWERS = frozenset(
    {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion", "puzzle24", "composite"}
    | {"intermediate_integration", "polynomial_multiplication", "simple_integration"}
)


class Question(NamedTuple):
    """What a model is asked.

    Attributes:
        prompt: what it reads.
        answer: the right answer, or one of them.
        columns: what else the reward needs, and "trace", a worked solution, where there is one.
    """

    prompt: str
    answer: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Questions to train on and held-out ones, no text in both, and what rewards completions.

    Attributes:
        name: of the task.
        train: questions to train on.
        held_out: questions to measure with.
        reward: takes completions, answers and :func:`columns`.
    """

    name: str
    train: Sequence[Question]
    held_out: Sequence[Question]
    reward: Reward

    def trace(self, question: Question) -> str | None:
        """A right completion with its steps, to begin with supervised; None where there is none."""
        return question.columns.get("trace")


def columns(questions: Sequence[Question]) -> dict[str, list[Any]]:
    """What a reward needs of questions beside their answers, a list each.

    Example:
        >>> columns([Question("2+3=", "5", {"trace": "5", "level": 1}), Question("4+4=", "8", {})])
        {'level': [1, None]}
    """
    found = dict.fromkeys(name for question in questions for name in question.columns)
    found.pop("trace", None)
    return {name: [question.columns.get(name) for question in questions] for name in found}


def load(name: str, **settings: Any) -> Task:
    """A task by its name.

    Args:
        name: "sums", "countdown-easy", a task of reasoning-gym, or a path that ends with ".jsonl".
        **settings: arguments of :func:`sums`, :func:`countdown_easy`, :func:`gym` or :func:`jsonl`.

    Raises:
        UsageError: where there is no such task, or it does not take one of the settings.

    Example:
        >>> task = load("sums", digits=1)
        >>> len(task.train), len(task.held_out)
        (92, 8)
        >>> load("sums", digit=1)
        Traceback (most recent call last):
        ...
        experiments.run.errors.UsageError: the task 'sums' has no setting 'digit'; did you mean 'digits'?
    """
    if name.endswith(".jsonl"):
        make: Callable[..., Task] = functools.partial(jsonl, Path(name))
    elif name in HOME_MADE:
        make = HOME_MADE[name]
    else:
        make = functools.partial(gym, name)
    known = inspect.signature(make).parameters
    others = any(one.kind is one.VAR_KEYWORD for one in known.values())
    for setting, value in settings.items():
        if setting in known:
            _check_kind(f"the task {name!r}: {setting}", value, known[setting].annotation)
        elif not others:
            raise UsageError(
                f"the task {name!r} has no setting {setting!r}{suggestion(setting, known)}"
            )
    return make(**settings)


# ---------------------------------------------------------------- home-made


def sums(
    *,
    digits: int = 2,
    size: int = 10_000,
    solved: int | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    template: str = "{question}",
) -> Task:
    """Sums of two numbers, in digits, + and =; the trace adds digit by digit from the right.

    Args:
        digits: of a number, at most.
        size: questions at most; where there are more, a sample is drawn. For two digits all 10,000 are.
        solved: so many of those to train on have a worked solution, the others an answer alone.
        held_out: share of the questions, roughly; a+b and b+a are both held out or both not.
        seed: decides the sample and the order.
        template: with {question} in it.

    Raises:
        UsageError: for numbers that cannot be.

    Example:
        >>> task = sums(digits=2)
        >>> one = next(q for q in task.train if q.prompt == "47+85=")
        >>> one.answer, task.trace(one)
        ('132', '7+5=12\\n4+8+1=13\\n132')
    """
    _check(template, digits=digits, size=size, solved=solved)
    chance, count = random.Random(seed), 10**digits
    drawn = chance.sample(range(count**2), min(size, count**2))

    def question(index: int) -> tuple[str, Question]:
        a, b = divmod(index, count)
        prompt = template.replace("{question}", f"{a}+{b}=")
        return f"{min(a, b)}+{max(a, b)}", Question(prompt, str(a + b), {"trace": _added(a, b)})

    train, others = _split(map(question, drawn), held_out)
    return Task("sums", _solved(train, solved), others, rewards.exact)


def _solved(questions: list[Question], count: int | None) -> list[Question]:
    """The first `count` with their worked solutions, the rest without."""
    if count is None:
        return questions
    bare = lambda one: one._replace(
        columns={name: value for name, value in one.columns.items() if name != "trace"}
    )
    return [*questions[:count], *map(bare, questions[count:])]


def _added(a: int, b: int) -> str:
    """A sum from right to left, a line for each digit; only the sum where both have one."""
    lines, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        terms = f"{x}+{y}+1" if carry else f"{x}+{y}"
        lines.append(f"{terms}={x + y + carry}")
        carry = (x + y + carry) // 10
    return "\n".join([*lines, str(a + b)]) if len(lines) > 1 else str(a + b)


def countdown_easy(
    *,
    size: int = 10_000,
    solved: int | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    template: str = "{question}",
) -> Task:
    """Three or four numbers from 1 to 9, to be made into a target with +, - and *, each used once.

    A prompt such as "2,3,7=13:" wants an expression with the value 13. The trace is a line for each step,
    and the expression. The target is at most 99, and no step of the trace is below 0.

    Args:
        size: questions, of some 21,000 that there are; fewer where that many different are not drawn.
        solved: so many of those to train on have a worked solution, the others an answer alone.
        held_out: share of the questions, roughly.
        seed: decides which questions, and their order.
        template: with {question} in it.

    Raises:
        UsageError: for numbers that cannot be.

    Example:
        >>> task = countdown_easy(size=1000)
        >>> one = task.train[0]
        >>> one.prompt, one.answer, task.trace(one)
        ('3,4,6,9=14:', '6-4+9+3', '6-4=2\\n2+9=11\\n11+3=14\\n6-4+9+3')
    """
    _check(template, size=size, solved=solved)
    chance = random.Random(seed)
    found: dict[str, Question] = {}
    # With so many tries, those that are rarely drawn are missing and no others.
    for _ in range(10 * size):
        if len(found) == size:
            break
        numbers = [chance.randint(1, 9) for _ in range(chance.choice((3, 4)))]
        expression, steps, target = _solution(numbers, chance)
        if 0 < target < 100 and not any("=-" in step for step in steps):
            text = f"{','.join(map(str, sorted(numbers)))}={target}:"
            known = {"numbers": sorted(numbers), "target": target}
            trace = "\n".join([*steps, expression])
            prompt = template.replace("{question}", text)
            found.setdefault(text, Question(prompt, expression, {**known, "trace": trace}))
    train, others = _split(found.items(), held_out)
    return Task("countdown-easy", _solved(train, solved), others, rewards.countdown)


def _solution(numbers: list[int], chance: random.Random) -> tuple[str, list[str], int]:
    """An expression of the numbers from left to right, its steps, and its value."""
    value, expression, steps, loose = numbers[0], str(numbers[0]), [], False
    for number in numbers[1:]:
        sign = chance.choice("+-*")
        expression = f"({expression})" if sign == "*" and loose else expression
        result = {"+": value + number, "-": value - number, "*": value * number}[sign]
        steps.append(f"{value}{sign}{number}={result}")
        expression, value, loose = f"{expression}{sign}{number}", result, sign != "*"
    return expression, steps, value


HOME_MADE: dict[str, Callable[..., Task]] = {"sums": sums, "countdown-easy": countdown_easy}


# ---------------------------------------------------------------- files


def jsonl(
    path: Path,
    *,
    held_out: float | str | Path = 0.1,
    question: str = "question",
    answer: str = "answer",
    trace: str | None = None,
    columns: Sequence[str] = (),
    template: str = TEMPLATE,
    reward: str | Reward = rewards.exact,
) -> Task:
    """Questions of a file, a JSON object a line.

    An answer with "####" in it, as those of GSM8K are, is a worked solution with the answer after that. A
    question that comes twice counts once, with its first answer; spaces make no difference.

    Args:
        path: of the file.
        held_out: a share, chosen by a hash of the question and so the same in every order; or the path of
            another file, whose questions are removed from the first.
        question: the column of questions.
        answer: the column of answers, texts or numbers.
        trace: the column of worked solutions, where answers have none. One in which no answer is marked,
            by "####", `<answer>` or `\\boxed`, ends with "####" and the answer.
        columns: others that the reward needs.
        template: with {question} in it.
        reward: takes completions, answers and the columns; or rewards by name, "exact=1,format=0.1".

    Raises:
        UsageError: for a file that cannot be read, or naming the line that has a mistake.
    """
    _check(template)
    for name in ("completions", "answers", "trace"):
        if name in columns:
            raise UsageError(
                f"a column for the reward cannot be called {name!r}: rename it in {path}"
            )
    if isinstance(reward, str):
        reward = rewards.named(reward, "reward")
    read = functools.partial(
        _questions,
        question=question,
        answer=answer,
        solved=trace,
        columns=columns,
        template=template,
    )
    found = read(path)
    if isinstance(held_out, str | Path):
        others = read(Path(held_out))
        train = [one for text, one in found.items() if text not in others]
        if not train:
            raise UsageError(f"every question of {path} is held out in {held_out} too")
        return Task(path.name, train, list(others.values()), reward)
    return Task(path.name, *_split(found.items(), held_out), reward)


def _questions(
    path: Path,
    *,
    question: str,
    answer: str,
    solved: str | None,
    columns: Sequence[str],
    template: str,
) -> dict[str, Question]:
    """The questions of a file by their text, of which the first counts."""
    found: dict[str, Question] = {}
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UsageError(
            f"{path} is empty; a line such as {{{question!r}: ..., {answer!r}: ...}} is right"
        )
    for number, line in rows:
        texts = (question, answer) if solved is None else (question, answer, solved)
        row = _row(line, f"{path}, line {number}", texts, columns)
        solution = str(row[answer])
        _, mark, after = solution.rpartition("####")
        right = after.strip() if mark else solution.strip()
        text = str(row[question])
        for column, value in ((question, text.strip()), (answer, right)):
            if not value:
                raise UsageError(f"{path}, line {number}: {column!r} is empty")
        known = {name: row[name] for name in columns}
        if solved is not None:
            known["trace"] = _ending(str(row[solved]), right)
        elif mark:
            known["trace"] = solution
        asked = Question(template.replace("{question}", text), right, known)
        found.setdefault(_plain(text), asked)
    return found


def _ending(solution: str, answer: str) -> str:
    """A worked solution that ends with its answer.

    Example:
        >>> _ending("7 and 7 make 14.", "14"), _ending("It is <answer>14</answer>", "14")
        ('7 and 7 make 14.\\n#### 14', 'It is <answer>14</answer>')
    """
    if "####" in solution or rewards.tagged(solution) is not None:
        return solution
    return f"{solution.rstrip()}\n#### {answer}"


def _row(line: str, place: str, texts: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise UsageError(f"{place} is {type(row).__name__} where an object {{...}} is right")
    for name in (*texts, *others):
        if name not in row:
            known = ", ".join(map(repr, row)) or "no column at all"
            raise UsageError(f"{place} has no {name!r} but {known}")
    for name in texts:
        if not isinstance(row[name], str | int | float):
            raise UsageError(f"{place}: {name!r} is {row[name]!r} where a text is right")
    return row


# ---------------------------------------------------------------- reasoning-gym


def gym(
    name: str,
    *,
    size: int = 10_000,
    held_out: int = 200,
    seed: int = 0,
    template: str = TEMPLATE,
    **settings: Any,
) -> Task:
    """A task of reasoning-gym, with its own verifier, which also gives parts of a point.

    Countdown is verified by :func:`experiments.reasoning.rewards.countdown`, since its own verifier runs the
    answer as a program, and tasks that do so without another to take its place are refused.

    Args:
        name: of the data set.
        size: questions to train on, made when they are asked for.
        held_out: questions that are held out, fewer where some come twice; the same for every seed.
        seed: decides the questions to train on.
        template: with {question} in it.
        **settings: of the data set; those of `PRESETS` by default.

    Raises:
        UsageError: where there is no such task, its verifier would run answers, it does not take these
            settings, or it has no question to train on that is not held out.
    """
    _check(template, size=size, held_out=held_out)
    if name in RUN_ANSWERS:
        raise UsageError(
            f"the verifier of {name!r} in reasoning-gym runs what a model answers as a program"
        )
    settings = {**PRESETS.get(name, {}), **settings}
    make = functools.partial(_made, name, settings, template)
    # Question i of a data set is decided by its seed + i: seeds side by side would share most of them.
    fixed = make(held_out, 2**31)
    tests = {_plain(text): one for text, one in map(fixed, range(held_out)) if one is not None}
    train = Generated(make(size, random.Random(seed).randrange(2**30)), size, frozenset(tests))
    train[0]  # says so now where there is none
    reward = rewards.countdown if name == "countdown" else rewards.gym
    return Task(name, train, list(tests.values()), reward)


class Generated(Sequence[Question]):
    """Questions that are made when they are asked for; one that is held out gives way to the next."""

    def __init__(
        self,
        made: Callable[[int], tuple[str, Question | None]],
        size: int,
        held_out: frozenset[str],
    ) -> None:
        self._made, self._size, self._held_out = made, size, held_out

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        start = range(self._size)[index]
        for step in range(self._size):
            text, question = self._made((start + step) % self._size)
            if question is not None and _plain(text) not in self._held_out:
                return question
        raise UsageError(
            f"all {self._size} questions to train on are held out too: choose settings with more of them"
        )


def _made(
    name: str, settings: dict[str, Any], template: str, size: int, seed: int
) -> Callable[[int], tuple[str, Question | None]]:
    """What makes question i, and its text; None where reasoning-gym finds none."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the task {name!r} needs the package {error.name!r}: pip install reasoning-gym"
        ) from error
    if name not in DATASETS:
        known = {*DATASETS, *HOME_MADE} - RUN_ANSWERS
        raise UsageError(
            f"there is no task {name!r}; choose one of {', '.join(HOME_MADE)}, a task of reasoning-gym, "
            f"or a file that ends with .jsonl{suggestion(name, known)}"
        )
    try:
        data = reasoning_gym.create_dataset(name, **settings, size=size, seed=seed)
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"the task {name!r} does not take {settings}: {error}") from error
    verifier = json.dumps({"name": name, **settings})

    def made(index: int) -> tuple[str, Question | None]:
        try:
            entry = data[index]
        except ValueError:  # a search among random questions that had no success
            return "", None
        known = {"entry": entry, "settings": verifier}
        if name == "countdown":
            known = {key: entry["metadata"][key] for key in ("numbers", "target")}
            known["trace"] = entry["answer"]
        if name == "gsm_symbolic":
            known["trace"] = entry["metadata"]["answer_cot"]
        text = entry["question"]
        prompt = template.replace("{question}", text)
        return text, Question(prompt, str(entry["answer"]), known)

    return made


# ---------------------------------------------------------------- helpers


# What a setting may be, by the annotation of the argument.
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    str | None: ((str, type(None)), "a text"),
    float | str | Path: ((int, float, str, Path), "a share, or the path of a file,"),
    Sequence[str]: ((list, tuple), "a list of names"),
}


def _check_kind(place: str, value: Any, kind: Any) -> None:
    types, words = KINDS.get(kind, ((object,), ""))
    listed = value if isinstance(value, list | tuple) else ()
    if (
        not isinstance(value, types)
        or isinstance(value, bool)
        or not all(isinstance(one, str) for one in listed)
    ):
        raise UsageError(f"{place} is {value!r} where {words} is right")


def _check(template: str, **positive: int | None) -> None:
    if "{question}" not in template:
        raise UsageError(f"the template {template!r} has no {{question}} in it")
    for name, value in positive.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}: choose a whole number of at least 1")


def _split(
    questions: Iterable[tuple[str, Question]], share: float
) -> tuple[list[Question], list[Question]]:
    """Questions to train on and held-out ones, by the hash of the text beside each."""
    if not 0 < share < 1:
        raise UsageError(f"held_out is {share}: choose a share between 0 and 1")
    train: list[Question] = []
    held_out: list[Question] = []
    for text, question in questions:
        hashed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
        (held_out if hashed < share * 2**64 else train).append(question)
    if not train or not held_out:
        raise UsageError(
            f"of {len(train) + len(held_out)} questions, {len(held_out)} are held out: "
            "choose another share, or give more of them"
        )
    return train, held_out


def _plain(text: str) -> str:
    return " ".join(text.split())
