"""Rotary positions as `config.json` says them: of transformers 4 by several keys, of 5 in one."""

import math
from functools import partial
from typing import Any

from jaxtron.layers.config import RotaryScaling
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.weights.config_json import ConfigFile, as_json
from jaxtron.weights.family import Rule

# their names of what a rule of stretching reads, and ours
LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_length",
}
YARN = {
    "factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "original_max_position_embeddings": "original_length",
}
KINDS = ("default", "llama3", "yarn")
NEW, OLD = "rope_parameters", "rope_scaling"


def rotary(*, fraction: float | None = None, positions: int = 2048) -> Rule:
    """The rule of a family whose class rotates `fraction` of a head where the file says nothing (none: always all of
    it), and `positions` the longest sequence."""
    read = partial(read_rotary, fraction=1.0 if fraction is None else fraction, positions=positions)
    return Rule(read, partial(write_rotary, partly=fraction is not None))


def read_rotary(file: ConfigFile, *, fraction: float = 1.0, positions: int = 2048) -> None:
    """Sets `model.rotary`; `fraction` is what is rotated of a head, and `positions` the longest sequence, of the
    family's class where the file says nothing."""
    rope, key = _joined(file)
    own = {"rope_theta": 10000.0, "partial_rotary_factor": fraction}
    for theirs, default in own.items():
        if rope.get(theirs) is None:
            # of transformers 4, where null is as good as nothing
            given = file.get(theirs)
            rope[theirs] = default if given is None else given
        file.get(theirs)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    file.set("position", "rotary", "model_type")
    for theirs, ours in (("rope_theta", "base"), ("partial_rotary_factor", "fraction")):
        file.set(f"rotary.{ours}", rope.pop(theirs), theirs)
    if kind not in KINDS:
        file.refuse(key, f"rope_type {as_json(kind)} is not known here; known are {', '.join(KINDS)}")
    if kind != "default":
        names = LLAMA3 if kind == "llama3" else YARN
        if kind == "yarn":
            rope.setdefault("original_max_position_embeddings", file.get("max_position_embeddings", positions))
        given = {theirs: rope.pop(theirs, None) for theirs in names}
        if kind == "yarn":
            # it has bounds of its own
            given = {theirs: value for theirs, value in given.items() if theirs == "factor" or value is not None}
        for theirs, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                file.refuse(key, f"with rope_type {kind} a number above 0 is needed, not {as_json(value)}", theirs)
        scaling = {names[theirs]: value for theirs, value in given.items()}
        file.set("rotary.scaling", {"kind": kind, **scaling, **_magnitudes(file, key, kind, rope)}, key)
    if rope:
        file.refuse(key, f"with rope_type {kind} that is not understood", next(iter(rope)))


def write_rotary(model: ModelConfig, *, partly: bool) -> dict[str, Any]:
    """The keys of transformers 4, which 5 reads too; partly: the class can rotate a part of a head."""
    own = model.rotary
    found: dict[str, Any] = {"rope_theta": own.base}
    if partly:
        found["partial_rotary_factor"] = own.fraction
    return found | {OLD: None if own.scaling is None else _scaling(own.scaling)}


def _scaling(own: RotaryScaling) -> dict[str, Any]:
    names = LLAMA3 if own.kind == "llama3" else YARN
    found = {"rope_type": own.kind} | {theirs: getattr(own, ours) for theirs, ours in names.items()}
    if own.kind == "yarn" and own.mscale and own.mscale_all_dim:
        found |= {"mscale": own.mscale, "mscale_all_dim": own.mscale_all_dim}
    return found


def _joined(file: ConfigFile) -> tuple[dict[str, Any], str]:
    """What both keys say, and the key to name in messages; inside the new one wins."""
    found: dict[str, Any] = {}
    for key in (OLD, NEW):
        value = file.get(key)
        if value is not None and not isinstance(value, dict):
            file.refuse(key, "it must be an object or null")
        found |= value or {}
    key = NEW if file.get(NEW) is not None else OLD
    for name, value in found.items():
        if isinstance(value, dict):
            file.refuse(key, "positions that differ by the kind of layer are not known here", name)
    return found, key


def _magnitudes(file: ConfigFile, key: str, kind: str, rope: dict[str, Any]) -> dict[str, float]:
    """What YaRN multiplies rotated queries and keys by, in the settings' words; takes what it reads out of `rope`."""
    if kind != "yarn":
        return {}
    if rope.pop("truncate", True) is not True:
        file.refuse(key, "bounds of YaRN that are no whole numbers are not known here", "truncate")
    if rope.pop("attention_factor", None) is not None:
        file.refuse(
            key,
            "leave it out where it is the rule's own, or give mscale: another is not known here",
            "attention_factor",
        )
    given = {name: rope.pop(name, None) for name in ("mscale", "mscale_all_dim")}
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            file.refuse(key, "it must be a number", name)
    # transformers reads both or none
    return {name: float(value) for name, value in given.items()} if all(given.values()) else {}
