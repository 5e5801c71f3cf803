"""Pickles of torch and Megatron-LM as inert values: nothing that a file says is imported, looked up or called.

A pickle is a program for a machine with a stack. This is such a machine whose calls make records: the names of classes
and functions stay names, of which those of a list are let through. What a record means is for whoever reads it.
"""

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from jaxtron.config import UserError, shown

# what files of weights are made of: tensors, what lies around them, and kinds of settings that are only looked at
TORCH_TYPES = "float64 float32 float16 bfloat16 uint8 int8 int16 int32 int64 bool complex64 complex128".split()
STORAGES = {
    f"torch.{name}Storage": kind
    for name, kind in {
        "Double": "F64",
        "Float": "F32",
        "Half": "F16",
        "BFloat16": "BF16",
        "Byte": "U8",
        "Char": "I8",
        "Short": "I16",
        "Int": "I32",
        "Long": "I64",
        "Bool": "BOOL",
    }.items()
}
DICT = "collections.OrderedDict"
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
SIZE = "torch.Size"
NAMESPACE = "argparse.Namespace"
KNOWN = frozenset(
    (
        DICT,
        TENSOR,
        PARAMETER,
        SIZE,
        NAMESPACE,
        *STORAGES,
        *(f"torch.{name}" for name in (*TORCH_TYPES, "device")),
        "torch.serialization._get_layout",
        # settings, states of random numbers
        *"types.SimpleNamespace signal.Signals pathlib.PosixPath _io.BytesIO".split(),
        *"_codecs.encode numpy.ndarray numpy.dtype".split(),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        *(f"{builtins}.{name}" for builtins in ("builtins", "__builtin__") for name in ("set", "bytes", "bytearray")),
    )
)
# of which every class is let through, for none is ever looked up: plans of a distributed file, kinds of settings
PACKAGES = ("torch.distributed.checkpoint.", "megatron.core.", "megatron.training.", "megatron.model.")
MARK = object()


@dataclass(frozen=True)
class Global:
    """The name of a class or function."""

    name: str


@dataclass(eq=False)
class PickledRecord:
    """What a call would make: the name of what was called, its arguments, and the attributes that were set."""

    name: str
    arguments: tuple[Any, ...]
    attributes: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        """The value of an attribute, or None."""
        return self.attributes.get(name)


@dataclass(frozen=True)
class StoredNumbers:
    """A run of numbers in the file, by the key that it has there; `dtype` as in files of safetensors."""

    key: str
    dtype: str
    count: int
    start: int = 0
    """The first number, where it is a part of what has the key."""


@dataclass(frozen=True)
class TensorRecord:
    """A tensor: where its numbers are, and how they lie."""

    numbers: StoredNumbers
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Broken(Exception):
    """The bytes are no pickle that can be understood."""


class PickleReader:
    """The values of a buffer's pickles, one after the other.

    `dtypes` has by key of what type the numbers are that they refer to.
    """

    def __init__(self, data: Any, where: str, position: int = 0) -> None:
        """`data` gives bytes where it is sliced; `where` is the file's name for messages."""
        self.position = position
        self.dtypes: dict[str, str] = {}
        self._data, self._where, self._size = data, where, len(data)
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The next value; `UserError` where it is damaged, or made of what is not on the list."""
        self._stack, self._memo = [], {}
        try:
            while True:
                code = self._take(1)[0]
                if code == ord("."):
                    return self._pop()
                operation = OPERATIONS.get(code)
                if operation is None:
                    raise _Broken(f"byte {self.position - 1:,} is no operation of it")
                operation(self)
        except (_Broken, struct.error, UnicodeDecodeError, ValueError, TypeError, IndexError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self._where} is no whole pickle: {reason[:120]}; bring back a good copy") from None

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if count < 0 or end > self._size:
            raise _Broken("it ends early")
        found = self._data[self.position : end]
        self.position = end
        return found

    def _number(self, kind: str) -> Any:
        return struct.unpack(kind, self._take(struct.calcsize(kind)))[0]

    def _line(self) -> str:
        """Up to the end of a line, which names and numbers of old protocols are short of."""
        near = self._data[self.position : self.position + 5000]
        end = near.find(b"\n")
        if end < 0:
            raise _Broken("a line in it does not end")
        self.position += end + 1
        return near[:end].decode()

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is MARK:
            raise _Broken("a value is missing")
        return value

    def _top(self) -> Any:
        if self._stack[-1] is MARK:
            raise _Broken("a value is missing")
        return self._stack[-1]

    def _since_mark(self) -> list[Any]:
        place = len(self._stack) - 1
        while self._stack[place] is not MARK:
            place -= 1
            if place < 0:
                raise _Broken("a mark is missing")
        found = self._stack[place + 1 :]
        del self._stack[place:]
        return found

    def _get(self, place: int) -> None:
        if place not in self._memo:
            raise _Broken(f"it refers to value {place:,}, which is not there")
        self._push(self._memo[place])

    def _put(self, place: int) -> None:
        self._memo[place] = self._top()

    def _of(self, kind: type) -> Any:
        """The value on top, which must be of a kind."""
        value = self._top()
        if type(value) is not kind:
            raise _Broken(f"something is put into {type(value).__name__}")
        return value

    def _pairs(self, values: list[Any]) -> None:
        target = self._of(dict)
        if len(values) % 2:
            raise _Broken("a value of a dictionary is missing")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[hashable(key)] = value

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Broken("a name is no text")
        whole = f"{module}.{name}"
        if whole not in KNOWN and not whole.startswith(PACKAGES):
            refuse(self._where, whole)
        self._push(Global(whole))

    def _call(self, function: Any, arguments: Any) -> None:
        if type(function) is not Global or type(arguments) is not tuple:
            raise _Broken("what it calls is no function")
        self._push(_made(function.name, arguments))

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(state, tuple) and len(state) == 2 and isinstance(target, PickledRecord):
            # attributes, and those in slots
            parts = [part for part in state if isinstance(part, dict)]
            state = {key: value for part in parts for key, value in part.items()}
        if isinstance(target, PickledRecord):
            found = state if isinstance(state, dict) else {"": state}
            target.attributes.update({key: value for key, value in found.items() if isinstance(key, str)})
        elif not isinstance(target, dict):
            # an ordered dictionary's own attributes say nothing
            raise _Broken(f"attributes are set of {type(target).__name__}")

    def _numbers(self) -> None:
        """A reference to numbers that lie outside of the pickle."""
        found = self._pop()
        if type(found) is not tuple or len(found) not in (5, 6) or found[0] != "storage":
            raise _Broken("a reference is none to numbers")
        _, kind, key, _, count, *view = found
        if type(kind) is not Global or kind.name not in STORAGES:
            name = kind.name if type(kind) is Global else "what is no type"
            raise _Broken(f"numbers are of {name}")
        if type(key) not in (str, int):
            raise _Broken("numbers have no key")
        # of files before torch 1.6: a part of what has the key
        part = view[0][1:] if view and isinstance(view[0], tuple) else (0, count)
        start, size = whole_numbers(part, 2)
        dtype = STORAGES[kind.name]
        if self.dtypes.setdefault(str(key), dtype) != dtype:
            raise _Broken(f"the numbers of {key} are of two types")
        self._push(StoredNumbers(str(key), dtype, size, start))


def refuse(where: str, name: str) -> NoReturn:
    """`UserError` for a name of a class or function that no file of weights needs."""
    raise UserError(
        f"{where} asks for {shown(name)}, which no checkpoint needs and which may run code; nothing of it was run: "
        "do not load it anywhere before you know who wrote it"
    )


def hashable(key: Any) -> Any:
    """A key that is told from others in one step, for nested ones take forever; `_Broken` if it is another."""
    simple = (str, int, float, bytes, type(None), Global, PickledRecord)
    if isinstance(key, simple) or (isinstance(key, tuple) and all(isinstance(part, simple) for part in key)):
        return key
    raise _Broken(f"a key is {type(key).__name__}")


def whole_numbers(values: Any, count: int | None = None) -> tuple[int, ...]:
    """The values, which must be whole numbers from 0 on; `_Broken` if they are not."""
    if not isinstance(values, tuple | list) or (count is not None and len(values) != count):
        raise _Broken("a size is no list of numbers")
    if not all(type(value) is int and 0 <= value < 2**62 for value in values):
        raise _Broken("a size is no number")
    return tuple(values)


def _made(name: str, arguments: tuple[Any, ...]) -> Any:
    """What a call stands for: dictionaries, tensors and sizes as they are, all else a record of the call."""
    if name == DICT:
        if not arguments:
            return {}
        if len(arguments) == 1 and isinstance(arguments[0], list | dict):
            pairs = arguments[0].items() if isinstance(arguments[0], dict) else arguments[0]
            return {hashable(key): value for key, value in pairs}
        raise _Broken("a dictionary is made of something else")
    if name == SIZE:
        return whole_numbers(arguments[0] if arguments else ())
    if name == TENSOR:
        if len(arguments) < 4 or type(arguments[0]) is not StoredNumbers:
            raise _Broken("a tensor has no numbers")
        (offset,) = whole_numbers(arguments[1:2], 1)
        shape, stride = whole_numbers(arguments[2]), whole_numbers(arguments[3])
        if len(shape) != len(stride):
            raise _Broken("a tensor has sizes without strides")
        return TensorRecord(arguments[0], offset, shape, stride)
    if name == PARAMETER:
        if not arguments or type(arguments[0]) is not TensorRecord:
            raise _Broken("a parameter is no tensor")
        return arguments[0]
    return PickledRecord(name, arguments)


def _text(kind: str) -> Callable[[PickleReader], None]:
    return lambda reader: reader._push(reader._take(reader._number(kind)).decode("utf-8", "surrogatepass"))


def _bytes(kind: str) -> Callable[[PickleReader], None]:
    return lambda reader: reader._push(bytes(reader._take(reader._number(kind))))


def _old_text(kind: str) -> Callable[[PickleReader], None]:
    return lambda reader: reader._push(reader._take(reader._number(kind)).decode("latin-1"))


def _integer(kind: str) -> Callable[[PickleReader], None]:
    return lambda reader: reader._push(reader._number(kind))


def _long(kind: str) -> Callable[[PickleReader], None]:
    return lambda reader: reader._push(int.from_bytes(reader._take(reader._number(kind)), "little", signed=True))


def _constant(make: Callable[[], Any]) -> Callable[[PickleReader], None]:
    return lambda reader: reader._push(make())


def _tuple(count: int) -> Callable[[PickleReader], None]:
    def run(reader: PickleReader) -> None:
        found = [reader._pop() for _ in range(count)]
        reader._push(tuple(reversed(found)))

    return run


def _with_mark(use: Callable[[PickleReader, list[Any]], None]) -> Callable[[PickleReader], None]:
    return lambda reader: use(reader, reader._since_mark())


def _with_top(use: Callable[[PickleReader, Any], None]) -> Callable[[PickleReader], None]:
    return lambda reader: use(reader, reader._pop())


def _integer_line(reader: PickleReader) -> None:
    line = reader._line()
    reader._push({"00": False, "01": True}[line] if line in ("00", "01") else int(line.rstrip("L")))


def _two_names(reader: PickleReader) -> None:
    reader._global(reader._line(), reader._line())


def _stacked_names(reader: PickleReader) -> None:
    name, module = reader._pop(), reader._pop()
    reader._global(module, name)


def _call(reader: PickleReader) -> None:
    arguments, function = reader._pop(), reader._pop()
    reader._call(function, arguments)


def _call_with_words(reader: PickleReader) -> None:
    words, arguments, function = reader._pop(), reader._pop(), reader._pop()
    if words != {}:
        raise _Broken("a class is made with words")
    reader._call(function, arguments)


def _set_item(reader: PickleReader) -> None:
    value, key = reader._pop(), reader._pop()
    reader._pairs([key, value])


def _new_dict(reader: PickleReader, values: list[Any]) -> None:
    reader._push({})
    reader._pairs(values)


def _frame(reader: PickleReader) -> None:
    reader._number("<Q")


def _set(values: Iterable[Any]) -> set[Any]:
    return {hashable(value) for value in values}


# by the byte of each operation, in the order of their protocols; those that are not here no such file has
OPERATIONS: dict[int, Callable[[PickleReader], object]] = {
    ord("("): lambda reader: reader._push(MARK),
    ord("0"): lambda reader: reader._stack.pop(),
    ord("1"): lambda reader: reader._since_mark(),
    ord("2"): lambda reader: reader._push(reader._top()),
    ord("F"): lambda reader: reader._push(float(reader._line())),
    ord("I"): _integer_line,
    ord("L"): _integer_line,
    ord("J"): _integer("<i"),
    ord("K"): _integer("<B"),
    ord("M"): _integer("<H"),
    ord("G"): _integer(">d"),
    ord("N"): _constant(lambda: None),
    0x88: _constant(lambda: True),
    0x89: _constant(lambda: False),
    0x8A: _long("<B"),
    0x8B: _long("<i"),
    ord("T"): _old_text("<i"),
    ord("U"): _old_text("<B"),
    ord("X"): _text("<I"),
    0x8C: _text("<B"),
    0x8D: _text("<Q"),
    ord("B"): _bytes("<I"),
    ord("C"): _bytes("<B"),
    0x8E: _bytes("<Q"),
    0x96: _bytes("<Q"),
    ord("]"): _constant(list),
    ord("}"): _constant(dict),
    ord(")"): _constant(tuple),
    0x8F: _constant(set),
    ord("l"): _with_mark(lambda reader, values: reader._push(values)),
    ord("t"): _with_mark(lambda reader, values: reader._push(tuple(values))),
    ord("d"): _with_mark(_new_dict),
    0x91: _with_mark(lambda reader, values: reader._push(frozenset(_set(values)))),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("a"): _with_top(lambda reader, value: reader._of(list).append(value)),
    ord("e"): _with_mark(lambda reader, values: reader._of(list).extend(values)),
    ord("s"): _set_item,
    ord("u"): _with_mark(lambda reader, values: reader._pairs(values)),
    0x90: _with_mark(lambda reader, values: reader._of(set).update(_set(values))),
    ord("p"): lambda reader: reader._put(int(reader._line())),
    ord("q"): lambda reader: reader._put(reader._number("<B")),
    ord("r"): lambda reader: reader._put(reader._number("<I")),
    0x94: lambda reader: reader._put(len(reader._memo)),
    ord("g"): lambda reader: reader._get(int(reader._line())),
    ord("h"): lambda reader: reader._get(reader._number("<B")),
    ord("j"): lambda reader: reader._get(reader._number("<I")),
    ord("c"): _two_names,
    0x93: _stacked_names,
    ord("R"): _call,
    0x81: _call,
    0x92: _call_with_words,
    ord("b"): PickleReader._build,
    ord("Q"): PickleReader._numbers,
    0x80: lambda reader: reader._number("<B"),
    0x95: _frame,
}
