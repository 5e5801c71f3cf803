"""Tensors of Megatron-LM's files as arrays: of references to numbers, of boxes, of tensor-parallel ranks' parts."""

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from jaxtron.config import UserError
from jaxtron.weights.megatron.distributed import Box, DistributedTensor
from jaxtron.weights.megatron.names import Joined
from jaxtron.weights.megatron.pickles import TensorRecord
from jaxtron.weights.megatron.torch_file import TorchFile

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# in a group, by the name of what they are
PARTS = {"query": slice(-2), "key": slice(-2, -1), "value": slice(-1, None)}
# boxes that a tensor is cut into at most, along all dimensions
MOST_CELLS = 2**26


def array_of(file: TorchFile, tensor: TensorRecord, what: str) -> np.ndarray:
    """A tensor's numbers in its own type; `UserError` where they do not lie within what the file has."""
    dtype = DTYPES.get(tensor.numbers.dtype)
    if dtype is None:
        raise UserError(f"{what} is in {tensor.numbers.dtype}: only {', '.join(DTYPES)} are read")
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, dtype)
    if tensor.offset + last >= tensor.numbers.count:
        raise UserError(f"{what} lies beyond its numbers; bring back a good copy")
    numbers = np.frombuffer(file.read(tensor.numbers), dtype)
    steps = [step * dtype.itemsize for step in tensor.stride]
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, steps, writeable=False)


def assembled(tensor: DistributedTensor, row: int | None) -> np.ndarray:
    """A distributed tensor, or its row along the first dimension."""
    dtype = DTYPES[tensor.dtype]
    first = 0 if row is None else 1
    whole = np.empty(tensor.shape[first:], dtype)
    for chunk in tensor.chunks:
        if row is not None and not chunk.offsets[0] <= row < chunk.offsets[0] + chunk.sizes[0]:
            continue
        part = _of_chunk(tensor, chunk)
        if row is not None:
            part = part[row - chunk.offsets[0]]
        bounds = zip(chunk.offsets[first:], part.shape, strict=True)
        whole[tuple(slice(offset, offset + size) for offset, size in bounds)] = part
    return whole


def _of_chunk(tensor: DistributedTensor, chunk: Box) -> np.ndarray:
    file = chunk.blob.read(tensor.name)
    where = f"{chunk.blob.path}, {tensor.name},"
    value = file.value
    if not isinstance(value, TensorRecord) or value.shape != chunk.sizes or value.numbers.dtype != tensor.dtype:
        found = f"{list(value.shape)} in {value.numbers.dtype}" if isinstance(value, TensorRecord) else "no tensor"
        raise UserError(
            f"{where} is {found}, and {tensor.path.name} makes it {list(chunk.sizes)} in {tensor.dtype}; bring back "
            "the checkpoint's own files"
        )
    return array_of(file, value, where)


def check_covered(tensor: DistributedTensor) -> None:
    """`UserError` unless a tensor's boxes are all of it, each place once."""
    cuts = [
        sorted({0, size, *(end for chunk in tensor.chunks for end in _ends(chunk, place))})
        for place, size in enumerate(tensor.shape)
    ]
    if any(cut[-1] > size for cut, size in zip(cuts, tensor.shape, strict=True)):
        raise _not_covered(tensor, "have parts beyond its end")
    cells = [len(cut) - 1 for cut in cuts]
    if np.prod(cells, dtype=float) > MOST_CELLS:
        raise _not_covered(tensor, "are cut in too many ways")
    counts = np.zeros(cells, np.uint16)
    places = [{end: number for number, end in enumerate(cut)} for cut in cuts]
    for chunk in tensor.chunks:
        bounds = (_ends(chunk, place) for place in range(len(cells)))
        counts[tuple(slice(known[a], known[b]) for known, (a, b) in zip(places, bounds, strict=True))] += 1
    if (counts != 1).any():
        raise _not_covered(tensor, "leave something out" if (counts == 0).any() else "overlap")


def _ends(chunk: Box, place: int) -> tuple[int, int]:
    return chunk.offsets[place], chunk.offsets[place] + chunk.sizes[place]


def _not_covered(tensor: DistributedTensor, why: str) -> UserError:
    return UserError(
        f"{tensor.path} has {tensor.name} of shape {list(tensor.shape)}, and its parts {why}; bring back all files"
    )


def joined_parts(parts: Sequence[np.ndarray], how: Joined) -> np.ndarray:
    """A whole tensor of the parts of all tensor-parallel ranks in their order."""
    if how == "same" or len(parts) == 1:
        return parts[0]
    if how == "columns":
        return np.concatenate(parts, 1)
    if how == "rows":
        return np.concatenate(parts)
    # each rank has both halves of its own width
    halves = [np.split(part, 2) for part in parts]
    return np.concatenate([pair[side] for side in (0, 1) for pair in halves])


def joined_shape(shape: Sequence[int], count: int, how: Joined) -> tuple[int, ...]:
    """The shape of what `count` parts of this shape make."""
    if how == "same":
        return tuple(shape)
    place = 1 if how == "columns" else 0
    return tuple(size * count if number == place else size for number, size in enumerate(shape))


def by_heads(array: np.ndarray, heads: int, version: float) -> np.ndarray:
    """Rows of queries, keys and values of each head, as checkpoints have them since version 2: [heads, 3, dim].

    Before, they lay as [3, heads, dim] (0) or [heads, dim, 3] (1).
    """
    if version >= 2:
        return array
    dim, rest = array.shape[0] // (3 * heads), array.shape[1:]
    if version >= 1:
        return array.reshape(heads, dim, 3, *rest).swapaxes(1, 2).reshape(array.shape)
    return array.reshape(3, heads, dim, *rest).swapaxes(0, 1).reshape(array.shape)


def of_groups(array: np.ndarray, part: str, groups: int, dim: int) -> np.ndarray:
    """The rows of queries, keys or values, of those by group: the queries that share a key, the key, its value."""
    rest = array.shape[1:]
    split = array.reshape(groups, -1, dim, *rest)
    return split[:, PARTS[part]].reshape(-1, *rest)


def into_groups(query: np.ndarray, key: np.ndarray, value: np.ndarray, groups: int, dim: int) -> np.ndarray:
    """The inverse of `of_groups`, of all three."""
    rest = query.shape[1:]
    parts = [part.reshape(groups, -1, dim, *rest) for part in (query, key, value)]
    return np.concatenate(parts, 1).reshape(-1, *rest)
