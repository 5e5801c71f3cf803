"""Every kernel of a compiled step: what it is for, its floating-point operations, and the bytes that it moves."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from jaxtron.kernels.block_products.mosaic import PRODUCT
from jaxtron.kernels.weight_sums.mosaic import SUM
from jaxtron.layers.context_parallel import ATTENDS
from jaxtron.plan.compiled import flops, hlo

KernelClass = Literal[
    "products", "attention", "other kernels", "elementwise", "reductions", "copies", "buffers", "fills"
]
"""Matrix products with what is fused into them; our attention kernels; our others (scans, products by expert); what
computes number by number; sums and maxima; what moves numbers and computes none (copies, transposes, conversions); rows
copied out of a buffer or into one; what is written without anything being read."""
CLASSES: tuple[KernelClass, ...] = get_args(KernelClass)

# what is no kernel, or is one by what it calls
_NONE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "domain"),
    *("add-dependency", "partition-id", "replica-id", "while", "conditional", "call", "send", "recv"),
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"),
    "collective-broadcast",
}
# inside of a fusion these cost nothing
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "reshape", "fusion", "call"}
_SAME = {"bitcast", "reshape"}
_ALONG = {*_SAME, "convert", "copy", "transpose", "bitcast-convert", "reverse"}
_SLICES = {"dynamic-slice", "slice"}
_UPDATES = {"dynamic-update-slice", "scatter"}
_BUFFERS = {"dynamic-slice", "dynamic-update-slice"}
_BESIDE_BUFFERS = {*_BUFFERS, "slice", "convert", "broadcast", "bitcast-convert"}
_FILLS = {"broadcast", "iota"}
_MOVES = {
    *_FILLS,
    *_BUFFERS,
    "slice",
    "copy",
    "transpose",
    "convert",
    "bitcast-convert",
    "concatenate",
    "pad",
    "gather",
    "reverse",
}
_REDUCTIONS = {"reduce", "reduce-window", "sort", "select-and-scatter"}
# what is read of a fill, against what it writes: a number, or a vector that is repeated
_FILL_PART = 1 / 16
_MOSAIC = re.compile(r"mosaic\.(\w+?)\.flops\d")
_ATTENDS = re.compile(rf"\b{re.escape(ATTENDS)}(\d+\.\d+)")
_LIBRARY_PRODUCT = "__cublas$"
_LIBRARY_ATTENTION = "__cudnn$fmha"
# custom calls that only name memory
_ALLOCATIONS = re.compile(r'custom_call_target="[^"]*AllocateBuffer')


@dataclass(frozen=True)
class Kernel:
    """One launch. `read` and `written` are bytes, of fusions only those that they touch: of an operand that is sliced
    the slice, of a buffer that is updated in place the update.

    `flops` are those of products, `width` the bytes of a number that is multiplied; `is_fused` tells whether it is a
    kernel of ours with more than one product. `operations` are the opcodes in it that touch arrays.
    """

    what: KernelClass
    read: int
    written: int
    flops: int = 0
    width: float = 2.0
    is_fused: bool = False
    operations: frozenset[str] = frozenset()

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


class Kernels:
    """The kernels of a scheduled program's instructions."""

    def __init__(self, module: hlo.Module) -> None:
        self.module = module
        self._known: dict[tuple[str, str], Kernel | None] = {}
        self._tables = {name: {one.name: one for one in body} for name, body in module.computations.items()}
        self._shapes = {name: {one.name: one.results for one in body} for name, body in module.computations.items()}
        self._uses = {name: _users(body) for name, body in module.computations.items()}

    def of(self, computation: str, instruction: hlo.Instruction) -> Kernel | None:
        """What an instruction of a computation launches, at once or as a start; None for all that launches nothing:
        names of values, control flow, communication, ends of asynchronous pairs."""
        key = (computation, instruction.name)
        if key not in self._known:
            self._known[key] = self._kernel(computation, instruction)
        return self._known[key]

    def location(self, computation: str, instruction: hlo.Instruction) -> str:
        """The `file:line` that it came from; where XLA lost it that of what it reads, or the empty string."""
        table, found, seen = self._tables[computation], [instruction], {instruction.name}
        while found:
            one = found.pop(0)
            if place := hlo.location(self.module, one):
                return place
            before = [name for name in dict.fromkeys(one.operands) if name in table and name not in seen]
            found += [table[name] for name in before]
            seen.update(before)
        return ""

    def _kernel(self, computation: str, instruction: hlo.Instruction) -> Kernel | None:
        operation = instruction.operation
        if instruction.is_end or operation in _NONE:
            return None
        if operation == "async":
            inner = (self.of(name, one) for name in instruction.started() for one in self.module.computations[name])
            return next(filter(None, inner), None)
        if operation == "fusion":
            return self._fusion(instruction)
        table = self._tables[computation]
        operands = [table[name] for name in instruction.operands if name in table]
        read = sum(operand.bytes for operand in operands)
        results = instruction.results
        if operation != instruction.opcode and operation != "copy":
            # the type of a start lists its operands before its results
            results = results[sum(len(operand.results) for operand in operands) :]
        elif operation != instruction.opcode:
            results = results[:1]
        written = sum(array.bytes for array in results)
        if operation == "custom-call":
            return self._call(computation, instruction, read, written)
        if operation in _SLICES | {"gather"}:
            return Kernel("buffers" if operation in _BUFFERS else "copies", written, written)
        if operation in _UPDATES:
            update = sum(one.bytes for one in _updates(instruction, table))
            read = update if operation in _BUFFERS else 2 * update
            return Kernel("buffers" if operation in _BUFFERS else "elementwise", read, update)
        multiplied = self._multiplied(computation, instruction)
        what = "products" if multiplied else _class({operation}, read, written)
        width = operands[0].results[0].bits / 8 if multiplied else 2.0
        return Kernel(what, read, written, multiplied, width, operations=frozenset({operation}))

    def _call(self, computation: str, call: hlo.Instruction, read: int, written: int) -> Kernel | None:
        if _ALLOCATIONS.search(call.attributes):
            return None
        multiplied = self._multiplied(computation, call)
        if name := _MOSAIC.search(call.attributes):
            if name[1] == SUM:
                # of the sums, which stay where they are, one
                whole = call.results[0]
                read, written = read - whole.bytes + whole.bytes // whole.shape[0], whole.bytes // whole.shape[0]
            return _ours(name[1], read, written, multiplied)
        if _LIBRARY_PRODUCT in call.attributes:
            first = self._tables[computation][call.operands[0]].results[0]
            # of its results the first; others are room that it works in
            output = call.results[self._before(computation, call)].bytes
            return Kernel("products", read, output, multiplied, first.bits / 8)
        what: KernelClass = "attention" if _LIBRARY_ATTENTION in call.attributes else "other kernels"
        return Kernel(what, read, written, is_fused=True)

    def _before(self, computation: str, call: hlo.Instruction) -> int:
        """Arrays in the type of a call before its results: a start's operands."""
        if call.operation == call.opcode:
            return 0
        return sum(len(self._tables[computation][name].results) for name in call.operands)

    def _fusion(self, instruction: hlo.Instruction) -> Kernel:
        computation = dict(instruction.called())["calls"]
        read = self._read(computation)
        root = next(one for one in self.module.computations[computation] if one.is_root)
        written = self._written(computation, root)
        inside = list(self._inside(computation))
        operations = frozenset(
            one.opcode
            for _, one in inside
            if one.opcode not in _FREE and (one.opcode in _REDUCTIONS or any(array.size > 1 for array in one.results))
        )
        multiplied = sum(self._multiplied(place, one) for place, one in inside)
        calls = (_MOSAIC.search(one.attributes) for _, one in inside if one.opcode == "custom-call")
        if name := next(filter(None, calls), None):
            return _ours(name[1], read, written, multiplied)
        if multiplied:
            width = min(
                self._tables[place][one.operands[0]].results[0].bits / 8
                for place, one in inside
                if self._multiplied(place, one)
            )
            return Kernel("products", read, written, multiplied, width, operations=operations)
        return Kernel(_class(operations, read, written), read, written, operations=operations)

    def _multiplied(self, computation: str, instruction: hlo.Instruction) -> int:
        """FLOPs of an instruction itself; of attention to a part of a sequence those that run on an average."""
        found = flops.product_flops(instruction, self._shapes[computation])
        part = _MOSAIC.search(instruction.attributes) and _ATTENDS.search(instruction.attributes)
        return round(found * float(part[1])) if part else found

    def _inside(self, computation: str) -> Iterator[tuple[str, hlo.Instruction]]:
        for instruction in self.module.computations[computation]:
            yield computation, instruction
            for role, called in instruction.called():
                if role == "calls":
                    yield from self._inside(called)

    def _read(self, computation: str) -> int:
        """Bytes of a fusion's operands that it touches."""
        users, total = self._uses[computation], 0
        for instruction in self.module.computations[computation]:
            if instruction.opcode == "parameter" and (instruction.name in users or instruction.is_root):
                whole = sum(array.size for array in instruction.results)
                total += instruction.bytes * self._touched(computation, instruction) // max(1, whole)
        return total

    def _touched(self, computation: str, value: hlo.Instruction) -> int:
        """Elements that are read of a value inside of a fusion; those of a result are all written from it."""
        whole = sum(array.size for array in value.results)
        uses = self._uses[computation].get(value.name, ())
        if not uses:
            return whole
        total = 0
        for user, place in uses:
            size = sum(array.size for array in user.results)
            if user.opcode in _ALONG or (user.opcode in _SLICES and place == 0):
                total += self._touched(computation, user)
            elif user.opcode == "gather" and place == 0:
                total += size
            elif user.opcode in _UPDATES and place == 0 and self._is_in_place(computation, user):
                # a scatter adds to what was there
                updates = _updates(user, self._tables[computation]) if user.opcode == "scatter" else []
                total += sum(array.size for one in updates for array in one.results)
            elif user.opcode == "fusion":
                inner = dict(user.called())["calls"]
                total += self._touched(inner, self._parameter(inner, place))
            else:
                return whole
        return min(whole, total)

    def _is_in_place(self, computation: str, update: hlo.Instruction) -> bool:
        """Whether what an update leaves goes nowhere but to the fusion's results, perhaps through more updates."""
        return all(
            (user.opcode == "tuple" and user.is_root)
            or (user.opcode in _SAME or (user.opcode in _UPDATES and place == 0))
            and self._is_in_place(computation, user)
            for user, place in self._uses[computation].get(update.name, ())
        )

    def _written(self, computation: str, result: hlo.Instruction) -> int:
        """Bytes that a fusion writes of one of its results."""
        table = self._tables[computation]
        if result.opcode == "tuple":
            return sum(self._written(computation, table[name]) for name in result.operands)
        if result.opcode in _SAME:
            return self._written(computation, table[result.operands[0]])
        if result.opcode in _UPDATES:
            before = table[result.operands[0]]
            while before.opcode in _SAME:
                before = table[before.operands[0]]
            earlier = self._written(computation, before) if before.opcode in _UPDATES else 0
            return earlier + sum(one.bytes for one in _updates(result, table))
        # of a library's product the room that it works in
        is_room = result.opcode == "get-tuple-element" and result.results[0].dtype == "s8"
        return 0 if is_room else result.bytes

    def _parameter(self, computation: str, number: int) -> hlo.Instruction:
        found = self.module.computations[computation]
        return next(one for one in found if one.opcode == "parameter" and one.arguments.strip() == str(number))


def _ours(name: str, read: int, written: int, multiplied: int) -> Kernel:
    """A kernel of ours by its name; single products run at the rate of products."""
    if name in (SUM, PRODUCT):
        return Kernel("products", read, written, multiplied, 1.0 if name == PRODUCT else 2.0)
    what: KernelClass = "attention" if name.startswith("attention") else "other kernels"
    return Kernel(what, read, written, multiplied, is_fused=not name.startswith("grouped"))


def _users(body: Sequence[hlo.Instruction]) -> dict[str, list[tuple[hlo.Instruction, int]]]:
    """Who reads each value of a computation, and as which operand."""
    found: dict[str, list[tuple[hlo.Instruction, int]]] = {}
    for instruction in body:
        for place, name in enumerate(instruction.operands):
            found.setdefault(name, []).append((instruction, place))
    return found


def _updates(instruction: hlo.Instruction, table: Mapping[str, hlo.Instruction]) -> list[hlo.Instruction]:
    """What an update (of a buffer, by an array, at indices) or a scatter (of arrays, at indices, by arrays) writes."""
    operands = [table[name] for name in instruction.operands]
    return operands[1:2] if instruction.opcode == "dynamic-update-slice" else operands[len(operands) // 2 + 1 :]


def _class(operations: frozenset[str] | set[str], read: int, written: int) -> KernelClass:
    """What a kernel without products is for, by what it does with arrays."""
    if operations & _REDUCTIONS:
        return "reductions"
    if not operations or not operations <= _MOVES:
        return "elementwise"
    if operations & _FILLS and read <= _FILL_PART * written:
        return "fills"
    return "buffers" if operations & _BUFFERS and operations <= _BESIDE_BUFFERS else "copies"
