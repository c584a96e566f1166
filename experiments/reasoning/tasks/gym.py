"""Tasks of reasoning-gym, whose questions are made when they are asked for."""

import functools
import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.reasoning import rewards
from experiments.reasoning.tasks.home_made import HOME_MADE
from experiments.reasoning.tasks.settings import TEMPLATE, check
from experiments.reasoning.tasks.task import Question, Task, plain
from experiments.run.errors import UsageError, suggestion

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

# How its source names a task.
NAMED = re.compile(r'(?:DATASET_NAME *= *|register_dataset\(\s*)"(\w+)"')


def gym(
    name: str,
    *,
    size: int = 10_000,
    held_out: int = 200,
    fresh: int | None = None,
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
        fresh: others that are held out for the end, as many by default.
        seed: decides the questions to train on.
        template: with {question} in it.
        **settings: of the data set; those of `PRESETS` by default.

    Raises:
        UsageError: where there is no such task, its verifier would run answers, it does not take these
            settings, or it has no question to train on that is not held out.
    """
    check(template, size=size, held_out=held_out, fresh=fresh)
    if name in RUN_ANSWERS:
        raise UsageError(
            f"the verifier of {name!r} in reasoning-gym runs what a model answers as a program"
        )
    settings = {**PRESETS.get(name, {}), **settings}
    make = functools.partial(_made, name, settings, template)
    # Question i of a data set is decided by its seed + i: seeds side by side would share most of them.
    drawn = functools.partial(_drawn, make)
    tests = drawn(held_out, 2**31)
    found = drawn(held_out if fresh is None else fresh, 2**31 + 2**30)
    others = {text: one for text, one in found.items() if text not in tests}
    seed_of_train = random.Random(seed).randrange(2**30)
    train = Generated(make(size, seed_of_train), size, frozenset({*tests, *others}))
    train[0]  # says so now where there is none
    reward = rewards.countdown if name == "countdown" else rewards.gym
    return Task(
        name=name,
        train=train,
        held_out=list(tests.values()),
        fresh=list(others.values()),
        reward=reward,
        max_new_tokens=512,
    )


def _drawn(
    make: Callable[[int, int], Callable[[int], tuple[str, Question | None]]], size: int, seed: int
) -> dict[str, Question]:
    """Questions of a data set by their texts."""
    made = make(size, seed)
    return {plain(text): one for text, one in map(made, range(size)) if one is not None}


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
            if question is not None and plain(text) not in self._held_out:
                return question
        raise UsageError(
            f"all {self._size} questions to train on are held out too: choose settings with more of them"
        )


def check_name(name: str) -> None:
    """Raises UsageError for a task that reasoning-gym does not have, or where it is not installed.

    It is looked for in the source, as importing the package takes seconds.
    """
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or spec.origin is None:
        raise _missing(name, "reasoning_gym")
    files = Path(spec.origin).parent.rglob("*.py")
    found = {one for file in files for one in NAMED.findall(file.read_text("utf-8"))}
    if name not in found:
        raise _unknown(name, found)


def _missing(name: str, package: str | None) -> UsageError:
    return UsageError(f"the task {name!r} needs the package {package!r}: pip install reasoning-gym")


def _unknown(name: str, found: Iterable[str]) -> UsageError:
    known = {*found, *HOME_MADE} - RUN_ANSWERS
    return UsageError(
        f"there is no task {name!r}; choose one of {', '.join(HOME_MADE)}, a task of reasoning-gym, "
        f"or a file that ends with .jsonl{suggestion(name, known)}"
    )


def _made(
    name: str, settings: dict[str, Any], template: str, size: int, seed: int
) -> Callable[[int], tuple[str, Question | None]]:
    """What makes question i, and its text; None where reasoning-gym finds none."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise _missing(name, error.name) from error
    if name not in DATASETS:
        raise _unknown(name, DATASETS)
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
        known, trace = {"entry": entry, "settings": verifier}, None
        if name == "countdown":
            known = {key: entry["metadata"][key] for key in ("numbers", "target")}
            trace = entry["answer"]
        if name == "gsm_symbolic":
            trace = entry["metadata"]["answer_cot"]
        text = entry["question"]
        prompt = template.replace("{question}", text)
        return text, Question(prompt, str(entry["answer"]), known, trace)

    return made
