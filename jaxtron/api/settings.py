"""`jaxtron.load`: a configuration of a file, of values in Python, or of another configuration with some changed."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from jaxtron.config import SettingsSource, UserError, expand_home, gather, read_file
from jaxtron.config import load as load_settings
from jaxtron.models.families import DECODER
from jaxtron.run.beginning import settings_below
from jaxtron.run.configuration import CONFIG_FILE, Configuration, configuration_of

Source = str | os.PathLike[str] | Mapping[str, Any] | Configuration


def load(config: Source | None = None, **overrides: Any) -> Configuration:
    """The configuration of a run, checked.

    `config` is a YAML file, a run's directory (its `config.yaml`), a mapping of sections, a `Configuration`, or None
    for the defaults. `overrides` lie over it: sections as mappings, `load("a.yaml", mesh={"tensor": 2}, seed=1)`, or
    dotted names, `load("a.yaml", **{"mesh.tensor": 2})`; all that they do not name stays. With
    `checkpoint={"initialize_from": DIRECTORY}` the model's settings are those of the weights or the run there.

    Nothing is read but these files, and JAX is not imported. A setting of the file that an override makes useless is
    left out with a warning. Raises `UserError`, one line that names the setting, its value and where it is from.
    """
    path, below = _base(config)
    values = {str(name): _plain(value) for name, value in overrides.items()}
    config_type = type(config) if isinstance(config, Configuration) else Configuration
    family = _family(path, below, values)
    if family is not None:
        config_type = configuration_of(family)
    beginning = settings_below(gather(config_type, path, (), below, values))
    if beginning is not None:
        below = beginning if below is None else _over(beginning, below.tree, "the configuration given")

    def tell(line: str) -> None:
        warnings.warn(line, stacklevel=4)

    return load_settings(config_type, path, (), under=below, values=values, tell=tell)


def _base(config: Source | None) -> tuple[Path | None, SettingsSource | None]:
    """A file, or settings that lie below all others."""
    if config is None:
        return None, None
    if isinstance(config, str | os.PathLike):
        path = Path(expand_home(os.fspath(config)))
        return (path / CONFIG_FILE if path.is_dir() else path), None
    if isinstance(config, BaseModel):
        if not isinstance(config, Configuration):
            raise UserError(
                f"load takes a whole Configuration, not its {type(config).__name__}: give it as an override"
            )
        return None, _over(SettingsSource(), _plain(config), "the configuration given")
    if isinstance(config, Mapping):
        return None, _over(SettingsSource(), _plain(config), "the mapping given")
    raise UserError(
        f"load takes a YAML file's name, a run's directory, a mapping or a Configuration, not {type(config).__name__}"
    )


def _over(below: SettingsSource, tree: Mapping[str, Any], origin: str) -> SettingsSource:
    """Settings with others over them."""
    below.layer += 1
    for name, value in tree.items():
        below.set(name, value, origin)
    return below


def _family(path: Path | None, below: SettingsSource | None, values: Mapping[str, Any]) -> str | None:
    """The name in `model.family`, wherever it is given; None where nobody gives one."""
    model = values.get("model")
    found = values.get("model.family", model.get("family") if isinstance(model, Mapping) else None)
    if found is None and path is not None and path.is_file():
        found = read_file(path).get("model.family")
    if found is None and below is not None:
        found = below.get("model.family")
    return found if isinstance(found, str) and found and found != DECODER else None


def _plain(value: Any) -> Any:
    """A value as YAML would have it: sections as mappings, sequences as lists, NumPy's numbers as Python's."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # of a library that need not be there: numbers with a type of their own
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value
