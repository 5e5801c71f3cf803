"""The families of models by name: those of the house, and packages of a user's own."""

import functools
import importlib
from typing import Any

from jaxtron.config import UserError
from jaxtron.models.family import Family, FamilyConfig

# a line a family: its package
DECODER = "decoder"
FAMILIES = {DECODER: "jaxtron.models.decoder"}


@functools.cache
def family_named(name: str) -> Family[Any]:
    """The family called so by `model.family`; a `UserError` where there is none."""
    package = FAMILIES.get(name, name)
    if not all(map(str.isidentifier, package.split("."))):
        # `importlib` would take leading dots for a package relative to none
        raise UserError(f"model.family {name!r} is not {', '.join(FAMILIES)}, nor the dotted name of a package")
    try:
        found = getattr(importlib.import_module(f"{package}.family"), "FAMILY", None)
    except (ImportError, ValueError) as error:
        # of what a package of the user's own imports, the name is told that is missing
        raise UserError(
            f"model.family {name}: {error}; it is one of {', '.join(FAMILIES)}, or the dotted name of a package with a "
            "module family.py, seen from here or from PYTHONPATH"
        ) from None
    if not isinstance(found, Family):
        raise UserError(f"model.family {name}: {package}.family has no FAMILY made by jaxtron.models.family.Family")
    return found


def family_of(config: FamilyConfig) -> Family[Any]:
    """The family of a model's configuration."""
    return family_named(config.family)


def program_of(config: FamilyConfig) -> Any:
    """What computes a model: the `program.Program` of its family, once JAX may be imported."""
    return importlib.import_module(family_of(config).program).PROGRAM
