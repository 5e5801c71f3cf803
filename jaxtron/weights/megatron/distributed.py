"""The index of a distributed checkpoint (`torch_dist`): which tensors it has, and where the parts of each lie.

`.metadata` is a pickle of torch's `Metadata`; each part of a tensor is a file of `torch.save` within a `.distcp` file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtron.config import UserError, shown
from jaxtron.weights.megatron.pickles import Global, PickledRecord, PickleReader
from jaxtron.weights.megatron.torch_file import TorchFile, torch_file_of

METADATA = ".metadata"
PREFIX = "torch.distributed.checkpoint."
TENSOR, BYTES = (f"{PREFIX}metadata.{name}StorageMetadata" for name in ("Tensor", "Bytes"))
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Blob:
    """Bytes of a file."""

    path: Path
    offset: int
    length: int

    def read(self, what: str) -> TorchFile:
        """The file of torch that they are; `what` is the tensor's name for messages."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.length)
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(f"cannot read {self.path}: {getattr(error, 'strerror', None) or error}") from None
        if len(data) < self.length:
            raise UserError(f"{self.path} ends within {what}; bring back a good copy")
        return torch_file_of(data, f"{self.path}, {what},")


@dataclass(frozen=True)
class Box:
    """A box of a tensor, and its numbers."""

    offsets: Sizes
    sizes: Sizes
    blob: Blob


@dataclass(frozen=True)
class DistributedTensor:
    """A tensor in boxes, which neither overlap nor leave anything out."""

    path: Path
    """Of the index."""
    name: str
    dtype: str
    """As in files of safetensors, or torch's name of another type."""
    shape: Sizes
    chunks: tuple[Box, ...]


@dataclass(frozen=True)
class DistributedIndex:
    """What a directory has, by name: tensors, and other values."""

    tensors: Mapping[str, DistributedTensor]
    values: Mapping[str, Blob]


def read_index(directory: Path) -> DistributedIndex:
    """The index of a directory; `UserError` where it is damaged, or names what is not there."""
    path = directory / METADATA
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    found = PickleReader(content, str(path)).load()
    if not isinstance(found, PickledRecord) or found.name != f"{PREFIX}metadata.Metadata":
        # Megatron's own kind of it has the same attributes
        if not isinstance(found, PickledRecord) or not found.name.endswith("Metadata"):
            raise _not_understood(path, "it is no Metadata")
    entries, places = found.get("state_dict_metadata"), found.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise _not_understood(path, "it has no state_dict_metadata and storage_data")
    blobs = dict(_blob(path, key, value) for key, value in places.items())
    tensors, values = {}, {}
    for name, entry in entries.items():
        if not isinstance(name, str) or not isinstance(entry, PickledRecord):
            raise _not_understood(path, "a name is no text")
        if entry.name == BYTES:
            if (name, None) in blobs:
                values[name] = blobs[name, None]
        elif entry.name == TENSOR:
            tensors[name] = _tensor(path, name, entry, blobs)
        else:
            raise _not_understood(path, f"{name} is {entry.name}")
    return DistributedIndex(tensors, values)


def _blob(path: Path, key: Any, value: Any) -> tuple[tuple[str, Sizes | None], Blob]:
    """An entry of `storage_data`: by name and the offsets of a box, where its bytes are."""
    if not isinstance(key, PickledRecord) or not isinstance(value, PickledRecord):
        raise _not_understood(path, "storage_data is of another form")
    name, offsets = key.get("fqn"), key.get("offset")
    file, start, length = (value.get(part) for part in ("relative_path", "offset", "length"))
    box = None if offsets is None else _sizes(offsets)
    place = _sizes((start, length))
    if not isinstance(name, str) or (box is None) != (offsets is None) or place is None:
        raise _not_understood(path, "storage_data is of another form")
    if not isinstance(file, str) or not file.endswith(".distcp") or set(file) & set("/\\\0"):
        raise UserError(
            f"{path} says that {name} is in {shown(file)}: that is no name of a .distcp file in {path.parent}; bring "
            "back the checkpoint's own"
        )
    if value.get("transform_descriptors"):
        raise UserError(f"{path} says that {name} is compressed; save the checkpoint without compression")
    return (name, box), Blob(path.parent / file, *place)


def _tensor(
    path: Path, name: str, entry: PickledRecord, blobs: Mapping[tuple[str, Sizes | None], Blob]
) -> DistributedTensor:
    properties, shape, boxes = (entry.get(part) for part in ("properties", "size", "chunks"))
    # its state is a list of values, of which the type is the first
    state = properties.get("") if isinstance(properties, PickledRecord) else None
    dtype = properties.get("dtype") if isinstance(properties, PickledRecord) else None
    dtype = state[0] if isinstance(state, tuple) and state else dtype
    shape = _sizes(shape)
    if not isinstance(dtype, Global) or shape is None or not isinstance(boxes, list):
        raise _not_understood(path, f"{name} is no tensor")
    chunks = []
    for box in boxes:
        offsets, sizes = (
            _sizes(box.get(part)) if isinstance(box, PickledRecord) else None for part in ("offsets", "sizes")
        )
        if offsets is None or sizes is None or not len(offsets) == len(sizes) == len(shape):
            raise _not_understood(path, f"a part of {name} is no box")
        if (name, offsets) not in blobs:
            raise UserError(f"{path} does not say where the part of {name} at {list(offsets)} is; bring back all files")
        chunks.append(Box(offsets, sizes, blobs[name, offsets]))
    short = dtype.name.removeprefix("torch.")
    return DistributedTensor(path, name, DTYPES.get(short, short), shape, tuple(chunks))


def _sizes(values: Any) -> Sizes | None:
    """Whole numbers from 0 on, or None."""
    is_sizes = isinstance(values, tuple | list) and all(type(value) is int and 0 <= value < 2**62 for value in values)
    return tuple(values) if is_sizes else None


def _not_understood(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is no index of a distributed checkpoint that is known here: {why}; bring back a good copy"
    )
