"""The checker of types in signatures that tests run with: beartype, made once for each signature."""

from collections.abc import Callable

from beartype import beartype

_MADE: dict[tuple[str, ...], Callable] = {}


def checked(fn: Callable) -> Callable:
    """As ``beartype``, for the functions that jaxtyping has checked: they hold a signature alone.

    jaxtyping makes two of them whenever a function is defined: for a function inside another, at each
    call of the other. Making the checks anew each time was 8% of the tracing of a step, in a profile.
    """
    if fn.__defaults__ or fn.__kwdefaults__:
        return beartype(fn)
    code = fn.__code__
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    # jaxtyping's types are new ones at each evaluation, and equal by their names alone.
    key = (
        fn.__module__, fn.__qualname__, repr(code.co_varnames), repr(counts), repr(fn.__annotations__),
    )  # fmt: skip
    if key not in _MADE:
        _MADE[key] = beartype(fn)
    return _MADE[key]
