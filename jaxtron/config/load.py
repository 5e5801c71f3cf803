"""How a configuration is filled: YAML file, its `extends:` parents, dotted flags.

File and flags become one tree of plain values, validated once by the pydantic model itself, so that both get the same
rules and the same words. A `Config` cannot use `mode="before"` model validators: with them pydantic stops reading
lists as tuples.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from jaxtron.config.arguments import split_arguments
from jaxtron.config.base import Config, ConfigType, NoEffect, UserError, format_value
from jaxtron.config.explain import explain
from jaxtron.config.settings import Setting, choices_of, is_config, settings
from jaxtron.config.source import SettingsSource, read_file
from jaxtron.config.yaml_text import Dumper

# whole numbers without a bound of their own go to devices, whose integers have 32 bits, and numbers to their float32
LARGEST_INT = 2**31 - 1
LARGEST_FLOAT, SMALLEST_FLOAT = 3.4e38, 1.2e-38


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def gather(
    config_type: type[Config],
    path: Path | None,
    overrides: Sequence[str] = (),
    under: SettingsSource | None = None,
    values: Mapping[str, Any] | None = None,
) -> SettingsSource:
    """File and flags as plain values with their origins, before validation; raises `UserError` if they do not read.

    `under` are settings from elsewhere, which both lie over; they stay as they are. `values`, plain ones by dotted name
    or of whole sections, lie over all.
    """
    if path is not None:
        source = read_file(path, under=under)
    else:
        source = SettingsSource() if under is None else copy.deepcopy(under)
    source.layer += 1
    known = settings(config_type)
    words, flags = split_arguments(config_type, overrides)
    if words:
        raise UserError(f"unexpected argument {words[0]!r}: settings are given as --name value")
    seen: set[str] = set()
    for name, value in flags:
        if name in seen and name in known and known[name].is_sequence:
            value = _as_list(source.get(name)) + _as_list(value)
        seen.add(name)
        source.set(name, value, f"--{name}")
    for name, value in (values or {}).items():
        source.set(name, value, f"{name}=")
    for name, setting in known.items():
        value = source.get(name)
        adapted = _adapt(value, setting)
        if adapted is not value:
            source.set(name, adapted, source.origins[name])
        # which of several sections is meant: the default's kind, where none is given
        for tag in _tags(setting) if isinstance(value, dict) and isinstance(setting.default, Config) else ():
            value.setdefault(tag, getattr(setting.default, tag))
        _check_size(setting, source.get(name), source.origin(name))
    return source


def _check_size(setting: Setting, value: Any, origin: str) -> None:
    """`UserError` for an empty text where one is needed, and a number that no device can hold."""
    for part in _as_list(value):
        if part == "" and setting.default != "" and not setting.is_section:
            raise UserError(f"{setting.name} needs a value: {setting.type_text}{origin}")
        if isinstance(part, bool) or not isinstance(part, (int, float)) or "<" in setting.bounds:
            continue
        if isinstance(part, int) and abs(part) > LARGEST_INT:
            most = f"{LARGEST_INT:,}" if part > 0 else f"{-LARGEST_INT:,}"
            raise UserError(f"{setting.name}: must be at {'most' if part > 0 else 'least'} {most}, got {part}{origin}")
        if isinstance(part, float) and LARGEST_FLOAT < abs(part) < float("inf"):
            raise UserError(
                f"{setting.name}: must be below {LARGEST_FLOAT}, which is float32's range, got {part}{origin}"
            )
        if isinstance(part, float) and 0 < part < SMALLEST_FLOAT:
            raise UserError(f"{setting.name}: must be above {SMALLEST_FLOAT}, or 0 in float32, got {part}{origin}")


def _tags(setting: Setting) -> list[str]:
    """The fields that tell the sections of a union apart: a Literal in every one."""
    sections = [member.model_fields for member in setting.members if is_config(member)]
    shared = [key for key in sections[0] if all(key in fields for fields in sections)] if len(sections) > 1 else []
    return [key for key in shared if all(get_origin(fields[key].annotation) is Literal for fields in sections)]


def _adapt(value: Any, setting: Setting) -> Any:
    """`none` for what can be none, a setting or an item of one, and a single value for one that is a list."""
    choices = [choice for member in setting.members for choice in choices_of(member)]
    if value == "none" and type(None) in setting.members and "none" not in choices:
        return None
    if setting.is_sequence and not setting.scalars and isinstance(value, (str, int, float)):
        return [value]
    if isinstance(value, list) and setting.has_optional_items:
        return [None if item == "none" else item for item in value]
    return value


def load(
    config_type: type[ConfigType],
    path: Path | None,
    overrides: Sequence[str] | None = (),
    *,
    under: SettingsSource | None = None,
    values: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> ConfigType:
    """The configuration of a YAML file (none: the defaults) with dotted flags on top, and below it other settings.

    Raises `UserError`, one line, for whatever is wrong with either, naming the setting, its value and its origin.
    `overrides` None: a file that no flags go with. A setting that a higher layer makes useless is left out, and `tell`
    gets a line for each. `under` and `values` are as in `gather`.
    """
    source = gather(config_type, path, overrides or (), under, values)
    while True:
        try:
            # as JSON: strict about numbers and text, while lists become tuples and text becomes paths and enums
            return config_type.model_validate_json(json.dumps(source.tree, default=str), strict=True)
        except ValidationError as error:
            found = next(_overruled(source, error), None)
            if found is None:
                raise UserError(explain(config_type, source, error, path, takes_flags=overrides is not None)) from None
        value, origin = format_value(source.get(found.name)), source.origin(found.name)
        tell(f"left out: {found.name} {value}{origin}, which has no effect with {found.reasons}")
        source.drop(found.name)


def _overruled(source: SettingsSource, error: ValidationError) -> Iterator[NoEffect]:
    """Settings that a layer above the one that set them makes useless."""
    for details in error.errors(include_url=False):
        found = details.get("ctx", {}).get("error")
        if isinstance(found, NoEffect) and source.get(found.name) is not PydanticUndefined:
            if max(map(source.layer_of, found.because)) > source.layer_of(found.name):
                yield found


def dump(config: Config) -> str:
    """YAML of a whole configuration, defaults included; `load` reads it back as an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)
