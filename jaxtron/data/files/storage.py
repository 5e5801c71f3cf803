"""Files here or far away, read by ranges of bytes: a path, or a URL such as `gs://bucket/data.bin`."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import fsspec
import numpy as np
from jaxtyping import UInt8

from jaxtron.config import UserError, expand_home

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
Range = tuple[int, int]
"""First byte, and the one after the last."""


@runtime_checkable
class Bytes(Protocol):
    """A file's bytes; read by several threads at once."""

    name: str
    size: int

    def read(self, ranges: Sequence[Range]) -> list[UInt8[np.ndarray, "B"]]:
        """The bytes of each range, which lie within the file; read-only; UserError where they cannot be read."""
        ...


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


def open_bytes(path: str) -> Bytes:
    """A local file, memory-mapped, or a remote one; UserError names it if it cannot be read."""
    return RemoteBytes(path) if is_remote(path) else LocalBytes(path)


def cache_root(directory: str | None) -> Path:
    """Where what was made once is kept: the directory, or $XDG_CACHE_HOME/jaxtron, or ~/.cache/jaxtron."""
    if directory is not None:
        return Path(expand_home(directory))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxtron"


def local_copy(path: str, directory: Path) -> str:
    """A path of this machine with the file's bytes: itself, or its copy below `directory`, made if it is new."""
    if not is_remote(path):
        return path
    system, inner = _file_system(path)
    try:
        # the key follows the file's size, time and tag, so a changed file is copied anew
        key = hashlib.sha256(f"{path} {system.ukey(inner)}".encode()).hexdigest()[:32]
    except Exception as error:  # every file system raises its own
        raise _unreadable(path, error) from error
    copy = directory / "remote" / f"{key}{Path(inner).suffix}"
    if copy.is_file():
        return str(copy)
    aside = copy.with_name(f"{copy.name}.{uuid.uuid4().hex}.partial")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as output:
            _download(path, system, inner, output)
        aside.rename(copy)
    except OSError as error:
        raise UserError(
            f"cannot copy {path} to {copy.parent}: {error.strerror or error}; "
            "set the cache directory to a writable folder with room"
        ) from error
    finally:
        with suppress(OSError):
            aside.unlink()
    return str(copy)


class LocalBytes:
    """A file of this machine, memory-mapped."""

    def __init__(self, path: str):
        self.name = path
        try:
            self.size = os.stat(path).st_size
            # an empty file cannot be mapped; a plain view: slices of a memmap are several times slower
            self._content = np.asarray(np.memmap(path, np.uint8, mode="r")) if self.size else np.empty(0, np.uint8)
        except OSError as error:
            raise _unreadable(path, error) from error

    def read(self, ranges: Sequence[Range]) -> list[UInt8[np.ndarray, "B"]]:
        return [self._content[start:stop] for start, stop in ranges]


class RemoteBytes:
    """A file behind a URL; the ranges of one call are fetched together."""

    def __init__(self, path: str):
        self.name = path
        self._system, self._inner = _file_system(path)
        try:
            self.size = int(self._system.info(self._inner)["size"])
        except Exception as error:  # every file system raises its own
            raise _unreadable(path, error) from error

    def read(self, ranges: Sequence[Range]) -> list[UInt8[np.ndarray, "B"]]:
        # some stores refuse a range without bytes
        asked = [pair for pair in ranges if pair[1] > pair[0]]
        found = iter(self._fetch(asked) if asked else ())
        return [self._checked(next(found) if stop > start else b"", start, stop) for start, stop in ranges]

    def _fetch(self, ranges: Sequence[Range]) -> Sequence[bytes]:
        starts, stops = zip(*ranges, strict=True)
        try:
            parts = self._system.cat_ranges([self._inner] * len(ranges), list(starts), list(stops), on_error="return")
            # an exception may come in place of the bytes
            failed = next((part for part in parts if isinstance(part, Exception)), None)
        except Exception as error:  # every file system raises its own
            raise _unreadable(self.name, error) from error
        if failed is not None:
            raise _unreadable(self.name, failed) from failed
        return parts

    def _checked(self, content: bytes, start: int, stop: int) -> UInt8[np.ndarray, "B"]:
        if len(content) != stop - start:
            raise UserError(
                f"{self.name} gave {len(content)} of {stop - start} bytes from byte {start} on; "
                "it changed while it was read: start again"
            )
        return np.frombuffer(content, np.uint8)


def _file_system(path: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    protocol = path.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        hint = f'pip install "jaxtron[{extra}]"' if extra else "install the package it names"
        raise UserError(f"{path} needs a package that is missing ({error}); {hint}") from error
    except ValueError as error:
        raise UserError(f"{path} is of no known kind: {error}; use a local path, gs:// or s3://") from error


def _download(path: str, system: Any, inner: str, output: Any) -> None:
    try:
        source = system.open(inner, "rb")
    except Exception as error:  # every file system raises its own
        raise _unreadable(path, error) from error
    with source:
        shutil.copyfileobj(source, output, length=1 << 24)


def _unreadable(path: str, error: Exception) -> UserError:
    what = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return UserError(f"cannot read {path}: {what}; give PREFIX where PREFIX.bin and PREFIX.idx are readable files")
