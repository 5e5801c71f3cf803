"""Runs straight-line PTX of one warpgroup in NumPy: what ptxas is given, computed for all of its threads at once.

For kernels without branches, shared memory or tensor cores, whose parameters are pointers to arrays of 32-bit words.
"""

import re

import numpy as np

THREADS = 128
_SPACE = 1 << 32
# they order threads, or choose one of them to issue copies
IGNORED = ("bar", "fence", "elect", "shfl")
_OPERATIONS = {
    "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "shl": np.left_shift,
    "shr": np.right_shift,
}  # fmt: skip
# of numbers without a sign
_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip


def run(text: str, arrays: list[np.ndarray]) -> None:
    """Runs the entry of a PTX module on uint32 arrays, one for each parameter, which it may change.

    `ValueError` for an instruction that is not known here.
    """
    body = text[text.index(".entry") :]
    registers: dict[str, np.ndarray] = {}
    for line in body[body.index("{") + 1 :].splitlines():
        line = line.split("//")[0].strip()
        if not line or line.startswith((".", "}", "$")) or line.startswith(IGNORED):
            continue
        name, _, rest = line.rstrip(";").partition(" ")
        if name.rstrip(";") == "ret":
            return
        if not re.fullmatch(r"[a-z0-9_.:]+", name):
            raise ValueError(f"cannot run {line}")
        _step(line, name.replace("::entry", "").split("."), _operands(rest), registers, arrays)
    raise ValueError("the program does not return")


def _operands(text: str) -> list[str]:
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text)]


def _step(line: str, name: list[str], operands: list[str], registers: dict, arrays: list[np.ndarray]) -> None:
    kind, width = name[0], int(re.sub(r"\D", "", name[-1]))
    wraps = np.uint64((1 << width) - 1)

    def value(operand: str) -> np.ndarray:
        if operand.startswith("%"):
            return np.arange(THREADS, dtype=np.uint64) if operand == "%tid.x" else registers[operand]
        return np.full(THREADS, int(operand, 0) & 0xFFFFFFFFFFFFFFFF, np.uint64) & wraps

    def address(operand: str) -> tuple[int, np.ndarray]:
        """The array that is meant, and each thread's first word of it."""
        base, _, offset = operand.strip("[]").partition("+")
        places = registers[base] + np.uint64(int(offset or 0))
        (space,) = set((places // _SPACE).tolist())
        return int(space), (places % _SPACE // 4).astype(int)

    to, *sources = operands
    if kind == "ld" and name[1] == "param":
        number = int(re.search(r"param_(\d+)", sources[0])[1])
        registers[to] = np.full(THREADS, number * _SPACE, np.uint64)
    elif kind == "ld":
        space, places = address(sources[0])
        for number, register in enumerate(_operands(to.strip("{}"))):
            registers[register] = arrays[space][places + number].astype(np.uint64)
    elif kind == "st":
        space, places = address(to)
        for number, register in enumerate(_operands(sources[0].strip("{}"))):
            arrays[space][places + number] = value(register).astype(np.uint32)
    elif kind == "mov" and to.startswith("{"):
        low, high = _operands(to.strip("{}"))
        whole = value(sources[0])
        registers[low], registers[high] = whole & np.uint64(0xFFFFFFFF), whole >> np.uint64(32)
    elif kind in ("mov", "cvt", "cvta"):
        registers[to] = value(sources[0]) & (np.uint64(0xFFFFFFFF) if "u32" in name else wraps)
    elif kind == "setp":
        if name[-1].startswith("s"):
            raise ValueError(f"cannot run {line}")
        registers[to] = _COMPARISONS[name[1]](*map(value, sources))
    elif kind == "selp":
        registers[to] = np.where(registers[sources[2]], value(sources[0]), value(sources[1]))
    elif kind == "bfe":
        whole, start, length = map(value, sources)
        registers[to] = whole >> start & (np.uint64(1) << length) - np.uint64(1)
    elif kind == "mul" and name[1] == "wide":
        # the sign of what is multiplied is none: thread numbers and words
        registers[to] = value(sources[0]) * value(sources[1])
    elif kind in _OPERATIONS and not (kind == "shr" and name[-1].startswith("s")):
        registers[to] = _OPERATIONS[kind](*map(value, sources)) & wraps
    else:
        raise ValueError(f"cannot run {line}")
