"""Compressed files as blocks of what is in them; one that is damaged, cut short or followed by rubbish is an error."""

import gzip
import importlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from jaxtron.config import UserError

# of compressed data read at once: zeros grow a thousandfold
COMPRESSED_BYTES = 1 << 15
BLOCK_BYTES = 1 << 20
EXTRAS = {"zstandard": "zstd"}


def read_blocks(path: Path, raw: BinaryIO, compression: str | None, *, size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """The content of a file that is open at its start, in blocks of about `size` bytes.

    `compression` is `gz`, `bz2`, `xz`, `zst` or none. UserError, with the path, for damage or a missing package.
    """
    if compression is None:
        while block := raw.read(size):
            yield block
        return
    readers = {"gz": _gzip_blocks, "bz2": _bz2_blocks, "xz": _xz_blocks, "zst": _zstandard_blocks}
    try:
        yield from readers[compression](path, raw, size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from error


def _gzip_blocks(path: Path, raw: BinaryIO, size: int) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw) as stream:
        while block := stream.read(size):
            yield block


def _bz2_blocks(path: Path, raw: BinaryIO, size: int) -> Iterator[bytes]:
    bz2 = _import("bz2", path)
    try:
        yield from _streams(raw, bz2.BZ2Decompressor, size)
    except OSError as error:
        # the disk's errors have a number
        raise error if error.errno else _damaged(path, error) from error


def _xz_blocks(path: Path, raw: BinaryIO, size: int) -> Iterator[bytes]:
    lzma = _import("lzma", path)
    try:
        yield from _streams(raw, lzma.LZMADecompressor, size)
    except lzma.LZMAError as error:
        raise _damaged(path, error) from error


def _streams(raw: BinaryIO, new: Callable[[], Any], size: int) -> Iterator[bytes]:
    """Streams one after the other, perhaps with zeros between.

    The library's own readers pass over rubbish at the end.
    """
    rest = raw.read(COMPRESSED_BYTES)
    while rest:
        stream = new()
        while not stream.eof:
            if stream.needs_input and not rest:
                rest = raw.read(COMPRESSED_BYTES)
                if not rest:
                    raise EOFError("it ends within its compressed data")
            yield stream.decompress(rest, size)
            rest = b""
        rest = stream.unused_data.lstrip(b"\0")
        while not rest and (block := raw.read(COMPRESSED_BYTES)):
            rest = block.lstrip(b"\0")


def _zstandard_blocks(path: Path, raw: BinaryIO, size: int) -> Iterator[bytes]:
    """Frame by frame: the library's own stream reader takes a file cut short for a whole one."""
    zstandard = _import("zstandard", path)
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame, rest = decompressor.decompressobj(), b""
    within = False
    try:
        while compressed := rest or raw.read(COMPRESSED_BYTES):
            yield frame.decompress(compressed)
            within, rest = not frame.eof, frame.unused_data
            if frame.eof:
                frame = decompressor.decompressobj()
    except zstandard.ZstdError as error:
        raise _damaged(path, error) from error
    if within:
        raise EOFError("it ends within a frame")


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or cut short: {error}; copy or make it again")


def _import(package: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        mend = f'pip install "jaxtron[{EXTRAS[package]}]"' if package in EXTRAS else "take a Python built with it"
        raise UserError(f"{path} needs the package {package} ({error}): {mend}") from error
