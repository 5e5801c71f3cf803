"""What families with state-space layers share: rows of Mamba's and Mamba-2's mixers, and the keys of their sizes."""

import math
from collections.abc import Sequence
from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.state_space import mamba1_rank, mamba2_heads
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.family import Rule
from jaxtron.weights.orders import in_convolution, in_mixer
from jaxtron.weights.table import Tensor

FIRST, LAST, FLOOR, LIMIT = "time_step_min", "time_step_max", "time_step_floor", "time_step_limit"
# how transformers 5 writes what JSON has no number for
INFINITY = {"__float__": "Infinity"}
BY_HEAD, BY_GROUP = "H P", "G N"
Steps = tuple[float, float | None]
UNBOUNDED: Steps = (0.0, None)


def mamba1_rows(own: str) -> tuple[Tensor, ...]:
    """Those of Mamba's mixer, by the beginning of its tensors' names."""
    return (
        Tensor("mamba.A_log", "C N", f"{own}.A_log", "C N"),
        Tensor("mamba.D", "C", f"{own}.D", "C"),
        # x, then the gate
        Tensor("mamba.input.kernel", "E G C", f"{own}.in_proj.weight", "GC E"),
        Tensor("mamba.conv.kernel", "T C", f"{own}.conv1d.weight", "C O T"),
        Tensor("mamba.conv.bias", "C", f"{own}.conv1d.bias", "C"),
        Tensor("mamba.x_proj.kernel", "C R", f"{own}.x_proj.weight", "R C"),
        *(
            Tensor(f"mamba.{one}_norm.scale", "R", f"{own}.{one.lower()}_layernorm.weight", "R")
            for one in "dt B C".split()
        ),
        Tensor("mamba.dt_proj", "R C", f"{own}.dt_proj.weight", "C R"),
        Tensor("mamba.dt_bias", "C", f"{own}.dt_proj.bias", "C"),
        Tensor("mamba.output.kernel", "C E", f"{own}.out_proj.weight", "E C"),
    )


def mamba2_rows(own: str) -> tuple[Tensor, ...]:
    """Those of Mamba-2's: all products of the stream are one tensor, and all that is convolved another."""
    dims = {"z": BY_HEAD, "x": BY_HEAD, "B": BY_GROUP, "C": BY_GROUP, "dt": "H"}
    products = [
        Tensor(f"mamba.{one}.kernel", f"E {ours}", f"{own}.in_proj.weight", f"{_word(ours)} E", in_mixer)
        for one, ours in dims.items()
    ]
    convolved = [
        row
        for one in "xBC"
        for row in (
            Tensor(
                f"mamba.conv_{one}.kernel",
                f"T {dims[one]}",
                f"{own}.conv1d.weight",
                f"{_word(dims[one])} O T",
                in_convolution,
            ),
            Tensor(f"mamba.conv_{one}.bias", dims[one], f"{own}.conv1d.bias", _word(dims[one]), in_convolution),
        )
    ]
    return (
        *products,
        *convolved,
        *(Tensor(f"mamba.{one}", "H", f"{own}.{one}", "H") for one in ("A_log", "D", "dt_bias")),
        Tensor("mamba.norm.scale", BY_HEAD, f"{own}.norm.weight", _word(BY_HEAD)),
        Tensor("mamba.output.kernel", f"{BY_HEAD} E", f"{own}.out_proj.weight", f"E {_word(BY_HEAD)}"),
    )


def _word(dims: str) -> str:
    return dims.replace(" ", "")


def set_steps(file: ConfigFile, bounds: Steps, key: str) -> None:
    """The bounds of steps that a key says; and of first ones, which only a new model draws, inside of them."""
    low, high = bounds
    first, last, floor = file.number(FIRST, 0.001), file.number(LAST, 0.1), file.number(FLOOR, 1e-4)
    if high is not None:
        first, floor = min(first, high), min(floor, high)
    file.set("mamba.dt_limit", [low, high], key)
    file.set("mamba.dt_range", [first or 0.001, max(last, low)], FIRST)
    file.set("mamba.dt_floor", floor, FLOOR)


def read_limit(file: ConfigFile) -> Steps:
    """The bounds of steps that the file says."""
    given = file.get(LIMIT)
    bounds = [0.0, math.inf] if given is None else given
    if not isinstance(bounds, list) or len(bounds) != 2:
        file.refuse(LIMIT, "it must be two numbers")
    low, high = (math.inf if one in (INFINITY, "Infinity") else one for one in bounds)
    if not _are_numbers((low, high)) or not 0 <= low < high:
        file.refuse(LIMIT, "it must be a number of 0 or more, and a larger one")
    return low, None if high == math.inf else high


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(one, int | float) and not isinstance(one, bool) for one in values)


def read_steps(file: ConfigFile) -> None:
    """Both kinds of bounds."""
    set_steps(file, read_limit(file), LIMIT)


def write_first_steps(model: ModelConfig) -> dict[str, Any]:
    """Their bounds."""
    first, last = model.mamba.dt_range
    return {FIRST: first, LAST: last, FLOOR: model.mamba.dt_floor}


def write_limit(model: ModelConfig) -> dict[str, Any]:
    """Where there are some: classes have none."""
    low, high = model.mamba.dt_limit
    return {} if (low, high) == UNBOUNDED else {LIMIT: [low, math.inf if high is None else high]}


def rank(key: str) -> Rule:
    """How many numbers Mamba makes steps of; `auto` is what follows from the stream's width."""

    def read(file: ConfigFile) -> None:
        if (value := file.get(key, "auto")) != "auto":
            file.set("mamba.dt_rank", value, key)

    return Rule(read, lambda model: {key: mamba1_rank(model)})


def expansion(key: str) -> Rule:
    """Channels over the stream's width, a whole number in their classes."""

    def read(file: ConfigFile) -> None:
        file.set("mamba.expand", file.whole(key, 2), key)

    return Rule(read, lambda model: {key: int(model.mamba.expand)} if model.mamba.expand % 1 == 0 else {})


def heads(names: tuple[str, str, str], hidden: int, dim: int | None) -> Rule:
    """Heads of Mamba-2, their width and what both make over the stream's, by their keys; `hidden` and `dim` (none: what
    the others make it) are the class's."""
    count_key, dim_key, expand_key = names

    def read(file: ConfigFile) -> None:
        count, expand = file.whole(count_key, 128), file.whole(expand_key, 2)
        channels, size = expand * file.whole("hidden_size", hidden), file.get(dim_key, "auto" if dim is None else dim)
        size = channels // max(count, 1) if size == "auto" else file.whole(dim_key, dim or 0)
        if count * size != channels:
            file.refuse(
                count_key, f"with {dim_key} {size} it must make {expand_key} x hidden_size = {channels:,} channels"
            )
        file.set("mamba.num_heads", count, count_key)
        file.set("mamba.head_dim", size, dim_key)

    def write(model: ModelConfig) -> dict[str, Any]:
        count, size = mamba2_heads(model), model.mamba.head_dim
        return {count_key: count, dim_key: size, expand_key: count * size // model.hidden_size}

    return Rule(read, write)
