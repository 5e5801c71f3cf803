"""What a compiled program computes while each of its collectives is under way."""

from jaxtron.plan import flops, hlo


def products_beside(module: hlo.Module) -> dict[str, int]:
    """FLOPs of products scheduled between the start and the end of each asynchronous operation, by the start's name.

    The text of a scheduled program is its schedule. A loop counts with its trips, a choice with its largest branch.
    Collectives that no product hides, and those that wait at once, have 0.
    """
    found: dict[str, int] = {}
    known: dict[str, int] = {}
    for instructions in module.computations.values():
        shapes = {instruction.name: instruction.results for instruction in instructions}
        under_way: dict[str, int] = {}
        done = 0
        for instruction in instructions:
            opcode = instruction.opcode
            if opcode.endswith("-start") or opcode in ("send", "recv"):
                under_way[instruction.name] = done
            elif opcode.endswith("-done"):
                start = instruction.arguments.strip().rsplit("%", 1)[-1]
                if start in under_way:
                    found[start] = done - under_way.pop(start)
            else:
                done += flops.most(module, instruction, shapes, known)
    return found
