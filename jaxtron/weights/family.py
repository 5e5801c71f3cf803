"""What is known of a family of Hugging Face decoders: its keys as settings, its tensors as parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.table import TensorTable
from jaxtron.words import either


@dataclass(frozen=True)
class Key:
    """A key of `config.json`, and the setting of `model` that says the same."""

    theirs: str
    ours: str
    default: Any = None
    """What the family's class takes where the file has no such key; null says nothing here."""
    words: Mapping[str, str] | None = None
    """Ours for each of their values (none: they are the same)."""

    def read(self, file: ConfigFile) -> None:
        """Sets the setting."""
        value = file.get(self.theirs, self.default)
        if self.words is not None:
            if not isinstance(value, str) or value not in self.words:
                file.refuse(self.theirs, f"of a {file.model_type} {either(sorted(self.words))} are known here")
            value = self.words[value]
        if value is not None:
            file.set(self.ours, value, self.theirs)


@dataclass(frozen=True)
class HubFamily:
    """A value of `model_type`."""

    architecture: str
    """The class whose weights are read, the decoder with its head."""
    keys: tuple[Key, ...]
    tensors: TensorTable
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Settings that all its models share."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Keys with the one value that is understood, which is also the class's where they are not there."""
    further: tuple[Callable[[ConfigFile], None], ...] = ()
    """What reads keys that are not settings one by one."""
    without_effect: str = ""
    """Further keys that change nothing of what it computes."""

    def read(self, file: ConfigFile) -> None:
        """Sets all settings that a file says; `UserError` for what is not understood."""
        given = file.get("architectures")
        if given is not None and given != [self.architecture]:
            file.refuse("architectures", f"only weights of {self.architecture} are read for a {file.model_type}")
        for name, value in self.constants.items():
            file.set(name, value, "model_type")
        for key in self.keys:
            key.read(file)
        for reads in self.further:
            reads(file)
        file.check_only(self.only)
        for name in self.without_effect.split():
            file.get(name)
        file.check_all_read()
