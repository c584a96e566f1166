"""Tasks of a file of questions, a JSON object a line."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.reasoning import rewards
from experiments.reasoning.answers import tagged
from experiments.reasoning.reward_values import Reward
from experiments.reasoning.tasks.settings import TEMPLATE, check
from experiments.reasoning.tasks.task import TAKEN, Question, Task, apart, plain, split_by_text
from experiments.run.errors import UsageError


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
    max_new_tokens: int = 512,
) -> Task:
    """Questions of a file, a JSON object a line.

    An answer with "####" in it, as those of GSM8K are, is a worked solution with the answer after that. A
    question that comes twice counts once, with its first answer; spaces make no difference.

    Args:
        path: of the file.
        held_out: a share, chosen by a hash of the question and so the same in every order; or the path of
            another file, whose questions are removed from the first. A third of these questions is fresh.
        question: the column of questions.
        answer: the column of answers, texts or numbers.
        trace: the column of worked solutions, where answers have none. One in which no answer is marked,
            by "####", `<answer>` or `\\boxed`, ends with "####" and the answer.
        columns: others that the reward needs.
        template: with {question} in it.
        reward: takes completions, answers and the columns; or rewards by name, "exact=1,format=0.1".
        max_new_tokens: of a completion, unless `--max-new-tokens` says otherwise.

    Raises:
        UsageError: for a file that cannot be read, or naming the line that has a mistake.
    """
    check(template, max_new_tokens=max_new_tokens)
    for name in TAKEN:
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
        measured, fresh = apart(others.items())
    else:
        train, measured, fresh = split_by_text(found.items(), held_out)
    return Task(
        name=path.name,
        train=train,
        held_out=measured,
        fresh=fresh,
        reward=reward,
        max_new_tokens=max_new_tokens,
    )


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
            f"{path} must have a line such as {{{question!r}: ..., {answer!r}: ...}}, but is empty"
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
        known_solution = solution if mark else None
        if solved is not None:
            known_solution = _ending(str(row[solved]), right)
        asked = Question(template.replace("{question}", text), right, known, known_solution)
        found.setdefault(plain(text), asked)
    return found


def _ending(solution: str, answer: str) -> str:
    """A worked solution that ends with its answer.

    Example:
        >>> _ending("7 and 7 make 14.", "14"), _ending("It is <answer>14</answer>", "14")
        ('7 and 7 make 14.\\n#### 14', 'It is <answer>14</answer>')
    """
    if "####" in solution or tagged(solution) is not None:
        return solution
    return f"{solution.rstrip()}\n#### {answer}"


def _row(line: str, place: str, texts: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise UsageError(f"{place} must be an object {{...}}, got {type(row).__name__}")
    for name in (*texts, *others):
        if name not in row:
            known = ", ".join(map(repr, row)) or "no column at all"
            raise UsageError(f"{place} has no {name!r} but {known}")
    for name in texts:
        if not isinstance(row[name], str | int | float):
            raise UsageError(f"{place}: {name!r} must be a text or a number, got {row[name]!r}")
    return row
