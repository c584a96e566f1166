"""Home-made tasks, with worked solutions; small enough for a model from scratch."""

import random
from collections.abc import Callable

from experiments.reasoning import rewards
from experiments.reasoning.tasks.settings import check
from experiments.reasoning.tasks.task import Question, Task, split_by_text
from experiments.run.errors import UsageError


def sums(
    *,
    digits: int = 2,
    least: int = 0,
    most: int | None = None,
    size: int = 10_000,
    solved: int | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    form: str = "{a}+{b}=",
    template: str = "{question}",
) -> Task:
    """Sums of two numbers, in digits, + and =; the trace adds digit by digit from the right.

    Args:
        digits: of a number, at most.
        least: of the numbers.
        most: of the numbers; by default all of so many digits.
        size: questions at most; where there are more, a sample is drawn. For two digits all 10,000 are.
        solved: so many of those to train on have a worked solution, the others an answer alone.
        held_out: share of the questions, roughly; a+b and b+a are both held out or both not.
        seed: decides the sample and the order.
        form: of a question, with {a} and {b} in it.
        template: with {question} in it.

    Raises:
        UsageError: for numbers that cannot be.

    Example:
        >>> task = sums(digits=2)
        >>> one = next(q for q in task.train if q.prompt == "47+85=")
        >>> one.answer, one.trace
        ('132', '7+5=12\\n4+8+1=13\\n132')
    """
    check(template, digits=digits, size=size, solved=solved)
    top = 10**digits - 1 if most is None else most
    if "{a}" not in form or "{b}" not in form:
        raise UsageError(f"form must have {{a}} and {{b}} in it, got {form!r}")
    if not 0 <= least <= top:
        raise UsageError(f"least must be from 0 to {top}, the largest number, got {least}")
    chance, count = random.Random(seed), top - least + 1
    drawn = chance.sample(range(count**2), min(size, count**2))

    def question(index: int) -> tuple[str, Question]:
        a, b = (least + number for number in divmod(index, count))
        asked = form.replace("{a}", str(a)).replace("{b}", str(b))
        prompt = template.replace("{question}", asked)
        return f"{min(a, b)}+{max(a, b)}", Question(prompt, str(a + b), trace=_added(a, b))

    train, others, fresh = split_by_text(map(question, drawn), held_out, shuffled=True)
    longest = _added(top, top)
    return Task(
        name="sums",
        train=_solved(train, solved),
        held_out=others,
        fresh=fresh,
        reward=rewards.exact,
        # Its end, and some to spare.
        max_new_tokens=len(longest) + len(str(top)) + 3,
    )


def _solved(questions: list[Question], count: int | None) -> list[Question]:
    """The first `count` with their worked solutions, the rest without."""
    if count is None:
        return questions
    return [*questions[:count], *(one._replace(trace=None) for one in questions[count:])]


def _added(a: int, b: int) -> str:
    """A sum from right to left, a line for each digit; only the sum where both have one."""
    lines, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        terms = f"{x}+{y}+1" if carry else f"{x}+{y}"
        lines.append(f"{terms}={x + y + carry}")
        carry = (x + y + carry) // 10
    return "\n".join([*lines, str(a + b)]) if len(lines) > 1 else str(a + b)


def sorting(
    *,
    count: int = 3,
    least: int = 0,
    most: int = 99,
    size: int = 10_000,
    held_out: float = 0.1,
    seed: int = 0,
    form: str = "{numbers}:",
    template: str = "{question}",
) -> Task:
    """Different numbers to be sorted, the smallest first; a reward for every number in its place.

    Args:
        count: numbers of a question.
        least: of the numbers.
        most: of the numbers.
        size: questions that are drawn; the same numbers in the same order count once.
        held_out: share of the questions, roughly; the same numbers in any order are all held out or none.
        seed: decides the questions.
        form: of a question, with {numbers} in it.
        template: with {question} in it.

    Raises:
        UsageError: for numbers that cannot be.

    Example:
        >>> task = sorting(size=100)
        >>> task.train[0].prompt, task.train[0].answer
        ('49, 97, 53:', '49, 53, 97')
    """
    check(template, count=count, size=size)
    if "{numbers}" not in form:
        raise UsageError(f"form must have {{numbers}} in it, got {form!r}")
    if least < 0:
        raise UsageError(f"least must be 0 or more, got {least}")
    if most < (lowest := least + count - 1):
        raise UsageError(
            f"most must be at least {lowest}, for {count} different numbers from {least}, got {most}"
        )
    chance = random.Random(seed)
    drawn = [tuple(chance.sample(range(least, most + 1), count)) for _ in range(size)]

    def question(numbers: tuple[int, ...]) -> tuple[str, Question]:
        written = lambda order: ", ".join(map(str, order))
        asked = form.replace("{numbers}", written(numbers))
        answer = written(sorted(numbers))
        return answer, Question(template.replace("{question}", asked), answer, trace=answer)

    train, others, fresh = split_by_text(map(question, dict.fromkeys(drawn)), held_out, True)
    return Task(
        name="sorting",
        train=train,
        held_out=others,
        fresh=fresh,
        reward=rewards.numbers,
        max_new_tokens=count * (len(str(most)) + 2) + 4,
    )


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
        >>> one.prompt, one.answer, one.trace
        ('3,4,6,9=14:', '6-4+9+3', '6-4=2\\n2+9=11\\n11+3=14\\n6-4+9+3')
    """
    check(template, size=size, solved=solved)
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
            found.setdefault(text, Question(prompt, expression, known, trace))
    train, others, fresh = split_by_text(found.items(), held_out, shuffled=True)
    return Task(
        name="countdown-easy",
        train=_solved(train, solved),
        held_out=others,
        fresh=fresh,
        reward=rewards.countdown,
        max_new_tokens=40,
    )


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


# By the name that `--task` takes; a task has its entry here and nowhere else.
HOME_MADE: dict[str, Callable[..., Task]] = {
    "sums": sums,
    "sorting": sorting,
    "countdown-easy": countdown_easy,
}
