"""Rotary positions as `config.json` says them: of transformers 4 by several keys, of 5 in one."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jaxtron.layers.config import RotaryConfig, RotaryScaling, ScalingKind
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.weights.config_json import ConfigFile, as_json
from jaxtron.weights.family import Rule

NEW, OLD, LONGEST = "rope_parameters", "rope_scaling", "max_position_embeddings"
ORIGINAL = "original_max_position_embeddings"
# by the rule of stretching: their names of the numbers that it reads, and ours
NUMBERS: dict[ScalingKind, dict[str, str]] = {
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
        ORIGINAL: "original_length",
    },
    "yarn": {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        ORIGINAL: "original_length",
    },
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor", ORIGINAL: "original_length"},
    "longrope": {"factor": "factor", "attention_factor": "attention_factor", ORIGINAL: "original_length"},
}
# those that need not be there: the rule has its own
BY_ITSELF = ("beta_fast", "beta_slow", "attention_factor")
# of longrope, one a pair
FACTORS = {"short_factor": "short_factors", "long_factor": "long_factors"}
# the first files of Phi-3
OLD_NAMES = {"su": "longrope"}
THETA, FRACTION = "rope_theta", "partial_rotary_factor"


def rotary(
    *,
    base: float = 10000.0,
    fraction: float | None = None,
    positions: int = 2048,
    names: Mapping[str, str] | None = None,
    original_outside: int | None = None,
) -> Rule:
    """The rule of a family whose class has this base, rotates `fraction` of a head where the file says nothing (none:
    always all of it), and whose longest sequence is `positions`.

    `names` are its own of `rope_theta` and `partial_rotary_factor` outside of the dictionary; of `original_outside`,
    what the class takes as `original_max_position_embeddings`, a key beside the dictionary.
    """
    own = {THETA: base, FRACTION: 1.0 if fraction is None else fraction}
    read = partial(read_rotary, own=own, positions=positions, names=names or {}, original=original_outside)
    is_outside = original_outside is not None
    return Rule(read, partial(write_rotary, partly=fraction is not None, names=names or {}, is_outside=is_outside))


def read_rotary(
    file: ConfigFile, *, own: Mapping[str, float], positions: int, names: Mapping[str, str], original: int | None
) -> None:
    """Sets `model.rotary`."""
    rope, key = joined(file)
    for name, value in rope.items():
        if isinstance(value, dict):
            file.refuse(key, f"positions of a {file.model_type} that differ by the kind of layer are not known", name)
    for theirs, default in own.items():
        # of transformers 4, where null is as good as nothing
        old, usual = file.get(names.get(theirs, theirs)), file.get(theirs)
        given = usual if old is None else old
        if rope.get(theirs) is None:
            rope[theirs] = default if given is None else given
    if original is not None:
        outside = file.get(ORIGINAL, original)
        if rope.get("rope_type", rope.get("type")) in ("longrope", *OLD_NAMES):
            rope.setdefault(ORIGINAL, outside)
    file.set("position", "rotary", "model_type")
    set_rotary(file, rope, key, "rotary", positions)


def write_rotary(
    model: ModelConfig, *, partly: bool, names: Mapping[str, str], is_outside: bool = False
) -> dict[str, Any]:
    """The keys of transformers 4, which 5 reads too; partly: the class can rotate a part of a head."""
    own = model.rotary
    found: dict[str, Any] = {names.get(THETA, THETA): own.base}
    if partly:
        found[names.get(FRACTION, FRACTION)] = own.fraction
    scaling = None if own.scaling is None else written_scaling(own.scaling)
    if scaling is not None and is_outside and own.scaling is not None and own.scaling.kind == "longrope":
        # its class of transformers 4 takes these three alone, and the factor from the lengths
        found[ORIGINAL] = own.scaling.original_length
        scaling = {"type": "longrope", **{theirs: scaling[theirs] for theirs in FACTORS}}
    return found | {OLD: scaling}


def set_rotary(file: ConfigFile, rope: dict[str, Any], key: str, setting: str, positions: int) -> None:
    """Sets base, fraction and scaling of `model.rotary` or `model.window_rotary` by a dictionary with all its keys."""
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    for theirs, ours in ((THETA, "base"), (FRACTION, "fraction")):
        file.set(f"{setting}.{ours}", rope.pop(theirs), theirs)
    kind = OLD_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in ("default", *NUMBERS):
        file.refuse(key, f"rope_type {as_json(kind)} is not known here; known are default, {', '.join(NUMBERS)}")
    if kind != "default":
        file.set(f"{setting}.scaling", {"kind": kind, **_scaling(file, rope, key, kind, positions)}, key)
    if rope:
        file.refuse(key, f"with rope_type {kind} that is not understood", next(iter(rope)))


def written_scaling(own: RotaryScaling) -> dict[str, Any]:
    """The dictionary of a rule of stretching."""
    found: dict[str, Any] = {"rope_type": own.kind}
    found |= {theirs: getattr(own, ours) for theirs, ours in NUMBERS[own.kind].items()}
    if found.get("attention_factor", 0.0) is None:
        del found["attention_factor"]
    if own.kind == "dynamic":
        # it is the class's longest sequence
        del found[ORIGINAL]
    if own.kind == "yarn" and own.mscale and own.mscale_all_dim:
        found |= {"mscale": own.mscale, "mscale_all_dim": own.mscale_all_dim}
    if own.kind == "yarn" and not own.truncate:
        found["truncate"] = False
    if own.kind == "longrope":
        found |= {theirs: list(getattr(own, ours)) for theirs, ours in FACTORS.items()}
    return found


def joined(file: ConfigFile) -> tuple[dict[str, Any], str]:
    """What both keys say, and the key to name in messages; inside the new one wins."""
    found: dict[str, Any] = {}
    for key in (OLD, NEW):
        value = file.get(key)
        if value is not None and not isinstance(value, dict):
            file.refuse(key, "it must be an object or null")
        found |= value or {}
    return found, NEW if file.get(NEW) is not None else OLD


def whole_rope(own: RotaryConfig) -> dict[str, Any]:
    """The dictionary of transformers 5."""
    scaling = {"rope_type": "default"} if own.scaling is None else written_scaling(own.scaling)
    return {THETA: own.base, FRACTION: own.fraction, **scaling}


def _scaling(file: ConfigFile, rope: dict[str, Any], key: str, kind: ScalingKind, positions: int) -> dict[str, Any]:
    """Its settings; takes what it reads out of `rope`."""
    longest = file.get(LONGEST, positions)
    if kind in ("yarn", "dynamic", "longrope"):
        rope.setdefault(ORIGINAL, longest)
    given = {theirs: rope.pop(theirs, None) for theirs in NUMBERS[kind]}
    if kind == "dynamic" and given[ORIGINAL] != longest:
        file.refuse(key, f"with rope_type dynamic only {LONGEST} {as_json(longest)} is known here", ORIGINAL)
    if kind == "longrope" and given["factor"] is None and _is_positive(longest) and _is_positive(given[ORIGINAL]):
        given["factor"] = longest / given[ORIGINAL]
    for theirs, value in given.items():
        if not _is_positive(value) and not (value is None and theirs in BY_ITSELF):
            file.refuse(key, f"with rope_type {kind} a number above 0 is needed, not {as_json(value)}", theirs)
    found = {NUMBERS[kind][theirs]: value for theirs, value in given.items() if value is not None}
    if kind == "yarn":
        found |= _of_yarn(file, rope, key)
    for theirs, ours in FACTORS.items() if kind == "longrope" else ():
        factors = rope.pop(theirs, None)
        if not isinstance(factors, Sequence) or isinstance(factors, str) or not all(map(_is_positive, factors)):
            file.refuse(key, "with rope_type longrope a list of numbers above 0 is needed, one a pair", theirs)
        found[ours] = [float(factor) for factor in factors]
    return found


def _of_yarn(file: ConfigFile, rope: dict[str, Any], key: str) -> dict[str, Any]:
    """What YaRN multiplies rotated queries and keys by, and whether its bounds are whole numbers."""
    found: dict[str, Any] = {}
    truncate = rope.pop("truncate", True)
    if type(truncate) is not bool:
        file.refuse(key, "it must be true or false", "truncate")
    if not truncate:
        found["truncate"] = False
    given = {name: rope.pop(name, None) for name in ("mscale", "mscale_all_dim")}
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            file.refuse(key, "it must be a number", name)
    # transformers reads both or none
    return found | ({name: float(value) for name, value in given.items()} if all(given.values()) else {})


def _is_positive(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < math.inf
