"""What each setting means: the text under its field, read from the source when somebody asks."""

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Mapping
from itertools import pairwise

from jaxtron.config.base import Config


@functools.cache
def meanings(config: type[Config]) -> Mapping[str, str]:
    """By the name of a field, its description, or the text under it in its class or in one that this extends."""
    found = {name: " ".join((field.description or "").split()) for name, field in config.model_fields.items()}
    for base in reversed(config.__mro__):
        if issubclass(base, Config):
            found |= _of_class(base)
    return found


def _of_class(config: type[Config]) -> dict[str, str]:
    found = {}
    for field, text in pairwise(_definition(config)):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _definition(config: type[Config]) -> list[ast.stmt]:
    """The statements of its class; none where it was made by a program, or typed at a prompt."""
    try:
        if config.__qualname__ == config.__name__:
            return _classes(config.__module__).get(config.__name__, [])
        definition = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    except (OSError, TypeError):
        return []
    assert isinstance(definition, ast.ClassDef)
    return definition.body


@functools.cache
def _classes(module: str) -> Mapping[str, list[ast.stmt]]:
    """The statements of a module's classes: `inspect` would read the module anew for each of them."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {statement.name: statement.body for statement in tree.body if isinstance(statement, ast.ClassDef)}
