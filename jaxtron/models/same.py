"""Where two configurations of one family are not of the same model, as far as it computes."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxtron.config import format_value
from jaxtron.models.families import family_of
from jaxtron.models.family import FamilyConfig

# settings of a model that change nothing of what it computes once it is trained
OF_TRAINING = (
    *("dropout", "attention_dropout", "initial_std", "z_loss"),
    *("mamba.dt_range", "mamba.dt_floor", "mamba.decay_range", "delta.decay_range"),
)


class Difference(NamedTuple):
    """A setting of `model` by its name, with the values of both."""

    name: str
    there: Any
    here: Any

    def __str__(self) -> str:
        return f"model.{self.name} is {format_value(self.there)} there and {format_value(self.here)} here"


def differences(there: FamilyConfig, here: FamilyConfig, *, same: Mapping[str, bool] | None = None) -> list[Difference]:
    """Settings of two models, resolved, that make them compute differently, in order; none of how they are run.

    What says the same in other words is no difference. `same` tells of further settings whether they do.
    """
    meanings = family_of(here).meaning(here)
    told = {name: meaning == meanings.get(name) for name, meaning in family_of(there).meaning(there).items()}
    told |= same or {}
    free = {*(name for name, equal in told.items() if equal), *OF_TRAINING, *here.FREE.split(), *here.CONTENT.split()}
    found = _different(there.model_dump(mode="json"), here.model_dump(mode="json"))
    return [one for one in found if not any(f"{one.name}.".startswith(f"{name}.") for name in free)]


def _different(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[Difference]:
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _different(before, after, f"{prefix}{key}.")
        elif before != after:
            yield Difference(f"{prefix}{key}", before, after)
