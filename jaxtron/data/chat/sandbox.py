"""The sandbox of chat templates: nothing of Python behind their values, and bounds of what one rendering may take.

A template comes with a tokenizer, from anybody. Jinja's own sandbox keeps it from Python; it may still loop for ever or
ask for all memory. So loops and calls are counted, and what makes much of little is refused before it is made.
"""

import contextlib
import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

try:
    import jinja2
    import jinja2.nodes
    import jinja2.runtime
    import jinja2.sandbox
    import jinja2.utils
    import jinja2.visitor
except ImportError:
    jinja2 = None

# turns of loops and calls of one rendering; the longest conversations have thousands
MOST_TURNS = 1_000_000
# characters of a text, items of a list with those of lists in it, bits of a number that a template makes
MOST_SIZE = 1 << 25
MOST_WRITTEN = 1 << 27
MOST_ITEMS = 1_000_000
MOST_BITS = 1 << 16
# columns, spaces and digits
MOST_WIDTH = 100_000
WIDE = ("center", "ljust", "rjust", "zfill", "expandtabs")
# of a format: a width of many digits, or one that is an argument
WIDTHS = re.compile(r"%[^a-zA-Z%]*(?:\d{6}|\*)|\{[^{}]*(?:\d{6}|\{)")
# filters whose numbers are values
FREE = ("default", "d", "int", "float", "sum")
_rendering = threading.local()


class Refusal(ValueError):
    """A template does not write this conversation, and says why."""


class TooMuch(ValueError):
    """A template asks for more time or memory than any needs."""


@contextlib.contextmanager
def spending() -> Iterator[None]:
    """One rendering, whose turns are counted anew."""
    _rendering.turns, _rendering.written = MOST_TURNS, 0
    yield


def make_environment(more: Mapping[str, Any]) -> Any:
    """Hugging Face's filters and tags, but to write what has no value is an error; `more` are further names."""
    assert jinja2 is not None
    absent = jinja2.utils.missing

    class Missing(jinja2.Undefined):
        """False and empty where it is tested, as in `{% if tools %}`."""

        __slots__ = ()
        __str__ = jinja2.StrictUndefined.__str__

        def __iter__(self):
            # turns lack keys that others have; a name that nobody gave is a slip
            if self._undefined_obj is absent:
                self._fail_with_undefined_error()
            return iter(())

    class Counting(jinja2.visitor.NodeTransformer):
        """Sends what loops go over, and texts, lists and mappings that are made, through a filter."""

        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = _through("counted", node.iter)
            return node

        def visit_made(self, node: Any) -> Any:
            self.generic_visit(node)
            return _through("bounded", node)

        visit_Concat = visit_List = visit_Dict = visit_made

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Jinja's sandbox, with bounds."""

        intercepted_binops = frozenset({"+", "*", "**", "%"})
        concat = staticmethod(_joined)

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            tree = Counting().visit(super()._parse(source, name, filename))
            tree.set_environment(self)
            return tree

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operation(operator, left, right)
            return _bounded(super().call_binop(context, operator, left, right))

        # its own parameters have names that no keyword of a template has
        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
            _spend()
            _check_method(__obj, args, kwargs)
            return _bounded(super().call(__context, __obj, *args, **kwargs))

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            wrapped = super().wrap_str_format(value)
            if wrapped is not None:
                _check_format(value.__self__)
            return wrapped

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
        undefined=Missing,
        finalize=_written,
    )
    del environment.globals["lipsum"]
    environment.filters["tojson"] = _to_json
    environment.filters |= {name: _checked(name, filter_) for name, filter_ in environment.filters.items()}
    environment.filters |= {
        "counted": jinja2.pass_context(lambda _, values: _counted(values)),
        "bounded": jinja2.pass_context(lambda _, value: _bounded(value)),
    }
    environment.globals |= {"raise_exception": _refuse, **more}
    return environment


def _through(name: str, node: Any) -> Any:
    assert jinja2 is not None
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _spend() -> None:
    _rendering.turns = getattr(_rendering, "turns", MOST_TURNS) - 1
    if _rendering.turns < 0:
        raise TooMuch(f"it takes more than {MOST_TURNS:,} turns of its loops and calls")


def _written(value: Any) -> Any:
    """A value that is written, also into a macro's text or a variable."""
    if isinstance(value, str):
        _rendering.written = getattr(_rendering, "written", 0) + len(value)
        if _rendering.written > MOST_WRITTEN:
            raise TooMuch(f"it writes more than {MOST_WRITTEN:,} characters")
    return value


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spend()
        yield value


def _bounded(value: Any) -> Any:
    """The value; `TooMuch` where it is, or would be if it were written out: lists may have one list many times."""
    if isinstance(value, str):
        _check_size(len(value))
    size, left = 0, [value] if isinstance(value, list | tuple | dict) else []
    while left:
        one = left.pop()
        inner = one.values() if isinstance(one, dict) else one
        size += len(inner)
        if size > MOST_ITEMS:
            raise TooMuch(f"it makes a list of more than {MOST_ITEMS:,} items")
        left += [part for part in inner if isinstance(part, list | tuple | dict)]
    return value


def _joined(pieces: Iterable[str]) -> str:
    """A text of its pieces."""
    found, size = [], 0
    for piece in pieces:
        size += len(piece)
        _check_size(size)
        found.append(piece)
    return "".join(found)


def _check_size(size: int) -> None:
    if size > MOST_SIZE:
        raise TooMuch(f"it makes a text of more than {MOST_SIZE:,} characters")


def _check_operation(operator: str, left: Any, right: Any) -> None:
    """`TooMuch` before an operation whose result would be."""
    sized = [one for one in (left, right) if isinstance(one, str | list | tuple)]
    numbers = [one for one in (left, right) if isinstance(one, int)]
    if operator == "+" and len(sized) == 2:
        _check_size(len(left) + len(right))
    elif operator == "*" and sized and numbers:
        _check_size(len(sized[0]) * numbers[0] * (1 if isinstance(sized[0], str) else MOST_SIZE // MOST_ITEMS))
    elif operator == "%" and isinstance(left, str):
        _check_format(left)
    elif len(numbers) == 2 and operator in ("*", "**"):
        bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_BITS:
            raise TooMuch(f"it makes a number of more than {MOST_BITS:,} bits")


def _check_method(method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """The same for a method of a text."""
    text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(text, str):
        return
    if name in WIDE:
        _check_widths((*args, *kwargs.values()))
    elif name == "replace":
        _check_replace(text, args)
    elif name == "join" and len(args) == 1 and isinstance(args[0], list | tuple):
        _check_joined(args[0], text)


def _checked(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose numbers are widths at most, and whose result is not too much."""

    assert jinja2 is not None
    surroundings = (jinja2.Environment, jinja2.nodes.EvalContext, jinja2.runtime.Context)

    @functools.wraps(filter_)
    def checked(*args: Any, **kwargs: Any) -> Any:
        # some get one of these first
        values = [arg for arg in args if not isinstance(arg, surroundings)]
        if name not in FREE:
            _check_widths((*values[1:], *kwargs.values()))
        if name == "format":
            _check_format(values[0])
        elif name == "replace" and isinstance(values[0], str):
            _check_replace(values[0], tuple(values[1:]))
        elif name == "join" and isinstance(values[0], list | tuple):
            _check_joined(values[0], values[1] if len(values) > 1 else "")
        return filter_(*args, **kwargs)

    return checked


def _check_widths(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MOST_WIDTH:
            raise TooMuch(f"it asks for more than {MOST_WIDTH:,} columns or items")


def _check_format(text: Any) -> None:
    if isinstance(text, str) and WIDTHS.search(text):
        raise TooMuch("it formats with a width of many digits, or one that is an argument")


def _check_replace(text: str, args: tuple[Any, ...]) -> None:
    if len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        count = text.count(args[0]) if args[0] else len(text) + 1
        _check_size(len(text) + count * len(args[1]))


def _check_joined(items: list[Any] | tuple[Any, ...], separator: Any) -> None:
    between = len(separator) if isinstance(separator, str) else 0
    _check_size(sum(len(one) if isinstance(one, str) else 1 for one in items) + between * len(items))


def _refuse(message: str) -> None:
    """What templates call when a conversation is not as they want it."""
    raise Refusal(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as it is: Jinja's own filter writes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
