"""Reading the text of compiled HLO: its computations, and every instruction that runs, with the loops around it."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxtron.layers.moe.experts import FURTHER_ROUNDS
from jaxtron.pipeline.mixed_loop import KIND

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_OPCODE = re.compile(r"\s*(?P<opcode>[a-z][\w\-]*)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_MANY = re.compile(r"\b(branch_computations|called_computations)=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\s*\{"n":"?(\d+)"?\}')
_BRANCHES = ("false_computation", "true_computation", "branch_computations")


@dataclass(frozen=True)
class Array:
    """An array's element type, in HLO's spelling, and shape on one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        """Those of an element."""
        digits = re.search(r"\d+", self.dtype)
        return int(digits.group()) if digits else 8

    @property
    def bytes(self) -> int:
        """Its size; sub-byte elements are packed."""
        return -(-self.size * self.bits // 8)


@dataclass(frozen=True)
class Instruction:
    """One line of HLO: `results` are the leaves of its type; `arguments`, `attributes` its text in and after `()`;
    `is_root` tells whether its computation's result is this."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    arguments: str
    attributes: str
    is_root: bool = False

    @property
    def operation(self) -> str:
        """What it does, whether at once or as the start of an asynchronous pair, such as `custom-call`."""
        return self.opcode.removesuffix("-start")

    @property
    def is_end(self) -> bool:
        """Whether it only waits for what a start began, whose computations it may name again."""
        return self.opcode.endswith(("-done", "-update"))

    @property
    def operands(self) -> list[str]:
        """The names of the instructions that it reads, in order."""
        return _OPERAND.findall(self.arguments)

    @property
    def bytes(self) -> int:
        """Those of all its results."""
        return sum(array.bytes for array in self.results)

    @property
    def source(self) -> str:
        """The traced operation it came from, such as `jit(step)/transpose(jvp())/while`; empty where XLA lost it."""
        match = re.search(r'\bop_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def called(self) -> Iterator[tuple[str, str]]:
        """The computations it calls, each with the attribute that names it."""
        yield from _CALLED.findall(self.attributes)
        for role, names in _CALLED_MANY.findall(self.attributes):
            yield from ((role, name) for name in re.findall(r"[\w.\-]+", names))

    def started(self) -> Iterator[str]:
        """The computations that it starts, of an operation that is asynchronous by them."""
        return (name for role, name in self.called() if role in ("calls", "called_computations"))


@dataclass(frozen=True)
class Module:
    """Computations by name, the entry's name, the number of partitions, and source positions by stack frame."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    num_partitions: int | None
    locations: dict[int, str]


@dataclass(frozen=True)
class Loop:
    """A `while`: how often it runs (None unknown) and the operation it came from."""

    trips: int | None
    source: str


@dataclass(frozen=True)
class Site:
    """An instruction reached from the entry, with the loops around it, outermost first; and the innermost branch that
    it is in, a computation, empty where nothing is chosen."""

    instruction: Instruction
    loops: tuple[Loop, ...]
    branch: str
    asynchronous: bool

    @property
    def conditional(self) -> bool:
        """Whether something chooses if it runs."""
        return self.branch != ""


def parse(hlo: str) -> Module:
    """Reads `compiled.as_text()`; `ValueError` where it has no ENTRY computation."""
    computations: dict[str, list[Instruction]] = {}
    tables: dict[str, list[str]] = {}
    entry = section = ""
    inside = False
    for line in hlo.splitlines():
        if line.startswith("}"):
            inside = False
        elif inside:
            if instruction := _instruction(line):
                computations[section].append(instruction)
        elif (header := _HEADER.match(line)) and not line.startswith("HloModule"):
            section, inside = header["name"], True
            computations[section] = []
            entry = section if header["entry"] else entry
        elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            section = line
        elif line[:1].isdigit():
            tables.setdefault(section, []).append(line)
    if not entry:
        raise ValueError(f"no ENTRY computation in {len(hlo)} characters of HLO: pass compiled.as_text()")
    partitions = re.search(r"\bnum_partitions=(\d+)", hlo.split("\n", 1)[0])
    return Module(
        {name: tuple(instructions) for name, instructions in computations.items()},
        entry,
        int(partitions[1]) if partitions else None,
        _locations(tables),
    )


def walk(module: Module) -> Iterator[Site]:
    """Every instruction that runs, once for each place it is called from; ends of asynchronous pairs left out."""
    yield from _walk(module, module.entry, (), "", False)


def _walk(module: Module, name: str, loops: tuple[Loop, ...], branch: str, asynchronous: bool) -> Iterator[Site]:
    for instruction in module.computations.get(name, ()):
        if instruction.is_end:
            continue
        yield Site(instruction, loops, branch, asynchronous)
        for role, called in instruction.called():
            inner = loops
            if role in ("body", "condition"):
                trips = trip_count(module, instruction)
                # the condition is asked once more than the body runs
                trips = trips + 1 if role == "condition" and trips is not None else trips
                inner = (*loops, Loop(trips, instruction.source))
            chosen = called if role in _BRANCHES else branch
            yield from _walk(module, called, inner, chosen, asynchronous or instruction.opcode.endswith("-start"))


def kinds(module: Module, computation: str) -> set[str]:
    """The kinds of layers whose operations a computation and those that it calls have (`pipeline/mixed_loop.py`)."""
    found = set()
    for instruction in module.computations.get(computation, ()):
        found |= {name.removeprefix(KIND) for name in instruction.source.split("/") if name.startswith(KIND)}
        for _, called in instruction.called():
            found |= kinds(module, called)
    return found


def branches(conditional: Instruction) -> list[str]:
    """The computations that it chooses among, by number, that of false before that of true."""
    called = list(conditional.called())
    return [name for wanted in _BRANCHES for role, name in called if role == wanted]


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often a `while` runs: as the compiler recorded it, else from `counter < constant`; None if neither tells.

    Further rounds of experts run as often as choices are uneven: they count as none.
    """
    if FURTHER_ROUNDS in loop.source.split("/"):
        return 0
    if known := _TRIP_COUNT.search(loop.attributes):
        return int(known[1])
    condition = dict(loop.called())["condition"]
    inside = list(_walk(module, condition, (), "", False))
    constants = {
        int(site.instruction.arguments)
        for site in inside
        if site.instruction.opcode == "constant" and re.fullmatch(r"-?\d+", site.instruction.arguments)
    }
    directions = [
        direction
        for site in inside
        if site.instruction.opcode == "compare"
        for direction in re.findall(r"\bdirection=(\w+)", site.instruction.attributes)
    ]
    if len(constants) != 1 or directions not in (["LT"], ["LE"]):
        return None
    return constants.pop() + (directions == ["LE"])


def location(module: Module, instruction: Instruction) -> str:
    """The `file:line` an instruction came from, or the empty string."""
    if frame := re.search(r"\bstack_frame_id=(\d+)", instruction.attributes):
        return module.locations.get(int(frame[1]), "")
    file = re.search(r'\bsource_file="([^"]*)"', instruction.attributes)
    line = re.search(r"\bsource_line=(\d+)", instruction.attributes)
    return f"{file[1]}:{line[1]}" if file and line else ""


def _instruction(line: str) -> Instruction | None:
    if not (match := _INSTRUCTION.match(line)):
        return None
    rest = match["rest"]
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    if not (opcode := _OPCODE.match(rest, end)):
        return None
    last = _closing(rest, opcode.end() - 1)
    results = tuple(
        Array(dtype, tuple(int(dim.lstrip("<=")) for dim in shape.split(",") if dim))
        for dtype, shape in _ARRAY.findall(rest[:end])
        if dtype not in ("token", "opaque")
    )
    return Instruction(
        match["name"],
        opcode["opcode"],
        results,
        rest[opcode.end() : last - 1],
        rest[last:],
        is_root=match["root"] is not None,
    )


def _closing(text: str, start: int) -> int:
    """Position after the parenthesis that closes the one at `start`."""
    depth = 0
    for parenthesis in re.compile(r"[()]").finditer(text, start):
        depth += 1 if parenthesis.group() == "(" else -1
        if depth == 0:
            return parenthesis.end()
    return len(text)


def _locations(tables: dict[str, list[str]]) -> dict[int, str]:
    """`file:line` of each stack frame's innermost position, from the tables before the computations."""
    files = {int(line.split(" ", 1)[0]): line.split(" ", 1)[1].strip('"') for line in tables.get("FileNames", ())}
    places = {}
    for line in tables.get("FileLocations", ()):
        identity, file, _, number, *_ = _numbers(line)
        places[identity] = f"{files.get(file, '?')}:{number}"
    return {frame: places.get(place, "") for frame, place, *_ in map(_numbers, tables.get("StackFrames", ()))}


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


# the three ways HLO writes groups of devices
_LISTED = r"\{(?:\{[\d,]*\},?)*\}"
_IOTA = r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
_MESH = r"mesh\[[^\]]*\](?:, device_ids=\((?:[^()]|\([^()]*\))*\))? \{[^}]*\}"
_REPLICA_GROUPS = re.compile(rf"\breplica_groups=({_LISTED}|{_IOTA}|{_MESH})")


def replica_groups_text(attributes: str) -> str:
    """The value of `replica_groups` among an instruction's attributes, or the empty string."""
    match = _REPLICA_GROUPS.search(attributes)
    return match[1] if match else ""


def replica_groups(text: str, num_devices: int) -> list[list[int]]:
    """Groups of device positions from `{{0,1},{2,3}}`, `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)` or `mesh['a'=2,'b'=2] {'b'}`.

    No groups mean all `num_devices` together.
    """
    if text.startswith("mesh"):
        return _mesh_groups(text)
    if text.startswith("["):
        shape, source = text.split("<=")
        return _iota(source).reshape(_numbers(shape)).tolist()
    return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", text)] or [list(range(num_devices))]


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: counting in that shape, transposed, flat."""
    shape, _, order = text.partition("T")
    positions = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return positions.transpose(_numbers(order) or None).reshape(-1)


def _mesh_groups(text: str) -> list[list[int]]:
    """`mesh['a'=2,'b'=4] {'b'}`, with the devices' order and parts of axes where they are given."""
    mesh, chosen = text.removesuffix("}").rsplit("{", 1)
    sizes = {name: int(size) for name, size in re.findall(r"([^=,\[]+)=(\d+)", mesh.split("]", 1)[0])}
    positions = np.arange(math.prod(sizes.values()))
    if devices := re.search(r"device_ids=\((.*)\)", mesh):
        positions = _iota(devices[1]) if "[" in devices[1] else np.array(_numbers(devices[1]))
    # each mesh axis as factors, some of which the groups run along
    factors: list[tuple[int, bool]] = []
    for name, size in sizes.items():
        done = 1
        for before, length in sorted(_parts(chosen, name, size)):
            factors += [(before // done, False), (length, True)]
            done = before * length
        factors.append((size // done, False))
    along = [i for i, (_, taken) in enumerate(factors) if taken]
    across = [i for i, (_, taken) in enumerate(factors) if not taken]
    positions = positions.reshape([length for length, _ in factors]).transpose(*across, *along)
    return positions.reshape(-1, math.prod(factors[i][0] for i in along)).tolist()


def _parts(chosen: str, name: str, size: int) -> list[tuple[int, int]]:
    """What `'a'` or `'a':(2)4` takes of an axis: the size before it and its own."""
    found = re.findall(rf"{re.escape(name)}(?::\((\d+)\)(\d+))?(?=,|$)", chosen)
    return [(int(before or 1), int(length or size)) for before, length in found]
