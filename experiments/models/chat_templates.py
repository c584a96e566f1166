"""The environment of Jinja that chat templates are written for: that of Hugging Face's transformers.

Templates are programs of whoever made a model. They run in Jinja's immutable sandbox, and see no object of
Python through which they could change what they are given.
"""

import datetime
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment


def environment() -> "ImmutableSandboxedEnvironment":
    """A new environment, with what transformers has beyond Jinja's own.

    - ``{% generation %} ... {% endgeneration %}`` writes what it encloses (transformers marks there the
      tokens that a model is trained on); assignments inside do not reach outside
    - ``{% break %}`` and ``{% continue %}``
    - ``tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)``, without Jinja's escapes
      for HTML
    - ``raise_exception(message)`` and ``strftime_now(format)``
    - ``dict`` as a function alone, and ``namespace`` without names that begin with an underscore
    - a line break after a block, and spaces before it, are left out

    Errors of templates are Jinja's (``jinja2.TemplateError`` and its kin) and Python's.

    Example:
        >>> text = "{% generation %}{{ messages[0] | tojson(ensure_ascii=False) }}{% endgeneration %}"
        >>> environment().from_string(text).render(messages=[{"content": "<né>"}])
        '{"content": "<né>"}'
    """
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as in the base class

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def allowed(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(
                f"the name {name!r} in a namespace must not begin with an underscore"
            )

    class PublicNamespace(Namespace):
        # Positional alone, so that a template may call an entry "self".
        def __init__(self, /, *args: Any, **kwargs: Any) -> None:
            for name in dict(*args, **kwargs):
                allowed(name)
            super().__init__(*args, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            allowed(name)
            super().__setitem__(name, value)

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    found.filters["tojson"] = _to_json
    found.globals |= {
        "raise_exception": _refuse,
        "strftime_now": _now,
        "dict": _Dict(),
        "namespace": PublicNamespace,
    }
    return found


class _Dict:
    """Makes dictionaries; methods of the type, such as ``dict.update(message)``, are out of reach."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
