"""Which parameters are trained: the patterns of train.trainable on their names."""

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from jaxtron.config import UserError, shown
from jaxtron.models.family import Family, FamilyConfig
from jaxtron.sharding.blueprint import Blueprint
from jaxtron.typing import DTypeLike

MOST_HINTS = 3
WITHOUT = "!"
ALL = ("*",)


def flops_per_token(family: Family, model: FamilyConfig, length: int, blueprint: Blueprint) -> float:
    """FLOPs of one token's forward and backward, as the papers count them, of what the blueprint trains.

    Of weights that are frozen a third is missing, their gradients; an adapter's numbers count like a weight's.
    """
    found = family.flops_per_token(model, length)
    for name, spec in blueprint.names.items():
        if spec.role == "adapter":
            found += 6 * spec.count
        elif spec.status == "frozen":
            found -= 2 * family.passes(model, name, spec.role, spec.axes) * spec.count
    return found


def freeze(blueprint: Blueprint, patterns: Sequence[str], dtype: DTypeLike) -> Blueprint:
    """The blueprint with what the patterns leave frozen at rest as a step uses it that computes in `dtype`.

    Where the model has adapters these are trained, and beside them what patterns name that are not those of all.
    """
    adapters = {name for name, spec in blueprint.names.items() if spec.role == "adapter"}
    names = [name for name in blueprint.parameter_names if name not in adapters]
    if adapters and tuple(patterns) == ALL:
        return blueprint.freeze(names, dtype)
    return blueprint.freeze(frozen_names(patterns, names, blueprint.buffer_names), dtype)


def frozen_names(patterns: Sequence[str], names: Iterable[str], buffers: Sequence[str] = ()) -> list[str]:
    """Those of the parameters' names that the patterns leave frozen, in their order.

    Trained is what matches a pattern, of those with `!` none; where all have one, what matches none. A `UserError` for
    a pattern that changes nothing, and where nothing is left to train; `buffers` are names that no pattern knows.
    """
    names = list(names)
    for pattern in patterns:
        if not _matching(pattern.removeprefix(WITHOUT), names):
            raise UserError(f"train.trainable {shown(pattern)} matches no parameter; {_hint(pattern, names, buffers)}")
    excluded = [pattern for pattern in patterns if pattern.startswith(WITHOUT)]
    included = [pattern for pattern in patterns if pattern not in excluded] or ["*"]
    trained = {name for pattern in included for name in _matching(pattern, names)}
    for pattern in excluded:
        if not trained.intersection(_matching(pattern.removeprefix(WITHOUT), names)):
            of = shown(" ".join(included))
            raise UserError(f"train.trainable {shown(pattern)} takes nothing from what {of} trains: leave it out")
    trained -= {name for pattern in excluded for name in _matching(pattern.removeprefix(WITHOUT), names)}
    if not trained:
        raise UserError(
            f"train.trainable {shown(' '.join(patterns))} leaves nothing to train: take a pattern with ! out"
        )
    return [name for name in names if name not in trained]


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if fnmatchcase(name, pattern)]


def _hint(pattern: str, names: Sequence[str], buffers: Sequence[str]) -> str:
    """What could have been meant."""
    text = pattern.removeprefix(WITHOUT)
    listed = "plan --layout lists the names"
    if _matching(text, buffers):
        return "it names a buffer, which a step updates without gradient"
    if text in os.listdir():
        return f"it is a file here: quote patterns, for a shell puts names of files for *; {listed}"
    if re.search(r"\.\d+\b", text) and (near := _matching(re.sub(r"\d+", "*", text), names)):
        places = sorted({int(number) for name in near for number in re.findall(r"\.(\d+)\b", name)})
        numbers = " or ".join(map(str, places)) or "none"
        return (
            "the layers of a stack are one array and trained together; numbers in a name are places in the pattern "
            f"that it repeats, here {numbers}; {listed}"
        )
    words = [word for word in text.replace("*", ".").split(".") if word]
    alike = {name: sum(word in name for word in words) for name in names}
    near = sorted((name for name in names if alike[name]), key=lambda name: -alike[name])
    near = near or difflib.get_close_matches(text, names, n=MOST_HINTS, cutoff=0.4)
    if near:
        return f"did you mean {' or '.join(near[:MOST_HINTS])}? {listed}"
    return f"{listed}, which begin with {' or '.join(dict.fromkeys(name.partition('.')[0] for name in names))}"
