"""What every configuration is made of, and the errors of a user."""

import enum
import html
import os
from collections.abc import Mapping
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict

from jaxtron.config.yaml_text import Dumper


class UserError(ValueError):
    """Bad input from the user; `str()` is one clear line: what is wrong, the values, the fix."""


class NoEffect(UserError):
    """A setting that others make useless, all by their full dotted names.

    On one layer of settings it is an error. A file's setting that a flag makes useless, or that a file makes useless
    which `extends` it, is left out with a line instead (`load`).
    """

    def __init__(self, name: str, value: Any, because: Mapping[str, Any], mend: str = "leave it out") -> None:
        while isinstance(value, Config):
            # of a section the first setting that was changed
            fields = type(value).model_fields
            changed = [
                key for key in fields if getattr(value, key) != fields[key].get_default(call_default_factory=True)
            ]
            if not changed:
                break
            name, value = f"{name}.{changed[0]}", getattr(value, changed[0])
        reasons = " and ".join(f"{other} {format_value(chosen)}" for other, chosen in because.items())
        self.name = name
        self.because = tuple(because)
        self.reasons = reasons
        super().__init__(f"{name} {format_value(value)} has no effect with {reasons}: {mend}")


class Config(BaseModel):
    """A frozen, strictly validated configuration; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def resolved(self) -> Self:
        """The same with defaults that follow from other settings filled in."""
        return self

    def _repr_html_(self) -> str:
        """What was set, as YAML; all else has its default."""
        given = self.model_dump(mode="json", exclude_unset=True)
        return f"<pre>{html.escape(yaml.dump(given, Dumper=Dumper, sort_keys=False, allow_unicode=True))}</pre>"


ConfigType = TypeVar("ConfigType", bound=Config)
Tree = dict[str, Any]


def expand_home(text: str) -> str:
    """The text with a leading `~` or `~name` as that home directory; as it is where there is no such user."""
    return os.path.expanduser(text) if text.startswith("~") else text


FileName = Annotated[str, AfterValidator(expand_home)]
"""The type of a setting that names a file or a folder, or may: `~` is the home directory."""


def format_value(value: Any) -> str:
    """A value as a person would write it in a configuration file."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {format_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(format_value, value)) + "]"
    return str(value)


def shown(value: Any) -> str:
    """A value for an error line: text in quotes, a long one by its beginning."""
    text = repr(value) if isinstance(value, str) else format_value(value)
    return text if len(text) <= 60 else text[:57] + "..."
