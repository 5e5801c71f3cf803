"""Arrays made once from a description, kept as memory-mapped files that all processes share.

An entry is a folder named by the hash of its description, which names everything that changes the arrays. One process
makes it while the others wait at a lock file; where the file system has no locks, all make it and the first one wins.
It is written under another name and renamed when whole. Checksums find damage, and a damaged entry is made anew.
A process that is killed leaves a `*.partial` folder, which nothing reads.
"""

import fcntl
import hashlib
import json
import logging
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from jaxtyping import Int32, Shaped

from jaxtron.config import UserError
from jaxtron.data.megatron.blend import Blend, build_blend, build_exhaustive_blend
from jaxtron.data.megatron.gpt_index import GPTIndex, build_gpt_index

FORMAT_VERSION = 1
DESCRIPTION_FILE = "description.json"
FOLDER = "indices"
# bytes hashed at once
BLOCK = 1 << 24

Arrays = dict[str, Shaped[np.ndarray, "..."]]

logger = logging.getLogger(__name__)


def cached_arrays(directory: Path | None, description: dict[str, Any], build: Callable[[], Arrays]) -> Arrays:
    """What `build` returns, from the cache below `directory` where it is there already; None is no cache.

    `description` is plain JSON. UserError where the folder cannot be written.
    """
    if directory is None:
        return build()
    text = json.dumps({"version": FORMAT_VERSION, **description}, sort_keys=True)
    entry = directory / FOLDER / hashlib.sha256(text.encode()).hexdigest()[:32]
    try:
        arrays = _load(entry)
        if arrays is None:
            entry.parent.mkdir(parents=True, exist_ok=True)
            with _lock(entry.with_suffix(".lock")):
                arrays = _load(entry)
                if arrays is None:
                    logger.info("making the index %s", entry)
                    _save(entry, text, build())
                    arrays = _load(entry)
    except OSError as error:
        raise UserError(
            f"cannot keep indices in {entry.parent}: {error.strerror or error}; "
            "set the cache directory to a writable folder with room"
        ) from error
    if arrays is None:
        raise UserError(f"the index {entry} is damaged as soon as it is written; check that disk, or set another cache")
    return arrays


def cached_gpt_index(
    lengths: Int32[np.ndarray, "S"], sequences: range, *, directory: Path | None, name: str, **settings: Any
) -> GPTIndex:
    """`build_gpt_index` through the cache; `settings` are the rest of its own.

    The index follows from the lengths of the sequences, so these are in the key and not the file that has them.
    """
    description = {
        "kind": "gpt",
        "sequences": [sequences.start, sequences.stop],
        "lengths": lengths_digest(lengths[sequences.start : sequences.stop]),
        **settings,
    }

    def build() -> Arrays:
        index = build_gpt_index(lengths, sequences, name=name, **settings)
        return {"documents": index.documents, "samples": index.samples, "shuffle": index.shuffle}

    return GPTIndex(**cached_arrays(directory, description, build))


def cached_blend(
    *, weights: list[float] | None, sizes: list[int] | None, samples: int | None, directory: Path | None
) -> Blend:
    """`build_blend` of weights and samples, or `build_exhaustive_blend` of sizes, through the cache."""

    def build() -> Arrays:
        if weights is not None and samples is not None:
            blend = build_blend(weights, samples)
        else:
            assert sizes is not None
            blend = build_exhaustive_blend(sizes)
        return {"datasets": blend.datasets, "samples": blend.samples}

    description = {"kind": "blend", "weights": weights, "sizes": sizes, "samples": samples}
    return Blend(**cached_arrays(directory, description, build))


def lengths_digest(lengths: Int32[np.ndarray, "S"]) -> str:
    """SHA-256 of the lengths as little-endian int32."""
    digest = hashlib.sha256()
    for first in range(0, len(lengths), BLOCK):
        digest.update(lengths[first : first + BLOCK].astype("<i4").tobytes())
    return digest.hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds the file's lock, which the system takes back from a process that dies."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked (%s): other processes may make the same index", path, error)
        yield


def _save(entry: Path, description: str, arrays: Arrays) -> None:
    partial = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        checksums = {}
        for name, values in arrays.items():
            np.save(partial / f"{name}.npy", values)
            checksums[name] = _checksum(values)
        content = {"description": json.loads(description), "checksums": checksums}
        (partial / DESCRIPTION_FILE).write_text(json.dumps(content), encoding="utf-8")
        _publish(partial, entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, entry: Path) -> None:
    """Renames a whole entry into place, unless a whole one is there; a damaged one is put aside."""
    if entry.is_dir() and _load(entry) is None:
        # in one step: processes that have mapped the damaged files keep them
        trash = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.partial")
        with suppress(FileNotFoundError):
            entry.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
    try:
        partial.rename(entry)
    except OSError:
        # another process was first, and its entry is the same as ours
        if not entry.is_dir():
            raise


def _load(entry: Path) -> Arrays | None:
    """The arrays of an entry, memory-mapped; None where it is missing or damaged."""
    if not entry.is_dir():
        return None
    try:
        content = json.loads((entry / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        arrays = {}
        for name, checksum in content["checksums"].items():
            # a plain view of the same memory: slices of a memmap are several times slower
            values = np.asarray(np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False))
            if _checksum(values) != checksum:
                raise ValueError(f"{name}.npy has another checksum")
            arrays[name] = values
        return arrays
    # NumPy reads an array's header as Python
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, SyntaxError, TokenError) as error:
        logger.warning("the index %s is damaged (%s); it is made anew", entry, error)
        return None


def _checksum(values: Shaped[np.ndarray, "..."]) -> str:
    """Type, shape and CRC-32 of the bytes."""
    content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    crc = 0
    for first in range(0, len(content), BLOCK):
        crc = zlib.crc32(content[first : first + BLOCK].data, crc)
    return f"{values.dtype.str} {values.shape} {crc:08x}"
