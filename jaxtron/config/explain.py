"""What pydantic found wrong, in one line."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from jaxtron.config.base import Config, shown
from jaxtron.config.settings import Setting, nearest, settings
from jaxtron.config.source import SettingsSource


def explain(
    config_type: type[Config], source: SettingsSource, error: ValidationError, path: Path | None, *, takes_flags: bool
) -> str:
    """The first error in a line, and how many more there are: what was given before what is missing."""
    known = settings(config_type)
    lines: dict[str, str] = {}
    errors: list[dict[str, Any]] = [dict(details) for details in error.errors(include_url=False)]
    for details in sorted(errors, key=lambda details: details["type"] == "missing"):
        name = _dotted_name(known, details["loc"])
        if details["type"] == "union_tag_invalid":
            name = f"{name}.{details['ctx']['discriminator'].strip(chr(39))}"
        if details["type"] == "extra_forbidden":
            value = details["input"]
            name = ".".join([*([name] if name else []), str(details["loc"][-1])])
            while isinstance(value, dict) and value:
                key, value = next(iter(value.items()))
                name = f"{name}.{key}"
            line = f"unknown setting {name}{source.origin(name)}{nearest(name, known)}"
        else:
            line = _explain_value(name, known, source, details, path, takes_flags)
        lines.setdefault(name, line)
    first, *others = lines.values()
    return first + (f" (and {len(others)} more)" if others else "")


def _explain_value(
    name: str,
    known: dict[str, Setting],
    source: SettingsSource,
    details: dict[str, Any],
    path: Path | None,
    takes_flags: bool,
) -> str:
    setting, value, kind = known.get(name), source.get(name), details["type"]
    if kind in ("value_error", "assertion_error"):
        message = str(details["ctx"]["error"])
        # a message that speaks in full dotted names needs no other
        return message if not name or f"{name}." in message else f"{name}: {message}"
    if setting is None or value is PydanticUndefined:
        meaning = f" ({setting.type_text}: {setting.meaning})" if setting else ""
        if not takes_flags:
            return f"{path}: {name} has no value{meaning}: give it there"
        return f"{name} has no value{meaning}: give it in {path or 'a file'} or as --{name}"
    bound = kind.startswith(("greater_than", "less_than", "multiple_of", "string_", "finite"))
    if bound and not kind.endswith("_type"):
        expected = details["msg"].replace("Input should", "must").replace("String should", "must")
    else:
        expected = f"expected {setting.type_text}"
    return f"{name}: {expected}, got {shown(value)}{source.origin(name)}"


def _dotted_name(known: dict[str, Setting], location: tuple[int | str, ...]) -> str:
    """The setting at a pydantic location, whose union tags, list places and unknown keys are left out."""
    name = ""
    for part in location:
        longer = f"{name}.{part}" if name else str(part)
        if longer in known:
            name = longer
    return name
