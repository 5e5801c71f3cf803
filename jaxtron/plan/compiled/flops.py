"""Floating-point operations of the products in a compiled program, branch by branch."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jaxtron.pipeline.partition import StagePlan
from jaxtron.plan.compiled import hlo

# of a `dot`, and of a library's product
_CONTRACTED = re.compile(r'\blhs_contracting_dims=\{([\d,]*)\}|"lhs_contracting_dimensions":\[([\d,"]*)\]')
_DOTS = ("dot", "scaled-dot", "ragged-dot")
_LIBRARY = "__cublas$"
# a kernel of ours, which says how many it has (`kernels/mosaic.py`)
_KERNEL = re.compile(r"mosaic\.\w+\.flops(\d+)")


@dataclass(frozen=True)
class Branches:
    """A conditional: how often it is reached, and the work of each branch, false before true."""

    times: int
    branches: tuple["ProductWork", ...]


@dataclass(frozen=True)
class ProductWork:
    """FLOPs that run whatever is chosen (2 a multiplication with its addition), and what is chosen."""

    flops: int
    choices: tuple[Branches, ...]

    @property
    def most(self) -> int:
        """FLOPs if every choice takes its largest branch."""
        return self.flops + sum(
            choice.times * max(branch.most for branch in choice.branches) for choice in self.choices
        )


def kind_shares(stages: StagePlan) -> dict[str, float]:
    """Of layers of several kinds that one loop runs, the part that is of each kind."""
    return {
        kind: part.num_layers / stack.num_layers for stack in stages.partitions for kind, part in stack.by_kind.items()
    }


def work(module: hlo.Module, computation: str | None = None, shares: Mapping[str, float] | None = None) -> ProductWork:
    """The products of a computation (none: the program's entry), loops counted by their trips.

    They are dots, calls of cuBLAS, and kernels of ours, run at once or between a start and an end, in whatever
    computation they lie. With `shares` (`kind_shares`) a loop that chooses by kinds of layers is no choice: its
    branches count as often as there are such layers. A `ValueError` for a loop whose trips are unknown.
    """
    name = module.entry if computation is None else computation
    shapes = {instruction.name: instruction.results for instruction in module.computations.get(name, ())}
    flops, choices = 0, []
    for instruction in module.computations.get(name, ()):
        if instruction.is_end:
            continue
        flops += product_flops(instruction, shapes)
        if instruction.opcode == "conditional":
            names = hlo.branches(instruction)
            branches = tuple(work(module, branch, shares) for branch in names)
            kinds = [hlo.kinds(module, branch) for branch in names] if shares else []
            if shares and any(kinds):
                # of several kinds the choice inside counts each
                parts = [shares[min(one)] if len(one) == 1 else 1.0 for one in kinds]
                flops += round(sum(part * branch.most for part, branch in zip(parts, branches, strict=True)))
            else:
                choices.append(Branches(1, branches))
            continue
        for times, called in _called(module, instruction):
            inner = work(module, called, shares)
            flops += times * inner.flops
            choices += [Branches(times * choice.times, choice.branches) for choice in inner.choices]
    return ProductWork(flops, tuple(choices))


def most(
    module: hlo.Module, instruction: hlo.Instruction, shapes: dict[str, tuple[hlo.Array, ...]], known: dict[str, int]
) -> int:
    """FLOPs of one instruction, loops of unknown length run once and choices taking their largest branch.

    `shapes` are those of its computation's instructions, `known` the FLOPs of computations already counted.
    """
    if instruction.is_end:
        return 0
    if product := product_flops(instruction, shapes):
        return product
    if instruction.opcode == "conditional":
        return max((_most_of(module, branch, known) for branch in hlo.branches(instruction)), default=0)
    total = 0
    for role, name in instruction.called():
        if role == "body":
            trips = hlo.trip_count(module, instruction)
            total += (1 if trips is None else trips) * _most_of(module, name, known)
        elif role in ("calls", "to_apply", "called_computations"):
            total += _most_of(module, name, known)
    return total


def _most_of(module: hlo.Module, computation: str, known: dict[str, int]) -> int:
    if computation not in known:
        instructions = module.computations.get(computation, ())
        shapes = {instruction.name: instruction.results for instruction in instructions}
        known[computation] = sum(most(module, instruction, shapes, known) for instruction in instructions)
    return known[computation]


def _called(module: hlo.Module, instruction: hlo.Instruction) -> Iterator[tuple[int, str]]:
    for role, name in instruction.called():
        if role == "body":
            trips = hlo.trip_count(module, instruction)
            if trips is None:
                raise ValueError(f"the loop {instruction.name} does not say how often it runs")
            yield trips, name
        elif role in ("calls", "to_apply", "called_computations"):
            yield 1, name


def product_flops(instruction: hlo.Instruction, shapes: Mapping[str, tuple[hlo.Array, ...]]) -> int:
    """FLOPs of the instruction itself, 0 if it is no product; a start has those of the pair."""
    operation = instruction.operation
    if operation not in (*_DOTS, "custom-call"):
        return 0
    if operation == "custom-call":
        if match := _KERNEL.search(instruction.attributes):
            return int(match[1])
        if _LIBRARY not in instruction.attributes:
            return 0
    operands = [shapes[name] for name in instruction.operands]
    left = operands[0][0].shape
    # the type of a start lists its operands before its results
    before = sum(map(len, operands)) if operation != instruction.opcode else 0
    match = _CONTRACTED.search(instruction.attributes)
    dims = [int(dim) for dim in re.findall(r"\d+", "".join(filter(None, match.groups())))] if match else []
    return 2 * math.prod(instruction.results[before].shape) * math.prod(left[dim] for dim in dims)
