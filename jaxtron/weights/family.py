"""What is known of a family of Hugging Face models: its keys as settings, its tensors as parameters, both ways.

A family is a file in `families/`: a `HubFamily` of keys, rules and a table. What reads keys has beside it what writes
them, and neither is trusted: what is written is read again and compared (`hub.config_of`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtron.models.families import DECODER
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.table import TensorTable
from jaxtron.words import either

# settings that can say nothing, by what they then follow from
FOLLOWING = {"num_kv_heads": "kv_heads", "head_dim": "head_size", "mlp_size": "mlp_width"}
LAYERS = "num_layers"


@dataclass(frozen=True)
class Key:
    """A key of `config.json`, and the setting of `model` that says the same."""

    theirs: str
    ours: str
    default: Any = None
    """What the family's class takes where the file has no such key; none: the setting's own default."""
    words: Mapping[str, str] | None = None
    """Ours for each of their values (none: they are the same)."""

    def read(self, file: ConfigFile) -> None:
        """Sets the setting."""
        value = file.get(self.theirs, self.default)
        if self.words is not None:
            if not isinstance(value, str) or value not in self.words:
                file.refuse(self.theirs, f"of a {file.model_type} {either(sorted(self.words))} are known here")
            value = self.words[value]
        if value is not None or file.has(self.theirs):
            # null too, which a setting takes only where it can say nothing
            file.set(self.ours, value, self.theirs)

    def write(self, model: Any) -> dict[str, Any]:
        """The key as a model's setting says it; without words for the value none."""
        value: Any = model
        for part in FOLLOWING.get(self.ours, self.ours).split("."):
            value = getattr(value, part)
        if self.words is None:
            return {self.theirs: value}
        return next(({self.theirs: theirs} for theirs, ours in self.words.items() if ours == value), {})


@dataclass(frozen=True)
class Rule:
    """Keys that are not settings one by one: what reads them, and the keys that say the same of a model."""

    read: Callable[[ConfigFile], None]
    write: Callable[[Any], dict[str, Any]]
    """What no key says is left out, for reading tells."""


@dataclass(frozen=True)
class HubFamily:
    """A value of `model_type`."""

    architecture: str
    """The class whose weights are read, the model with its heads."""
    keys: tuple[Key, ...]
    tensors: TensorTable
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Settings that all its models share."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Keys with the one value that is understood, which is also the class's where they are not there."""
    further: tuple[Rule, ...] = ()
    """Of keys that are not settings one by one."""
    without_effect: str = ""
    """Further keys that change nothing of what it computes."""
    positions: str | None = "max_position_embeddings"
    """The key of the longest sequence, where it changes nothing of what it computes either."""

    classes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Where weights of several are read, each with the settings that it has; the first is `architecture`."""
    family: str = DECODER
    """`model.family` of its models."""
    others: Mapping[str, TensorTable] = field(default_factory=dict)
    """Tables of files that lie otherwise, by the end of a name that only these have."""

    def table_of(self, names: Iterable[str]) -> TensorTable:
        """That of the files with tensors of these names."""
        ends = tuple(self.others)
        found = next((name for name in names if ends and name.endswith(ends)), None)
        return self.tensors if found is None else next(self.others[end] for end in ends if found.endswith(end))

    def read(self, file: ConfigFile) -> None:
        """Sets all settings that a file says; `UserError` for what is not understood."""
        given, classes = file.get("architectures"), self.classes or {self.architecture: {}}
        name = self.architecture if given is None else given[0] if isinstance(given, list) and len(given) == 1 else None
        if not isinstance(name, str) or name not in classes:
            file.refuse("architectures", f"only weights of {either([*classes])} are read for a {file.model_type}")
        for setting, value in classes[name].items():
            file.set(setting, value, "architectures")
        if self.family != DECODER:
            file.set("family", self.family, "model_type")
        for name, value in self.constants.items():
            file.set(name, value, "model_type")
        for key in self.keys:
            key.read(file)
        for rule in self.further:
            rule.read(file)
        if self.positions is not None and file.get(self.positions) is not None:
            file.whole(self.positions, 0)
        file.check_only(self.only)
        for name in self.without_effect.split():
            file.get(name)
        file.check_all_read(self.only)

    def write(self, model: Any) -> dict[str, Any]:
        """The keys of a file that says a model's settings, as far as this family has keys for them."""
        own = (
            name
            for name, known in self.classes.items()
            if all(getattr(model, setting) == value for setting, value in known.items())
        )
        found: dict[str, Any] = {"architectures": [next(own, self.architecture)]}
        for key in self.keys:
            found |= key.write(model)
            if key.ours == LAYERS:
                # the pattern may be spelled out
                count = model.num_branches if self.family == DECODER else 2 * model.num_layers
                found[key.theirs] = count // self.tensors.branches_in_one
        for rule in self.further:
            found |= rule.write(model)
        return found
