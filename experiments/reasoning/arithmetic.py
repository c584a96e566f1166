"""Arithmetic in text that may be hostile: an allow-list of syntax, exact fractions, bounds on everything."""

import ast
import operator
from fractions import Fraction

# Longer, deeper or larger than any honest answer to a question about a few numbers.
MAX_LENGTH = 200
MAX_DEPTH = 20
MAX_BITS = 256

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
ALLOWED = (ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.UAdd, ast.USub)
CHARACTERS = frozenset("0123456789.+-*/() ")


class ExpressionError(ValueError):
    """A text is no arithmetic expression, or one beyond the bounds."""


def evaluate(text: str) -> Fraction:
    """The exact value of an expression of decimal numbers, ``+ - * /``, signs and parentheses.

    Args:
        text: of at most 200 characters, parentheses at most 20 deep.

    Raises:
        ExpressionError: for whatever else there is in the text, and where a numerator or denominator on
            the way is over 256 bits, or a divisor is 0.

    Example:
        >>> evaluate("(1 + 2) * 3 / 4")
        Fraction(9, 4)
        >>> evaluate("95**36**21**3")
        Traceback (most recent call last):
        ...
        experiments.reasoning.arithmetic.ExpressionError: the operator Pow is none of + - * /
    """
    return _value(_parse(text), text)


def numbers_used(text: str) -> list[Fraction]:
    """The numbers written in an expression, from left to right.

    Raises:
        ExpressionError: as :func:`evaluate` does.

    Example:
        >>> [str(number) for number in numbers_used("(25 - 3) * -25")]
        ['25', '3', '25']
    """
    text = text.strip()
    constants = [node for node in ast.walk(_parse(text)) if isinstance(node, ast.Constant)]
    return [_number(node, text) for node in sorted(constants, key=lambda node: node.col_offset)]


def _parse(text: str) -> ast.expr:
    """The tree of an expression, made of nothing but what is allowed."""
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"{len(text)} characters are more than {MAX_LENGTH}")
    # Before Python sees the text: no names, strings, calls of names or digits beyond ASCII.
    foreign = sorted(set(text) - CHARACTERS)
    if foreign:
        raise ExpressionError(f"the character {foreign[0]!r} is not of an arithmetic expression")
    depth = deepest = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ExpressionError(f"parentheses {deepest} deep are deeper than {MAX_DEPTH}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ExpressionError(f"no arithmetic expression: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.operator) and type(node) not in OPERATORS:
            raise ExpressionError(f"the operator {type(node).__name__} is none of + - * /")
        if not isinstance(node, ALLOWED):
            raise ExpressionError(f"{type(node).__name__} is not arithmetic")
        if isinstance(node, ast.Constant) and not isinstance(node.value, int | float):
            raise ExpressionError(f"the constant {node.value!r} is no number")
    return tree


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant):
        return _number(node, text.strip())
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    assert isinstance(node, ast.BinOp)
    left, right = _value(node.left, text), _value(node.right, text)
    try:
        value = OPERATORS[type(node.op)](left, right)
    except ZeroDivisionError as error:
        raise ExpressionError("a division by 0") from error
    return _bounded(value)


def _number(node: ast.Constant, text: str) -> Fraction:
    # From its text and not from the float that Python makes of it: 0.1 is a tenth.
    return _bounded(Fraction(text[node.col_offset : node.end_col_offset]))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ExpressionError(f"a number of more than {MAX_BITS} bits")
    return value
