"""What a training begins with that is not drawn: the model in a directory of Hugging Face weights, or of another run.

Without JAX: which settings it has, and whether they are those of a configuration.
"""

from pathlib import Path

from pydantic_core import PydanticUndefined

from jaxtron.config import SettingsSource, UserError, expand_home, load, read_file
from jaxtron.models.families import DECODER
from jaxtron.models.same import differences
from jaxtron.run.configuration import Configuration
from jaxtron.weights.cache import NOWHERE, find_weights
from jaxtron.weights.config_json import CONFIG_JSON
from jaxtron.weights.hub import hub_settings, is_hub

NAME = "checkpoint.initialize_from"
# what of a run belongs to its model
TAKEN = ("model", "data.tokenizer", "data.end_of_document")
MOST_TOLD = 3


def settings_below(given: SettingsSource) -> SettingsSource | None:
    """The settings of the model that file and flags say a run begins with, if they do and it is there."""
    name = given.get(NAME)
    found = find_weights(expand_home(name)) if isinstance(name, str) else None
    # of a run that goes on it may be gone; where it is needed, that is told
    return None if found is None else beginning_settings(found)


def beginning_settings(directory: Path) -> SettingsSource:
    """The settings of a directory's model, and of its tokenizer; `UserError` where there is no model."""
    if is_hub(directory):
        return hub_settings(directory)
    path = directory / "config.yaml"
    if not path.is_file():
        what = f"has neither config.yaml nor {CONFIG_JSON}" if directory.is_dir() else f"is no {NOWHERE}"
        raise UserError(f"{NAME} {directory} {what}: give one of a run, or of Hugging Face weights")
    whole, found = read_file(path), SettingsSource()
    for name in TAKEN:
        if (value := whole.get(name)) is not PydanticUndefined:
            found.set(name, value, str(path))
    return found


def beginning_of(config: Configuration) -> Path | None:
    """The directory that `checkpoint.initialize_from` names, by a path or as a repository; it may not be there."""
    name = config.checkpoint.initialize_from
    return None if name is None else find_weights(name) or Path(name)


def check_beginning(config: Configuration, directory: Path | None = None) -> None:
    """`UserError` unless the model of a directory that a run begins with (none: the one that its settings name) is the
    configuration's, as far as it computes.

    One that is not there is not looked at: of a run that goes on it may be gone.
    """
    own, directory = directory, directory or beginning_of(config)
    if directory is None or not directory.is_dir():
        return
    if own is None and (config.checkpoint.allow_missing or config.checkpoint.allow_unused):
        # shapes tell
        return
    under = beginning_settings(directory)
    family = under.tree.get("model", {}).get("family", DECODER)
    if family != config.model.family:
        raise UserError(
            f"{directory}, which the run begins with, is of model.family {family}, and here it is "
            f"{config.model.family}: name what of it is not here, and what is new, by --checkpoint.allow_unused and "
            "--checkpoint.allow_missing"
        )
    words = ["--data.sequence_length", str(config.data.sequence_length)]
    there = load(type(config), None, words, under=under).resolved().model
    found = list(map(str, differences(there, config.resolved().model)))
    if found:
        more = f" and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
        raise UserError(
            f"{directory}, which the run begins with, is of another model: {', '.join(found[:MOST_TOLD])}{more}; leave "
            "settings of the model out, for they are taken from there"
        )
