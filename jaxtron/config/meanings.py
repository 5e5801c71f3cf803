"""What each setting means: the text under its field, read from the source when somebody asks."""

import ast
import functools
import inspect
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
    try:
        source = inspect.getsource(config)
    except (OSError, TypeError):
        # made by a program, or typed at a prompt
        return {}
    definition = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in pairwise(definition.body):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found
