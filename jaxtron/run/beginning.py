"""What a training begins with that is not drawn: the model in a directory of Hugging Face weights, or of another run.

Without JAX: which settings it has, and whether they are those of a configuration.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from jaxtron.config import SettingsSource, UserError, expand_home, format_value, load, read_file
from jaxtron.run.configuration import Configuration
from jaxtron.weights.config_json import CONFIG_JSON
from jaxtron.weights.hub import hub_settings, is_hub

NAME = "checkpoint.initialize_from"
# what of a run belongs to its model
TAKEN = ("model", "data.tokenizer", "data.end_of_document")
# settings of a model that change nothing of what it computes once it is trained
OF_TRAINING = ("dropout", "attention_dropout", "initial_std", "z_loss")
MOST_TOLD = 3


def settings_below(given: SettingsSource) -> SettingsSource | None:
    """The settings of the model that file and flags say a run begins with, if they do and it is there."""
    name = given.get(NAME)
    if not isinstance(name, str) or not Path(expand_home(name)).is_dir():
        # of a run that goes on it may be gone; where it is needed, that is told
        return None
    return beginning_settings(Path(expand_home(name)))


def beginning_settings(directory: Path) -> SettingsSource:
    """The settings of a directory's model, and of its tokenizer; `UserError` where there is no model."""
    if is_hub(directory):
        return hub_settings(directory)
    path = directory / "config.yaml"
    if not path.is_file():
        what = f"has neither config.yaml nor {CONFIG_JSON}" if directory.is_dir() else "is no directory"
        raise UserError(f"{NAME} {directory} {what}: give one of a run, or of Hugging Face weights")
    whole, found = read_file(path), SettingsSource()
    for name in TAKEN:
        if (value := whole.get(name)) is not PydanticUndefined:
            found.set(name, value, str(path))
    return found


def check_beginning(config: Configuration) -> None:
    """`UserError` unless the model that a run begins with is the configuration's, as far as it computes.

    One that is not there is not looked at: of a run that goes on it may be gone.
    """
    name = config.checkpoint.initialize_from
    if name is None or not Path(name).is_dir():
        return
    directory = Path(name)
    under = beginning_settings(directory)
    words = ["--data.sequence_length", str(config.data.sequence_length)]
    there = load(type(config), None, words, under=under).resolved().model
    here, family = config.resolved().model, config.family
    meanings = family.meaning(here)
    same = {name for name, meaning in family.meaning(there).items() if meaning == meanings[name]}
    free = {*same, *OF_TRAINING, *here.FREE.split(), *here.CONTENT.split()}
    found = [
        f"model.{name} is {format_value(old)} there and {format_value(new)} here"
        for name, old, new in _differences(there.model_dump(mode="json"), here.model_dump(mode="json"))
        if not any(f"{name}.".startswith(f"{one}.") for one in free)
    ]
    if found:
        more = f" and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
        raise UserError(
            f"{NAME} {directory} is of another model: {', '.join(found[:MOST_TOLD])}{more}; leave settings of the "
            "model out, for they are taken from there"
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after
