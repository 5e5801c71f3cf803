"""A checkpoint's arrays in parts, without devices: read in the pieces that were written, or written as a new one.

Here are arrays as they lie on disk: layers in the model's order, no padding, names as in the record.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jaxtyping import PyTree

from jaxtron.checkpoint import record as records
from jaxtron.checkpoint.quiet import quiet_saves
from jaxtron.checkpoint.record import CheckpointRecord, DamageError, Signature
from jaxtron.checkpoint.restore import step_path
from jaxtron.checkpoint.storage import PIECE_BYTES

Part = tuple[tuple[int, ...], np.ndarray]


def open_parts(path: Path) -> tuple[CheckpointRecord, "StoredArrays"]:
    """The record of a checkpoint whose files are whole, and its arrays; a `DamageError` where they are not."""
    record = records.read(path)
    records.verify(path, record.files)
    return record, StoredArrays(path, record.arrays)


class StoredArrays:
    """The arrays of a checkpoint, a piece at a time."""

    def __init__(self, path: Path, arrays: Signature) -> None:
        self._path, self._arrays = path, arrays

    def parts(self, name: str) -> Iterator[Part]:
        """All of an array in pieces as it was written, each once, and where in the array each begins.

        A `DamageError` where it is not the array of the record.
        """
        store = _open(self._path, name)
        dtype, shape = self._arrays[name]
        if (store.dtype.name, tuple(store.shape)) != (dtype, shape):
            raise DamageError(f"{name} is not the array of its record")
        for starts, ends in _grid(shape, store.chunk_layout.read_chunk.shape or shape):
            yield starts, store[tuple(map(slice, starts, ends))].read().result()


def _grid(shape: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Beginnings and ends of the pieces of an array."""
    counts = (range(0, whole, size) for whole, size in zip(shape, sizes, strict=True))
    for starts in product(*counts):
        yield starts, tuple(min(start + size, whole) for start, size, whole in zip(starts, sizes, shape, strict=True))


def _spec(path: Path, name: str) -> dict[str, Any]:
    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}
    return {"driver": "zarr", "kvstore": {**base, "path": f"{name}/"}}


def _open(path: Path, name: str) -> Any:
    return tensorstore.open(_spec(path.absolute(), name), open=True, read=True).result()


class PartsWriter:
    """A new checkpoint, an array at a time; made by `new_checkpoint`."""

    def __init__(self, path: Path, arrays: Signature) -> None:
        self._path, self._arrays = path.absolute(), arrays

    def array(self, name: str, *, stacked: bool) -> "ArrayRows":
        """An array to be filled; stacked: row by row."""
        dtype, shape = self._arrays[name]
        chunks = _chunks(shape, jnp.dtype(dtype).itemsize, stacked)
        metadata = {
            "shape": list(shape),
            "chunks": list(chunks),
            "dtype": "bfloat16" if dtype == "bfloat16" else np.dtype(dtype).str,
            "compressor": None,
        }
        spec = _spec(self._path, name) | {"metadata": metadata}
        store = tensorstore.open(spec, create=True, delete_existing=True, open=False).result()
        return ArrayRows(store, chunks)


class ArrayRows:
    """An array that is being written."""

    def __init__(self, store: Any, chunks: tuple[int, ...]) -> None:
        self._store, self._chunks = store, chunks

    def write(self, row: int | None, values: np.ndarray) -> None:
        """The numbers of a row, or (None) of the whole."""
        first = () if row is None else (row,)
        for starts, ends in _grid(values.shape, self._chunks[len(first) :]):
            piece = tuple(map(slice, starts, ends))
            self._store[(*first, *piece)].write(np.ascontiguousarray(values[piece])).result()


def _chunks(shape: tuple[int, ...], item: int, stacked: bool) -> tuple[int, ...]:
    """Pieces of an array, of a stacked one of a row, cut along their longest dimensions until they are small enough."""
    sizes = [1, *shape[1:]] if stacked else list(shape)
    while math.prod(sizes) * item > PIECE_BYTES:
        longest = sizes.index(max(sizes))
        sizes[longest] = math.ceil(sizes[longest] / 2)
    return tuple(max(1, size) for size in sizes)


@contextlib.contextmanager
def new_checkpoint(directory: Path, record: CheckpointRecord, tree: PyTree) -> Iterator[PartsWriter]:
    """A checkpoint in the making in a directory of checkpoints, which nobody may read before the block ends.

    `tree` has a leaf for each array of the record, under its name, as nested dictionaries.
    """
    path = step_path(directory, record.step)
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet_saves(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as orbax:
        # Orbax's own files for this tree, of arrays that are made anew with their sizes
        orbax.save(path, args=ocp.args.PyTreeSave(_placeholders(tree)))
    for leftover in path.glob("array_metadatas/*"):
        leftover.unlink()
    yield PartsWriter(path, record.arrays)
    records.write(replace(record, files=records.checksums(path)), path)


def _placeholders(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _placeholders(value) if isinstance(value, Mapping) else np.zeros((1,), np.float32)
        for key, value in tree.items()
    }
