"""Annotations of all of Jaxtron's functions and dataclasses are checked in every test, shapes included.

Types are at every call. Shapes, which cost 20 microseconds a call, are at the first calls of a function in a test and
then at one of many; so are functions in functions, whose checks are made anew with them. Classes that are no
dataclasses are by their methods; a `NamedTuple`'s fields, and what a generator yields, are not checked.

Install this before anything of `jaxtron` is imported: what was imported earlier goes unchecked.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any, Self, get_args

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, install_import_hook, jaxtyped

# all of them would triple the time that schedules are made and searched in
FIRST, EVERY = 8, 64
_times: dict[CodeType, int] = {}
# `float` takes an int, as type checkers have it
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """The function with its annotations checked, but for `Self` (a method does not know its class yet) and strings.

    Fields of a dataclass that is a pytree are not: JAX fills it with shardings, types and booleans as well.
    """
    # JAX reads the environment as it is imported, so not before conftest.py has set it
    from jax.tree_util import all_leaves

    for name, hint in function.__annotations__.items():
        # a string may be of what another package knows, in fields from it above all, or of what type checkers know
        is_elsewhere = isinstance(hint, str) and (function.__name__ == "__init__" or not hint.isidentifier())
        if hint is Self or is_elsewhere:
            function.__annotations__[name] = Any
    checked = _check(function)
    if function.__name__ != "__init__":
        return checked

    @functools.wraps(function)
    def initialize(self, *arguments, **named) -> None:
        is_pytree = dataclasses.is_dataclass(self) and not all_leaves([self])
        (function if is_pytree else checked)(self, *arguments, **named)

    return initialize


def _has_shapes(hint: Any) -> bool:
    """Whether an annotation has letters, which bind what else a call has."""
    return (inspect.isclass(hint) and issubclass(hint, AbstractArray)) or any(map(_has_shapes, get_args(hint)))


def _is_due(code: CodeType) -> bool:
    """Whether to check this call, or this definition of a function in a function."""
    _times[code] = times = _times.get(code, 0) + 1
    return times <= FIRST or times % EVERY == 0


def _sampled(function: Callable, checked: Callable) -> Callable:
    """Checked when due."""
    code = function.__code__

    @functools.wraps(function)
    def call(*arguments, **named):
        return (checked if _is_due(code) else function)(*arguments, **named)

    return call


def _checked(*, typechecker: Callable) -> Callable:
    """What the hook decorates with: `jaxtyped` where there are shapes, the mere check of types where there are none."""

    def decorate(target: Any) -> Any:
        function = vars(target).get("__init__") if inspect.isclass(target) else target
        if function is None or not function.__annotations__:
            return target
        if inspect.isclass(target):
            if dataclasses.is_dataclass(target):
                target.__init__ = wrap(function)
            return target
        if not function.__code__.co_flags & inspect.CO_NESTED:
            return wrap(function)
        # a function in another is made anew, and its check with it: as good as called when it is defined
        return wrap(function) if _is_due(function.__code__) else function

    def wrap(function: Callable) -> Callable:
        if any(map(_has_shapes, function.__annotations__.values())):
            return _sampled(function, jaxtyped(function, typechecker=typechecker))
        return check(function)

    return decorate


def start_test() -> None:
    """Each test has its own first calls."""
    _times.clear()


def install() -> None:
    """Has all that is imported of `jaxtron` from now on checked."""
    # what the hook writes above every function and class
    jaxtyping.jaxtyped = _checked
    install_import_hook("jaxtron", f"{__name__}.{check.__name__}")
