"""Files of torch and of Megatron-LM by hand, byte for byte of their form, without either."""

import io
import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "uint8": "Byte",
}
METADATA = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True)
class Name:
    """A class or a function."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)
class Call:
    """What a function gives of arguments, and the attributes that it gets."""

    function: Name
    arguments: tuple[Any, ...] = ()
    state: Any = None
    is_new: bool = False
    """Made by `__new__`, as objects are; else by a call."""


@dataclass(frozen=True)
class Reference:
    """To what lies outside of a pickle."""

    value: tuple[Any, ...]


def pickled(value: Any, protocol: int = 2) -> bytes:
    """A pickle of plain values and of the three above."""
    return b"\x80" + bytes([protocol]) + _operations(value, protocol) + b"."


def _operations(value: Any, protocol: int) -> bytes:
    def inner(*values: Any) -> bytes:
        return b"".join(_operations(one, protocol) for one in values)

    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            if abs(value) < 2**31:
                return b"J" + struct.pack("<i", value)
            return b"\x8a\x0b" + value.to_bytes(11, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            encoded = value.encode()
            return b"X" + struct.pack("<I", len(encoded)) + encoded
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case tuple():
            return b"(" + inner(*value) + b"t"
        case list():
            return b"](" + inner(*value) + b"e"
        case dict():
            return b"}(" + inner(*(one for pair in value.items() for one in pair)) + b"u"
        case Name():
            if protocol >= 4:
                return inner(value.module, value.name) + b"\x93"
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            made = inner(value.function, value.arguments) + (b"\x81" if value.is_new else b"R")
            return made if value.state is None else made + inner(value.state) + b"b"
        case Reference():
            return inner(value.value) + b"Q"
    raise AssertionError(type(value))


def named(module: str, name: str, **attributes: Any) -> Call:
    """An object of a class, with attributes."""
    return Call(Name(module, name), (), attributes, is_new=True)


def namespace(values: Mapping[str, Any]) -> Call:
    """Arguments."""
    return named("argparse", "Namespace", **values)


class Numbers:
    """The numbers of a file's tensors, in the order in which a pickle refers to them."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []

    def value(self, tree: Any) -> Any:
        """A value with arrays in it, as a pickle has it."""
        if isinstance(tree, np.ndarray):
            return self._tensor(tree)
        if isinstance(tree, dict):
            return {key: self.value(value) for key, value in tree.items()}
        return [self.value(value) for value in tree] if isinstance(tree, list) else tree

    def _tensor(self, array: np.ndarray) -> Call:
        # as it lies, so that views have strides of their own
        base = array.base if isinstance(array.base, np.ndarray) and array.base.dtype == array.dtype else array
        flat = np.ascontiguousarray(base).reshape(-1)
        if base is not array and base.flags.c_contiguous:
            offset = (array.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // array.itemsize
            stride = tuple(step // array.itemsize for step in array.strides)
        else:
            flat, offset = np.ascontiguousarray(array).reshape(-1), 0
            stride = tuple(int(np.prod(array.shape[place + 1 :])) for place in range(array.ndim))
        key = str(len(self.arrays))
        self.arrays.append(flat)
        storage = Name("torch", f"{STORAGES[array.dtype.name]}Storage")
        reference = Reference(("storage", storage, key, "cpu", flat.size))
        hooks = Call(Name("collections", "OrderedDict"))
        return Call(Name("torch._utils", "_rebuild_tensor_v2"), (reference, offset, array.shape, stride, False, hooks))


def torch_zip(tree: Any, name: str = "archive") -> bytes:
    """What `torch.save` writes since torch 1.6."""
    numbers, out = Numbers(), io.BytesIO()
    content = pickled(numbers.value(tree))
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{name}/data.pkl", content)
        archive.writestr(f"{name}/byteorder", "little")
        for key, array in enumerate(numbers.arrays):
            archive.writestr(f"{name}/data/{key}", array.tobytes())
        archive.writestr(f"{name}/version", "3\n")
    return out.getvalue()


def torch_old(tree: Any) -> bytes:
    """What `torch.save` wrote before 1.6."""
    numbers = Numbers()
    value = numbers.value(tree)
    # of files of that time, a sixth: whether it is a part of another's
    content = _with_views(value)
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickled(0x1950A86A20F9469CFC6C), pickled(1001), pickled(machine), pickled(content)]
    parts.append(pickled([str(key) for key in range(len(numbers.arrays))]))
    parts += [struct.pack("<q", array.size) + array.tobytes() for array in numbers.arrays]
    return b"".join(parts)


def _with_views(value: Any) -> Any:
    match value:
        case Reference():
            return Reference((*value.value, None))
        case Call():
            return Call(
                value.function, tuple(map(_with_views, value.arguments)), _with_views(value.state), value.is_new
            )
        case dict():
            return {key: _with_views(one) for key, one in value.items()}
        case list():
            return [_with_views(one) for one in value]
    return value


def write_ranks(
    folder: Path,
    ranks: Mapping[str, Mapping[str, Any]],
    args: Mapping[str, Any],
    *,
    version: float | None = 3.0,
    iteration: int = 7,
    old: bool = False,
) -> Path:
    """The older format: `ranks` have by the end of a folder's name what is in its file beside the arguments."""
    for rank, parts in ranks.items():
        value = {"args": namespace(args), "iteration": iteration, **parts}
        if version is not None:
            value["checkpoint_version"] = version
        path = folder / f"iter_{iteration:07d}" / f"mp_rank_{rank}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(torch_old(value) if old else torch_zip(value))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


def write_distributed(
    folder: Path,
    tensors: Mapping[str, Sequence[tuple[tuple[int, ...], np.ndarray]]],
    args: Mapping[str, Any],
    *,
    common: bool = False,
    files: int = 2,
) -> Path:
    """`torch_dist`: of each tensor boxes by their offsets. `common`: what is no tensor has a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, places, contents = {}, {}, [bytearray() for _ in range(files)]
    rest = {"args": namespace(args), "iteration": 7, "checkpoint_version": 3.0}

    def put(name: str, offsets: tuple[int, ...] | None, data: bytes) -> None:
        number = len(places) % files
        offset = None if offsets is None else _size(offsets)
        index = named(METADATA, "MetadataIndex", fqn=name, offset=offset, index=None)
        places[index] = named(
            "torch.distributed.checkpoint.filesystem",
            "_StorageInfo",
            relative_path=f"__{number}_0.distcp",
            offset=len(contents[number]),
            length=len(data),
        )
        contents[number] += data

    for name, boxes in tensors.items():
        shape = tuple(
            max(offsets[place] + box.shape[place] for offsets, box in boxes) for place in range(boxes[0][1].ndim)
        )
        dtype = Name("torch", boxes[0][1].dtype.name)
        layout = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
        memory = Call(Name(METADATA, "_MEM_FORMAT_ENCODING"), (0,))
        chunks = [
            named(METADATA, "ChunkStorageMetadata", offsets=_size(offsets), sizes=_size(box.shape))
            for offsets, box in boxes
        ]
        properties = Call(Name(METADATA, "TensorProperties"), (), (dtype, layout, False, memory, False), True)
        entries[name] = named(
            METADATA, "TensorStorageMetadata", properties=properties, size=_size(shape), chunks=chunks
        )
        for offsets, box in boxes:
            put(name, offsets, torch_zip(box))
    if common:
        (folder / "common.pt").write_bytes(torch_zip(rest))
    else:
        entries["common_state/shard_0_1"] = Call(Name(METADATA, "BytesStorageMetadata"), (), None, True)
        put("common_state/shard_0_1", None, torch_zip([rest]))
    metadata = named(
        METADATA, "Metadata", state_dict_metadata=entries, planner_data=None, storage_data=places, version="1.0.0"
    )
    (folder / ".metadata").write_bytes(pickled(metadata, 4))
    for number, content in enumerate(contents):
        (folder / f"__{number}_0.distcp").write_bytes(content)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder


def _size(sizes: tuple[int, ...]) -> Call:
    return Call(Name("torch", "Size"), (sizes,))
