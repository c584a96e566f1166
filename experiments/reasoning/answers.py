"""Finds the answer in what a model wrote: tagged, marked, or on the last lines."""

import re
from fractions import Fraction

# Characters at the end of a completion in which an answer is looked for.
LIMIT = 20_000
# A text that is a number and nothing else.
NUMBER = re.compile(r"[$]?-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)%?", re.ASCII)


def tagged(text: str) -> str | None:
    """What stands in the last ``<answer>...</answer>``, or else in the last ``\\boxed{...}``.

    Takes time in proportion to the length, of which no more than 20,000 characters count.

    Example:
        >>> tagged(r"<answer>3</answer> no: <answer> 4 </answer>"), tagged(r"\\boxed{\\frac{1}{2}}")
        ('4', '\\\\frac{1}{2}')
        >>> tagged("4") is None
        True
    """
    text = text[-LIMIT:]
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start < 0:
        return _boxed(text)
    inside = text[start + len("<answer>") : end].strip()
    boxed = _boxed(inside)
    return inside if boxed is None else boxed


def _boxed(text: str) -> str | None:
    mark = "\\boxed{"
    start = text.rfind(mark)
    if start < 0:
        return None
    depth, start = 1, start + len(mark)
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start:i].strip()
    return None


def extract(text: str, lines: int = 1) -> str:
    """The answer in a completion: what is tagged, or follows the last ``####``, or its last lines.

    Args:
        text: the completion.
        lines: of an answer that is not tagged.

    Example:
        >>> extract("3 + 4 is 7\\n#### 7"), extract("3+4=7\\n7\\n")
        ('7', '7')
    """
    found = tagged(text)
    if found is not None:
        return found
    _, mark, rest = text[-LIMIT:].rpartition("####")
    rows = [row.strip() for row in rest.split("\n") if row.strip()]
    return "\n".join(rows[:lines] if mark else rows[-lines:])


def number(text: str) -> Fraction | None:
    """The last number in a text, of at most 100 characters; commas may part its thousands.

    Example:
        >>> number("about $1,250.50 a year"), number("5-3"), number("none") is None
        (Fraction(2501, 2), Fraction(3, 1), True)
    """
    found = re.findall(r"(?<![\w.])-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)", text, re.ASCII)
    if not found or len(found[-1]) > 100:
        return None
    return Fraction(found[-1].replace(",", ""))


def plain(text: str) -> str:
    """A text without case, spaces beyond one, and what stands around it.

    Example:
        >>> plain("  the  Moon. ")
        'the moon'
    """
    return " ".join(text.split()).strip(" .").casefold()
