"""The record inside a checkpoint: what it holds, and a checksum of every file.

Orbax and TensorStore do not notice a flipped bit in an array's data, so the record is what tells a damaged checkpoint.
It is written just before the checkpoint's directory gets its final name.
"""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RECORD_FILE = "jaxtron.json"
# Orbax writes these two after the record; restoring reads neither
_UNRECORDED = (RECORD_FILE, "_CHECKPOINT_METADATA", "commit_success.txt")
_CHUNK_BYTES = 1 << 22
_NUM_THREADS = 8

# name -> (dtype, shape), as stored
Signature = dict[str, tuple[str, tuple[int, ...]]]
# relative path -> (bytes, crc32)
Checksums = dict[str, tuple[int, int]]


class DamageError(Exception):
    """A checkpoint cannot be used; `str()` is the reason."""


@dataclass(frozen=True)
class CheckpointRecord:
    """What a checkpoint says about itself."""

    step: int
    extra: dict[str, Any]
    arrays: Signature
    files: Checksums = field(default_factory=dict)


def write(record: CheckpointRecord, directory: Path) -> None:
    """Write the record into a checkpoint's directory, through to the disk."""
    body = json.dumps(asdict(record))
    with (directory / RECORD_FILE).open("w") as file:
        file.write(f"{zlib.crc32(body.encode()):08x}\n{body}\n")
        file.flush()
        os.fsync(file.fileno())


def read(directory: Path) -> CheckpointRecord:
    """The record of a checkpoint; a `DamageError` if it is missing or not as written."""
    try:
        checksum, body, _ = (directory / RECORD_FILE).read_text().split("\n")
        if int(checksum, 16) != zlib.crc32(body.encode()):
            raise DamageError(f"the checksum of {RECORD_FILE} is wrong")
        content = json.loads(body)
    except OSError as error:
        raise DamageError(f"{RECORD_FILE} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DamageError(f"{RECORD_FILE} is garbage") from error
    if not _is_record(content):
        raise DamageError(f"{RECORD_FILE} is not what a checkpoint says")
    arrays = {name: (dtype, tuple(shape)) for name, (dtype, shape) in content["arrays"].items()}
    return CheckpointRecord(content["step"], content["extra"], arrays, as_checksums(content["files"]))


def _is_record(content: Any) -> bool:
    """Whether a value of JSON has what a record has; a checksum that is right does not tell who wrote it."""
    if not isinstance(content, dict) or not {"step", "extra", "arrays", "files"} <= content.keys():
        return False
    arrays, files = content["arrays"], content["files"]
    if not all(isinstance(part, dict) for part in (content["extra"], arrays, files)) or not _are_counts(
        [content["step"]]
    ):
        return False
    of_array = (isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) for one in arrays.values())
    of_file = (isinstance(one, list) and len(one) == 2 and _are_counts(one) for one in files.values())
    return (
        all(of_array)
        and all(isinstance(one[1], list) and _are_counts(one[1]) for one in arrays.values())
        and all(of_file)
        and all(map(_is_inside, files))
    )


def _are_counts(values: list[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _is_inside(path: str) -> bool:
    """Whether a relative path is below the directory that it is in, by its words alone."""
    return bool(path) and not path.startswith("/") and "\0" not in path and not {".", ".."} & set(path.split("/"))


def as_checksums(read: dict[str, list[int]]) -> Checksums:
    """Checksums as JSON gives them back."""
    return {path: (size, crc) for path, (size, crc) in read.items()}


def checksums(directory: Path, *, within: str = ".", known: Checksums | None = None) -> Checksums:
    """Sizes and checksums of the files of `directory/within`, by path in `directory`; those in `known` are not read."""
    known = known or {}
    found = (str(path.relative_to(directory)) for path in (directory / within).rglob("*") if path.is_file())
    missing = [path for path in sorted(found) if path not in known and path not in _UNRECORDED]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return known | dict(zip(missing, pool.map(lambda path: _checksum(directory / path), missing), strict=True))


def verify(directory: Path, files: Checksums, *, share: int = 0, num_shares: int = 1) -> None:
    """Check sizes and checksums of one share of the files; a `DamageError` names the first bad file."""
    mine = sorted(files)[share::num_shares]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for path, reading in [(path, pool.submit(_checksum, directory / path)) for path in mine]:
            try:
                size, crc = reading.result()
            except OSError as error:
                raise DamageError(f"{path} cannot be read: {error.strerror}") from error
            if size != files[path][0]:
                raise DamageError(f"{path} has {size:,} bytes instead of {files[path][0]:,}")
            if crc != files[path][1]:
                raise DamageError(f"the checksum of {path} is wrong")


def _checksum(path: Path) -> tuple[int, int]:
    size, crc = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc
