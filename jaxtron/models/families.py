"""The families of models by name: those of the house, and packages of a user's own."""

import difflib
import functools
import importlib
import importlib.util
import traceback
from types import ModuleType
from typing import Any

from jaxtron.config import UserError
from jaxtron.models.family import Family, FamilyConfig

# a line a family: its package
DECODER = "decoder"
FAMILIES = {
    DECODER: "jaxtron.models.decoder",
    "bert": "jaxtron.models.bert",
    "bert_task": "jaxtron.models.bert.task",
    "t5": "jaxtron.models.t5",
    "metro": "jaxtron.models.metro",
}


@functools.cache
def family_named(name: str) -> Family[Any]:
    """The family called so by `model.family`; a `UserError` where there is none."""
    package = FAMILIES.get(name, name)
    if "." not in package or not all(map(str.isidentifier, package.split("."))):
        # a name alone may be of a package too; `importlib` would take leading dots for a package relative to none
        if not package.isidentifier() or importlib.util.find_spec(package) is None:
            near = difflib.get_close_matches(name, FAMILIES, n=1)
            hint = f"did you mean {near[0]}?" if near else _known()
            raise UserError(f"no model.family {name!r}; {hint}")
    module = _import(f"model.family {name}", f"{package}.family")
    found = getattr(module, "FAMILY", None)
    if not isinstance(found, Family):
        raise UserError(f"model.family {name}: {package}.family has no FAMILY made by jaxtron.models.family.Family")
    _check_config(name, found.config)
    if found.vocabulary is not None and found.vocabulary not in found.config.model_fields:
        raise UserError(
            f"model.family {name}: vocabulary {found.vocabulary!r} of its FAMILY is no setting of "
            f"{found.config.__name__}"
        )
    return found


def _check_config(name: str, config: Any) -> None:
    """`UserError` unless these are settings that a model can have without being told any."""
    if not (isinstance(config, type) and issubclass(config, FamilyConfig)):
        raise UserError(f"model.family {name}: the config of its FAMILY is {config!r}, no subclass of FamilyConfig")
    bare = [setting for setting, field in config.model_fields.items() if field.is_required()]
    if bare:
        raise UserError(
            f"model.family {name}: {config.__name__}.{bare[0]} has no default; all settings of a model have one"
        )


def _import(what: str, module: str) -> ModuleType:
    """A module of a family; a `UserError` that names what is missing, or where it fails."""
    try:
        return importlib.import_module(module)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    except ImportError as error:
        # of what a package of the user's own imports, the name is told that is missing
        is_own = error.name is not None and f"{module}.".startswith(f"{error.name}.")
        raise UserError(f"{what}: {error}{f'; {_known()}' if is_own else f', which {module} imports'}") from None
    except SyntaxError as error:
        place = f"{error.filename}, line {error.lineno}"
        raise UserError(f"{what}: {module} cannot be imported: SyntaxError: {error.msg} ({place})") from None
    except Exception as error:
        # anything can be wrong in code of the user's own; the place is what its author needs
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{what}: {module} cannot be imported: {type(error).__name__}: {error} ({place.filename}, line "
            f"{place.lineno})"
        ) from error


def _known() -> str:
    return (
        f"it is one of {', '.join(FAMILIES)}, or the dotted name of a package with a module family.py, seen from here "
        "or from PYTHONPATH"
    )


def family_of(config: FamilyConfig) -> Family[Any]:
    """The family of a model's configuration."""
    return family_named(config.family)


@functools.cache
def program_named(name: str) -> Any:
    """What computes models of the family called so: its `program.Program`, once JAX may be imported."""
    module = family_named(name).program
    family = family_named(name)
    found = getattr(_import(f"model.family {name}", module), "PROGRAM", None)
    # by what it has: this module is for those who may not import JAX yet
    if any(not hasattr(found, field) for field in ("batch", "losses", "metrics", "build", "model", "predict")):
        raise UserError(f"model.family {name}: {module} has no PROGRAM made by jaxtron.models.program.Program")
    assert found is not None
    sums = (*found.losses, *found.metrics)
    if family.text_loss is not None and family.text_loss not in sums:
        raise UserError(
            f"model.family {name}: text_loss {family.text_loss!r} of its FAMILY is none of its PROGRAM's sums, "
            f"{', '.join(sums)}"
        )
    if family.continues_text and found.predict is None:
        raise UserError(f"model.family {name}: its FAMILY says continues_text, and its PROGRAM has no predict")
    if family.writes is not None and found.steps is None:
        raise UserError(f"model.family {name}: its FAMILY says writes {family.writes!r}, and its PROGRAM has no steps")
    if family.writes == "answer" and found.answers is None:
        raise UserError(f"model.family {name}: its FAMILY says writes 'answer', and its PROGRAM has no answers")
    return found


def program_of(config: FamilyConfig) -> Any:
    """What computes a model: the `program.Program` of its family, once JAX may be imported."""
    return program_named(config.family)
