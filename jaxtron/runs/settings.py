"""Settings of runs as their `config.yaml` has them: what differs from the defaults, what differs between runs."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from jaxtron.config import UserError
from jaxtron.config.yaml_text import FastYamlLoader
from jaxtron.models.families import DECODER, family_named
from jaxtron.models.family import FamilyConfig
from jaxtron.run.configuration import CONFIG_FILE, configuration_of
from jaxtron.words import readable_count

Tree = dict[str, Any]
# what every run of a training has
SECTIONS = ("model", "data", "train", "optimizer")
# where a run lies is no difference
PLACES = ("run.directory",)
MOST_BYTES = 4 << 20


def read_settings(directory: Path) -> Tree:
    """The settings of a run; a `UserError` of a few words where they are missing or damaged."""
    path = directory / CONFIG_FILE
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{CONFIG_FILE} is no file")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES)
        tree = yaml.load(content, Loader=FastYamlLoader)
        # as plain values: an alias may make a circle
        tree = json.loads(json.dumps(tree))
    except FileNotFoundError:
        raise UserError(f"no {CONFIG_FILE}") from None
    except OSError as error:
        raise UserError(f"{CONFIG_FILE} cannot be read: {error.strerror}") from None
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise UserError(f"{CONFIG_FILE} is no YAML") from None
    if not isinstance(tree, dict) or not all(isinstance(tree.get(section), dict) for section in SECTIONS):
        raise UserError(f"{CONFIG_FILE} is not that of a training")
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """Settings by their full names; a section without any is a value."""
    found: Tree = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found


def defaults_of(tree: Tree) -> Tree:
    """All settings of a run's family with their defaults; the decoder's where the family is not to be had here."""
    return flat(_defaults(_family_name(tree)))


def _family_name(tree: Tree) -> str:
    name = tree["model"].get("family", DECODER)
    return name if isinstance(name, str) else DECODER


@functools.cache
def _defaults(family: str) -> Tree:
    try:
        return configuration_of(family)().model_dump(mode="json")
    except UserError:
        return configuration_of(DECODER)().model_dump(mode="json")


def beside_defaults(tree: Tree) -> Tree:
    """The settings that differ from the defaults, without places, and without what follows from the others."""
    usual = defaults_of(tree)
    given = flat(tree)
    found = {name: value for name, value in given.items() if name not in PLACES and usual.get(name) != value}
    # an optional section that is left out is none, not its parts
    found = {name: value for name, value in found.items() if not (value is None and name not in usual)}
    derived = _derived(json.dumps(tree["model"], sort_keys=True), _family_name(tree), _length(tree))
    return {name: value for name, value in found.items() if name not in derived}


@functools.cache
def _derived(model: str, family: str, length: int) -> frozenset[str]:
    """Settings of the model that are none by default and would be as they are if nobody had given them."""
    try:
        config = family_named(family).config
        stated = config.model_validate_json(model, strict=True)
        bare = {name: None for name, field in config.model_fields.items() if field.default is None}
        resolved = family_named(family).resolve(stated.model_copy(update=bare), length)
    except (ValidationError, ValueError, TypeError):
        return frozenset()
    same = [name for name in bare if getattr(resolved, name, None) == getattr(stated, name) is not None]
    return frozenset(f"model.{name}" for name in same)


def differences(trees: Sequence[Tree]) -> dict[str, list[Any]]:
    """Settings by name that are not the same in all of several runs, with each one's value.

    A setting that an older file does not know had today's default.
    """
    runs = [{**{name: value for name, value in defaults_of(tree).items()}, **flat(tree)} for tree in trees]
    names = list(dict.fromkeys(name for run in runs for name in run))
    found = {name: [run.get(name) for run in runs] for name in names if name not in PLACES}
    # `train.lora null` beside `train.lora.rank 8`: the parts say it
    sections = {name.rpartition(".")[0] for name in names}
    return {
        name: values
        for name, values in found.items()
        if name not in sections and any(value != values[0] for value in values)
    }


def _length(tree: Tree) -> int:
    length = tree["data"].get("sequence_length")
    return length if type(length) is int and length > 0 else 1


def planned_steps(tree: Tree | None) -> int | None:
    """`train.steps`; None where it is not known."""
    steps = None if tree is None else tree["train"].get("steps")
    return steps if type(steps) is int else None


def model_text(tree: Tree) -> str:
    """A model in a few words: layers x width and their pattern, or the family."""
    model = tree["model"]
    if _family_name(tree) != DECODER:
        return _family_name(tree)
    text = f"{model.get('num_layers', '?')} x {model.get('hidden_size', '?')}"
    pattern = str(model.get("pattern", "*-"))
    return text if pattern == "*-" else f"{text} {pattern if len(pattern) <= 12 else pattern[:9] + '...'}"


def num_parameters(tree: Tree) -> int | None:
    """Parameters of a run's model; None where this version does not understand its settings."""
    return _num_parameters(json.dumps(tree["model"], sort_keys=True), _family_name(tree), _length(tree))


@functools.cache
def _num_parameters(model: str, family: str, length: int) -> int | None:
    try:
        found = family_named(family)
        config: FamilyConfig = found.config.model_validate_json(model, strict=True)
        return int(found.num_parameters(found.resolve(config, length), length))
    except (ValidationError, ValueError, TypeError, ArithmeticError):
        return None


def parameters_text(tree: Tree | None) -> str:
    """The number of parameters as people read it; `?` where it is not known."""
    count = None if tree is None else num_parameters(tree)
    return "?" if count is None else readable_count(count)
