"""The layout of a model's parameters on a mesh, as rows for a table."""

import math
from dataclasses import dataclass

import jax

from jaxtron.plan.table import aligned
from jaxtron.roles import Status
from jaxtron.sharding.blueprint import Blueprint
from jaxtron.sharding.layout import spec_axes
from jaxtron.sharding.rules import current
from jaxtron.words import plural, readable_bytes


@dataclass(frozen=True)
class ParameterRow:
    """One parameter: what it is, where it lies at rest, and what of it a device holds.

    `bytes` are those of it at rest on one device; `replicas` how many devices hold the same part; `padding` the
    elements behind it, which make its parts even. `split` are the flags that split each dimension.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    split: tuple[tuple[str, ...], ...]
    role: str
    status: Status
    bytes: int
    replicas: int
    padding: int


def parameter_rows(blueprint: Blueprint) -> list[ParameterRow]:
    """Every parameter in order, on the current mesh."""
    mesh = current().mesh
    found = []
    for name, spec in blueprint.names.items():
        held, padded = math.prod(current().part(spec.layout)), math.prod(spec.layout.padded)
        found.append(
            ParameterRow(
                name=name,
                shape=spec.shape,
                axes=spec.axes,
                split=tuple(map(current().folding.names, spec_axes(spec.layout.spec))),
                role=spec.role,
                status=spec.status,
                bytes=held * spec.dtype.itemsize,
                replicas=mesh.size * held // padded,
                padding=padded - spec.size,
            )
        )
    return found


def layout_text(blueprint: Blueprint) -> str:
    """The table as text: a header, a line a parameter, and the totals of a device."""
    found = parameter_rows(blueprint)
    sizes = " x ".join(f"{flag} {size}" for flag, size in current().sizes.items() if size > 1) or "one device"
    cells = [("parameter", "shape", "logical axes", "spec at rest", "role", "a device", "replicas")]
    for row in found:
        shape = " x ".join(str(size) for size in row.shape)
        size = readable_bytes(row.bytes)
        cells.append((row.name, shape, ", ".join(row.axes), _spec(row), _role(row), size, str(row.replicas)))
    lines = aligned(cells, right=(5, 6))
    held = sum(row.bytes for row in found)
    specs = blueprint.names.values()
    ideal = sum(spec.count * spec.dtype.itemsize for spec in specs) / current().mesh.size
    whole, trained, kind = blueprint.num_parameters, blueprint.num_trained, "float32 weights"
    total = f"{whole:,} parameters"
    if trained < whole:
        total, kind = f"{total}, {trained:,} of them trained", "weights"
    total += f"; {readable_bytes(held)} of {kind} a device, {held / ideal:.2f} times an even split"
    return "\n".join([f"mesh: {sizes}", *lines, total, *_padding(found), *_empty_rows(blueprint)])


def _padding(found: list[ParameterRow]) -> list[str]:
    """A line about the padding of parameters that their axes do not divide, where there are some."""
    padded = [row for row in found if row.padding]
    if not padded:
        return []
    share = sum(row.padding for row in padded) / sum(math.prod(row.shape) for row in padded)
    names = f"{padded[0].name} and {len(padded) - 1} more" if len(padded) > 1 else padded[0].name
    return [f"{names}: padded by {share:.2%} at rest, for even parts"]


def _empty_rows(blueprint: Blueprint) -> list[str]:
    """A line about rows that are no layers for each stack that has some, as stages of a pipeline differ in length."""
    stacked = (spec for spec in jax.tree.leaves(blueprint.parameters) if spec.layers is not None and spec.is_stacked)
    counts = dict.fromkeys((spec.shape[0], spec.layers) for spec in stacked)
    return [
        f"{plural(rows, 'row')} of layers hold {layers}: the others are empty, as stages differ in length"
        for rows, layers in counts
        if rows != layers
    ]


def _role(row: ParameterRow) -> str:
    return {"trained": row.role, "frozen": f"frozen {row.role}", "buffer": "buffer"}[row.status]


def _spec(row: ParameterRow) -> str:
    return "(" + ", ".join("+".join(flags) or "-" for flags in row.split) + ")"
