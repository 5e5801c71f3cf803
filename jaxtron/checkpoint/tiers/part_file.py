"""A part of a state as one file: a head that says what it is, then the bytes of its pieces, each with a checksum.

Nothing of it is executed or unpickled. A file is whole or not there: it gets its name once all of it is written.
"""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxtron.checkpoint.record import DamageError

# by names: an array's, and where in it the piece lies
Pieces = Mapping[str, Shaped[np.ndarray, "..."]]
TEMPORARY = ".tmp"


@dataclass(frozen=True)
class PartHead:
    """Of which run, step and process a part is, what the step's checkpoint would say, and the arrays' layout."""

    run: str
    step: int
    process: int
    num_processes: int
    layout: str
    extra: dict[str, Any]
    pieces: tuple[tuple[str, str, tuple[int, ...], int], ...] = ()
    """Name, type, shape and CRC-32 of each, in the order of their bytes."""


def write_part(path: Path, head: PartHead, pieces: Pieces, *, synced: bool) -> None:
    """Write it, through to the disk if `synced`; an `OSError` leaves nothing."""
    rows = tuple(
        (name, str(piece.dtype), piece.shape, zlib.crc32(_bytes(piece))) for name, piece in sorted(pieces.items())
    )
    body = json.dumps(asdict(head) | {"pieces": rows}).encode()
    scratch = path.with_name(path.name + TEMPORARY)
    try:
        with scratch.open("wb") as file:
            file.write(b"%08x %d\n" % (zlib.crc32(body), len(body)))
            file.write(body)
            for name, *_ in rows:
                file.write(_bytes(pieces[name]))
            if synced:
                file.flush()
                os.fsync(file.fileno())
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def read_head(path: Path) -> PartHead:
    """What a file says of itself; a `DamageError` where it is no such file, or not all of it."""
    return _read_head(path)[0]


def read_part(path: Path) -> tuple[PartHead, dict[str, Shaped[np.ndarray, "..."]]]:
    """Head and pieces; a `DamageError` that names the first piece which is not as it was written."""
    head, start = _read_head(path)
    pieces = {}
    try:
        with path.open("rb") as file:
            file.seek(start)
            for name, kind, shape, crc in head.pieces:
                dtype = jnp.dtype(kind)
                piece = np.empty(shape, dtype)
                file.readinto(_bytes(piece))
                if zlib.crc32(_bytes(piece)) != crc:
                    raise DamageError(f"the checksum of {name} in {path.name} is wrong")
                pieces[name] = piece
    except (OSError, ValueError, TypeError) as error:
        raise DamageError(f"{path.name} cannot be read: {error}") from error
    return head, pieces


def _read_head(path: Path) -> tuple[PartHead, int]:
    try:
        with path.open("rb") as file:
            crc, _, size = file.readline(40).partition(b" ")
            body = file.read(min(int(size), path.stat().st_size))
            start = file.tell()
        if len(body) != int(size) or zlib.crc32(body) != int(crc, 16):
            raise DamageError(f"the head of {path.name} is damaged")
        content = json.loads(body)
        rows = tuple((name, kind, tuple(shape), crc) for name, kind, shape, crc in content.pop("pieces"))
        head = PartHead(**content, pieces=rows)
        length = start + sum(jnp.dtype(kind).itemsize * int(np.prod(shape)) for _, kind, shape, _ in rows)
        if length != path.stat().st_size:
            raise DamageError(f"{path.name} has {path.stat().st_size:,} bytes instead of {length:,}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DamageError(f"{path.name} cannot be read: {error}") from error
    return head, start


def _bytes(piece: Shaped[np.ndarray, "..."]) -> memoryview:
    """The bytes of an array where they are; it must be contiguous."""
    return memoryview(piece.reshape(-1).view(np.uint8))
