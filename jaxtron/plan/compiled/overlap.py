"""What a compiled program computes while each of its collectives is under way."""

from jaxtron.plan.compiled import flops, hlo


def products_beside(module: hlo.Module) -> dict[str, int]:
    """FLOPs of products scheduled between the start and the end of each asynchronous operation, by the start's name.

    The text of a scheduled program is its schedule. A loop counts with its trips, a choice with its largest branch. A
    product that is itself asynchronous counts where any of it is under way at the same time. Collectives that no
    product hides, and those that wait at once, have 0.
    """
    found: dict[str, int] = {}
    known: dict[str, int] = {}
    for instructions in module.computations.values():
        shapes = {instruction.name: instruction.results for instruction in instructions}
        # by start: FLOPs that were over when it began, its own among them; and its own
        before: dict[str, int] = {}
        running: dict[str, int] = {}
        begun = over = 0
        for instruction in instructions:
            if instruction.opcode.endswith("-done"):
                start = instruction.arguments.strip().rsplit("%", 1)[-1]
                if start in before:
                    found[start] = begun - before.pop(start)
                    over += running.pop(start)
                continue
            products = flops.most(module, instruction, shapes, known)
            begun += products
            if instruction.opcode.endswith("-start") or instruction.opcode in ("send", "recv"):
                before[instruction.name], running[instruction.name] = over + products, products
            else:
                over += products
    return found
