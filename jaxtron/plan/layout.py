"""The layout of a model's parameters on a mesh, as rows for a table."""

import math
from dataclasses import dataclass

import jax
from jax.sharding import PartitionSpec

from jaxtron.plan.table import aligned
from jaxtron.sharding.blueprint import Blueprint
from jaxtron.sharding.rules import current
from jaxtron.words import plural, readable_bytes

STATE_BYTES = 4


@dataclass(frozen=True)
class ParameterRow:
    """One parameter: what it is, where it lies at rest, and what of it a device holds.

    `bytes` are those of its float32 master weights on one device; `replicas` how many devices hold the same part;
    `padding` the elements behind it, which make its parts even.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    spec: PartitionSpec
    role: str
    bytes: int
    replicas: int
    padding: int


def parameter_rows(blueprint: Blueprint) -> list[ParameterRow]:
    """Every parameter in order, on the current mesh."""
    mesh = current().mesh
    leaves = jax.tree_util.tree_leaves_with_path(blueprint.shapes)
    layouts = jax.tree.leaves(blueprint.layouts)
    axes = jax.tree.leaves(blueprint.axes, is_leaf=lambda node: isinstance(node, tuple))
    found = []
    for (path, leaf), layout, names, role in zip(leaves, layouts, axes, jax.tree.leaves(blueprint.roles), strict=True):
        part = current().part(layout)
        copies = mesh.size * math.prod(part) // math.prod(layout.padded)
        name = ".".join(str(getattr(key, "key", key)) for key in path)
        padding = math.prod(layout.padded) - leaf.size
        found.append(
            ParameterRow(name, leaf.shape, names, layout.spec, role, math.prod(part) * STATE_BYTES, copies, padding)
        )
    return found


def layout_text(blueprint: Blueprint) -> str:
    """The table as text: a header, a line a parameter, and the totals of a device."""
    found = parameter_rows(blueprint)
    mesh = current().mesh
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    cells = [("parameter", "shape", "logical axes", "spec at rest", "role", "a device", "replicas")]
    for row in found:
        shape = " x ".join(str(size) for size in row.shape)
        size = readable_bytes(row.bytes)
        cells.append((row.name, shape, ", ".join(row.axes), _spec(row.spec), row.role, size, str(row.replicas)))
    lines = aligned(cells, right=(5, 6))
    held = sum(row.bytes for row in found)
    whole = blueprint.num_parameters
    ideal = whole * STATE_BYTES / mesh.size
    total = f"{whole:,} parameters; {readable_bytes(held)} of float32 weights a device, "
    total += f"{held / ideal:.2f} times an even split"
    return "\n".join([f"mesh: {sizes}", *lines, total, *_padding(found), *_empty_rows(blueprint, found)])


def _padding(found: list[ParameterRow]) -> list[str]:
    """A line about the padding of parameters that their axes do not divide, where there are some."""
    padded = [row for row in found if row.padding]
    if not padded:
        return []
    share = sum(row.padding for row in padded) / sum(math.prod(row.shape) for row in padded)
    names = f"{padded[0].name} and {len(padded) - 1} more" if len(padded) > 1 else padded[0].name
    return [f"{names}: padded by {share:.2%} at rest, for even parts"]


def _empty_rows(blueprint: Blueprint, found: list[ParameterRow]) -> list[str]:
    """A line about rows that are no layers, where the stages of a pipeline have some."""
    stacked = next((row.shape[0] for row in found if row.axes[:1] == ("layers",)), None)
    if blueprint.layers is None or stacked in (None, blueprint.layers):
        return []
    return [
        f"{plural(stacked, 'row')} of layers hold {blueprint.layers}: the others are empty, as stages differ in length"
    ]


def _spec(spec: PartitionSpec) -> str:
    mesh = current().mesh
    names = []
    for entry in spec:
        axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
        names.append("+".join(axis for axis in axes if mesh.shape[axis] > 1) or "-")
    return "(" + ", ".join(names) + ")"
