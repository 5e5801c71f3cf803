"""The census of collectives: what a compiled step communicates, over which mesh axes, how much and how often."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxtron.plan import hlo

# HLO's names, and how much of the payload each device sends when a ring of n carries it out
_RING_PASSES = {
    "all-gather": 1,
    "reduce-scatter": 1,
    "all-reduce": 2,
    "all-to-all": 1,
    "ragged-all-to-all": 1,
}
_COLLECTIVES = (*_RING_PASSES, "collective-permute", "collective-broadcast")
_SENT_PAIRS = "_xla_send_recv_source_target_pairs"

UNKNOWN_AXES = ("?",)


@dataclass(frozen=True)
class Collective:
    """One communication instruction of the program; several arrays may travel combined in it.

    `bytes` is the payload of one execution per device: what an all-gather has gathered, what a reduce-scatter reduces,
    the array of an all-reduce, all-to-all or permutation. `shapes` are the arrays so counted.
    `axes` are the mesh axes whose groups communicate: `()` if no data leaves the device, `("?",)` if groups match none.
    `loops` are trip counts of the loops around it, outermost first, None where the compiler does not know.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    loops: tuple[int | None, ...]
    conditional: bool
    asynchronous: bool
    source: str
    location: str

    @property
    def operands(self) -> int:
        """How many arrays travel in it."""
        return len(self.shapes)

    @property
    def executions(self) -> int:
        """Times it runs a step: the product of `loops`, unknown ones and conditionals counted as 1."""
        return math.prod(trips or 1 if trips is None else trips for trips in self.loops)

    @property
    def sent_bytes(self) -> float:
        """What each device sends in one execution if rings carry it out: (n-1)/n of `bytes`, twice for an all-reduce."""
        if self.group_size <= 1:
            return 0.0
        passes = _RING_PASSES.get(self.kind.replace("_", "-"))
        return self.bytes if passes is None else passes * self.bytes * (self.group_size - 1) / self.group_size

    @property
    def step_bytes(self) -> int:
        """`bytes` of all executions of a step."""
        return self.bytes * self.executions

    @property
    def step_sent_bytes(self) -> float:
        """`sent_bytes` of all executions of a step."""
        return self.sent_bytes * self.executions


def census(text: str, mesh: jax.sharding.Mesh) -> tuple[Collective, ...]:
    """The collectives in `compiled.as_text()`, in program order, with the names of `mesh`'s axes.

    The mesh is the one compiled for: devices in HLO are positions in `mesh.devices.flat`. `ValueError` if sizes differ.
    """
    module = hlo.parse(text)
    if module.num_partitions not in (None, mesh.size):
        raise ValueError(f"HLO is for {module.num_partitions} devices, the mesh {dict(mesh.shape)} has {mesh.size}")
    groups = _Groups(mesh)
    found = (_collective(module, site, groups) for site in hlo.walk(module))
    return tuple(collective for collective in found if collective is not None)


def _collective(module: hlo.Module, site: hlo.Site, groups: "_Groups") -> Collective | None:
    instruction = site.instruction
    opcode = instruction.opcode.removesuffix("-start")
    # a permutation may be compiled to a send and a receive
    if opcode == "send" and _SENT_PAIRS in instruction.attributes:
        opcode = "collective-permute"
    elif opcode not in _COLLECTIVES:
        return None
    axes, group_size = groups.of(instruction.attributes)
    arrays = _payload(opcode, instruction, group_size)
    started = site.asynchronous or instruction.opcode.endswith("-start") or instruction.opcode == "send"
    op_name = re.search(r'\bop_name="([^"]*)"', instruction.attributes)
    return Collective(
        kind=opcode.replace("-", "_"),
        axes=axes,
        group_size=group_size,
        dtype="+".join(sorted({array.dtype for array in arrays})),
        shapes=tuple(array.shape for array in arrays),
        bytes=sum(array.bytes for array in arrays),
        loops=site.loops,
        conditional=site.conditional,
        # JAX 0.10 prints pairs also for what waits at once
        asynchronous=started and '"is_sync":true' not in instruction.attributes,
        source=op_name[1] if op_name else "",
        location=hlo.location(module, instruction),
    )


def _payload(opcode: str, instruction: hlo.Instruction, group_size: int) -> tuple[hlo.Array, ...]:
    """The arrays that count: results, which the start of a pair lists after its operands; a reduce-scatter's inputs."""
    arrays, count = instruction.results, instruction.num_operands
    if instruction.opcode == "send":
        return arrays[:1]
    if instruction.opcode.endswith("-start") and len(arrays) > count:
        arrays = arrays[count : 2 * count]
    if opcode != "reduce-scatter":
        return arrays
    dimension = re.search(r"\bdimensions=\{(\d+)\}", instruction.attributes)
    assert dimension, f"reduce-scatter without dimensions: {instruction.attributes}"
    dim = int(dimension[1])
    return tuple(
        hlo.Array(array.dtype, (*array.shape[:dim], array.shape[dim] * group_size, *array.shape[dim + 1 :]))
        for array in arrays
    )


class _Groups:
    """Finds the mesh axes that a collective's replica groups, or its pairs of source and target, run along."""

    def __init__(self, mesh: jax.sharding.Mesh):
        self._names = mesh.axis_names
        self._sizes = tuple(mesh.shape.values())
        self._positions = np.arange(mesh.size).reshape(self._sizes)
        self._known: dict[str, tuple[tuple[str, ...], int]] = {}

    def of(self, attributes: str) -> tuple[tuple[str, ...], int]:
        """Axis names, in mesh order, and the number of devices that communicate with each other."""
        pairs = re.search(rf'(?:\bsource_target_pairs=|{_SENT_PAIRS}="?)(\{{(?:\{{\d+,\d+\}},?)*\}})', attributes)
        groups = re.search(rf"\breplica_groups=({_LISTED}|{_IOTA}|{_MESH})", attributes)
        text = pairs[1] if pairs else groups[1] if groups else ""
        if text not in self._known:
            self._known[text] = self._of_pairs(text) if pairs else self._of_groups(text)
        return self._known[text]

    def _of_pairs(self, text: str) -> tuple[tuple[str, ...], int]:
        pairs = np.array([int(number) for number in re.findall(r"\d+", text)], int).reshape(-1, 2)
        return self._named(self._differing(pairs[:, 0], pairs[:, 1]))

    def _of_groups(self, text: str) -> tuple[tuple[str, ...], int]:
        groups = replica_groups(text, self._positions.size)
        lengths = {len(group) for group in groups}
        if len(lengths) == 1:
            actual = np.array(groups)
            axes = self._differing(actual[:1, :1], actual[:1])
            inside = [axis for axis in range(len(self._sizes)) if axis not in axes]
            expected = self._positions.transpose(*inside, *axes).reshape(-1, math.prod(self._sizes[a] for a in axes))
            if np.array_equal(_canonical(actual), _canonical(expected)):
                return self._named(axes)
        return UNKNOWN_AXES, max(lengths)

    def _differing(self, these: np.ndarray, those: np.ndarray) -> tuple[int, ...]:
        ours = np.unravel_index(these, self._sizes)
        theirs = np.unravel_index(those, self._sizes)
        return tuple(axis for axis, (a, b) in enumerate(zip(ours, theirs, strict=True)) if np.any(a != b))

    def _named(self, axes: tuple[int, ...]) -> tuple[tuple[str, ...], int]:
        return tuple(self._names[axis] for axis in axes), math.prod(self._sizes[axis] for axis in axes)


def _canonical(groups: np.ndarray) -> np.ndarray:
    ordered = np.sort(groups, axis=1)
    return ordered[np.argsort(ordered[:, 0])]


# the three ways HLO writes groups of devices
_LISTED = r"\{(?:\{[\d,]*\},?)*\}"
_IOTA = r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
_MESH = r"mesh\[[^\]]*\](?:, device_ids=\([^)]*(?:\([^)]*\))?[^)]*\))? \{[^}]*\}"


def replica_groups(text: str, num_devices: int) -> list[list[int]]:
    """Groups of device positions from `{{0,1},{2,3}}`, `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)` or `mesh['a'=2,'b'=2] {'b'}`.

    Empty groups mean all devices together.
    """
    if text.startswith("mesh"):
        return _mesh_groups(text)
    if text.startswith("["):
        shape, source = text.split("<=")
        return _iota(source).reshape(_numbers(shape)).tolist()
    return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", text)] or [list(range(num_devices))]


def _mesh_groups(text: str) -> list[list[int]]:
    mesh, axes = text.removesuffix("}").rsplit("{", 1)
    names = re.findall(r"'?([^',\[\]]+)'?=(\d+)", mesh.split("]", 1)[0].removeprefix("mesh["))
    sizes = [int(size) for _, size in names]
    positions = np.arange(math.prod(sizes))
    if devices := re.search(r"device_ids=\((.*)\)", mesh):
        positions = _iota(devices[1]) if "[" in devices[1] else np.array(_numbers(devices[1]))
    # an axis may be cut: 'a':(2)4 is the part of size 4 after a part of size 2
    parts = {name: (1, int(size), 1) for name, size in names}
    chosen = re.findall(r"'?([^',:{}]+)'?(?::\((\d+)\)(\d+))?(?:,|$)", axes)
    shape, order = [], []
    for name, size in names:
        cuts = [(int(before), int(length)) for other, before, length in chosen if other == name and before]
        whole = any(other == name and not before for other, before, _ in chosen)
        for length, taken in _cut(int(size), cuts, whole):
            order.append(taken)
            shape.append(length)
    del parts
    positions = positions.reshape(shape)
    kept = [axis for axis, taken in enumerate(order) if taken]
    left = [axis for axis, taken in enumerate(order) if not taken]
    return positions.transpose(*left, *kept).reshape(-1, math.prod(shape[axis] for axis in kept)).tolist()
