"""The census of collectives: what a compiled step communicates, over which mesh axes, how much and how often."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from jaxtron.pipeline.names import BACKWARD, PAIRED
from jaxtron.plan.compiled import hlo
from jaxtron.plan.compiled.overlap import products_beside
from jaxtron.sharding.folding import Axes

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
_PAIRS = re.compile(rf'(?:\bsource_target_pairs=|{_SENT_PAIRS}="?)(\{{(?:\{{\d+,\d+\}},?)*\}})')

UNKNOWN_AXES = ("?",)


def part_of(axis: str) -> tuple[str, int | None]:
    """A mesh axis and, where only neighbours along it communicate ("context/8"), how many of them."""
    name, _, count = axis.partition("/")
    return name, int(count) if count else None


@dataclass(frozen=True)
class Collective:
    """One communication instruction of the program; several arrays may travel combined in it.

    `bytes` is the payload of one execution per device: what an all-gather has gathered, what a reduce-scatter reduces,
    the array of an all-reduce, all-to-all or permutation. `shapes` are the arrays so counted.
    `axes` are those whose groups communicate, as people call them (flags of either view where they make up one): `()`
    if no data leaves the device, `("?",)` if groups match none, `("context/8",)` if they are eight neighbours along
    `context`.
    `group_size` is the number of devices of those axes; 0 marks a permutation without pairs, whose result is zeros.
    `loops` are trip counts of the loops around it, outermost first, None where the compiler does not know, 0 of further
    rounds of experts.
    `source` is the traced operation it came from, or its innermost loop's where XLA lost it; `location` is `file:line`;
    `backward` tells whether either belongs to a backward pass, recomputation included; `paired` whether to a forward
    and a backward that run together.
    `beside` are the FLOPs of products that the compiler scheduled between its start and its end.
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
    backward: bool
    paired: bool
    source: str
    location: str
    beside: int = 0
    layers: str = ""
    """The kind of layers in whose branch of a loop it runs; empty outside of such."""
    name: str = dataclasses.field(default="", compare=False)
    """The instruction's, in the program."""

    @property
    def operands(self) -> int:
        """How many arrays travel in it."""
        return len(self.shapes)

    @property
    def names(self) -> tuple[str, ...]:
        """`axes` without numbers of neighbours."""
        return tuple(part_of(axis)[0] for axis in self.axes)

    @property
    def executions(self) -> int:
        """Times it runs a step: the product of `loops`, unknown ones and conditionals counted as 1."""
        return math.prod(1 if trips is None else trips for trips in self.loops)

    @property
    def sent_bytes(self) -> float:
        """What each device sends in one execution over a ring of n: (n-1)/n of `bytes`, for an all-reduce twice."""
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


def census(
    text: str | hlo.Module, sizes: Mapping[str, int], names: Callable[[Axes], Axes] = lambda axes: axes
) -> tuple[Collective, ...]:
    """The collectives in `compiled.as_text()` (or that text parsed), in program order.

    `sizes` are those of the axes of the mesh compiled for, outermost first: devices in HLO are positions in
    `mesh.devices.flat`. `names` says what people call some of them (`Folding.names`). `ValueError` if there are more or
    fewer devices.
    """
    module = text if isinstance(text, hlo.Module) else hlo.parse(text)
    if module.num_partitions not in (None, math.prod(sizes.values())):
        have = math.prod(sizes.values())
        raise ValueError(f"HLO is for {module.num_partitions} devices, the mesh {dict(sizes)} has {have}")
    groups, beside = _Groups(sizes, names), products_beside(module)

    @functools.cache
    def layers(branch: str) -> str:
        # where XLA lost the name of a collective others of its branch tell
        kinds = hlo.kinds(module, branch)
        return min(kinds) if len(kinds) == 1 else ""

    found = (_collective(module, site, groups, beside, layers) for site in hlo.walk(module))
    return tuple(collective for collective in found if collective is not None)


def _collective(
    module: hlo.Module, site: hlo.Site, groups: "_Groups", beside: dict[str, int], layers: Callable[[str], str]
) -> Collective | None:
    """What an instruction communicates, none if it does not; `layers` tells of a branch the kind of layers in it."""
    instruction = site.instruction
    opcode = instruction.operation
    # a permutation may be compiled to a send and a receive
    if opcode == "send" and _SENT_PAIRS in instruction.attributes:
        opcode = "collective-permute"
    elif opcode not in _COLLECTIVES:
        return None
    axes, group_size = groups.of(instruction.attributes)
    arrays = _payload(opcode, instruction, group_size)
    started = site.asynchronous or instruction.opcode.endswith("-start") or instruction.opcode == "send"
    sources = (instruction.source, *(loop.source for loop in reversed(site.loops)))
    return Collective(
        kind=opcode.replace("-", "_"),
        axes=axes,
        group_size=group_size,
        dtype="+".join(sorted({array.dtype for array in arrays})),
        shapes=tuple(array.shape for array in arrays),
        bytes=sum(array.bytes for array in arrays),
        loops=tuple(loop.trips for loop in site.loops),
        conditional=site.conditional,
        # JAX 0.10 prints pairs also for what waits at once
        asynchronous=started and '"is_sync":true' not in instruction.attributes,
        # where XLA lost a collective's own name its loop still tells
        backward=any("transpose(" in source or f"/{BACKWARD}/" in source for source in sources),
        paired=any(f"/{PAIRED}/" in source for source in sources),
        source=next(filter(None, sources), ""),
        location=hlo.location(module, instruction),
        beside=beside.get(instruction.name, 0),
        layers=layers(site.branch) if site.branch else "",
        name=instruction.name,
    )


def _payload(opcode: str, instruction: hlo.Instruction, group_size: int) -> tuple[hlo.Array, ...]:
    """The arrays that count: results, which the start of a pair lists after its operands; a reduce-scatter's inputs."""
    arrays, count = instruction.results, len(instruction.operands)
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

    def __init__(self, sizes: Mapping[str, int], names: Callable[[Axes], Axes]) -> None:
        self._called = names
        self._names, self._sizes = tuple(sizes), tuple(sizes.values())
        self._positions = np.arange(math.prod(self._sizes)).reshape(self._sizes)
        self._known: dict[str, tuple[tuple[str, ...], int]] = {}

    def of(self, attributes: str) -> tuple[tuple[str, ...], int]:
        """Axis names, in mesh order, and the number of devices that communicate with each other."""
        pairs = _PAIRS.search(attributes)
        text = pairs[1] if pairs else hlo.replica_groups_text(attributes)
        if text not in self._known:
            self._known[text] = self._of_pairs(text) if pairs else self._of_groups(text)
        return self._known[text]

    def _of_pairs(self, text: str) -> tuple[tuple[str, ...], int]:
        pairs = np.array([int(number) for number in re.findall(r"\d+", text)], int).reshape(-1, 2)
        axes, group_size = self._named(self._differing(pairs[:, 0], pairs[:, 1]))
        return axes, group_size if len(pairs) else 0

    def _of_groups(self, text: str) -> tuple[tuple[str, ...], int]:
        groups = hlo.replica_groups(text, self._positions.size)
        lengths = {len(group) for group in groups}
        if len(lengths) == 1:
            actual = np.array(groups)
            axes = self._differing(actual[:1, :1], actual[:1])
            inside = [axis for axis in range(len(self._sizes)) if axis not in axes]
            expected = self._positions.transpose(*inside, *axes).reshape(-1, math.prod(self._sizes[a] for a in axes))
            if np.array_equal(_canonical(actual), _canonical(expected)):
                return self._named(axes)
            for axis in axes if len(axes) == 1 else ():
                count = actual.shape[1]
                runs = np.moveaxis(self._positions, axis, -1).reshape(-1, count)
                if self._sizes[axis] % count == 0 and np.array_equal(_canonical(actual), _canonical(runs)):
                    return (f"{self._called((self._names[axis],))[0]}/{count}",), count
        return UNKNOWN_AXES, max(lengths)

    def _differing(self, these: np.ndarray, those: np.ndarray) -> tuple[int, ...]:
        ours = np.unravel_index(these, self._sizes)
        theirs = np.unravel_index(those, self._sizes)
        return tuple(axis for axis, (a, b) in enumerate(zip(ours, theirs, strict=True)) if np.any(a != b))

    def _named(self, axes: tuple[int, ...]) -> tuple[tuple[str, ...], int]:
        called = self._called(tuple(self._names[axis] for axis in axes))
        return called, math.prod(self._sizes[axis] for axis in axes)


def _canonical(groups: np.ndarray) -> np.ndarray:
    ordered = np.sort(groups, axis=1)
    return ordered[np.argsort(ordered[:, 0])]
