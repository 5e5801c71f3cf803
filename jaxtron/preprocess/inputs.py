"""Input files cut into chunks of whole lines, rows or texts, from any position on."""

import gzip
import importlib
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal

from jaxtron.config import UserError

# of text handed to a worker at once: small beside a worker's memory, large beside the cost of handing it over
CHUNK_BYTES = 1 << 20
# of compressed data: zeros grow a thousandfold
COMPRESSED_BYTES = 1 << 15
PARQUET_ROWS = 256
COMPRESSED = (".gz", ".zst")
LINES = (".jsonl", ".json", ".ndjson")

Kind = Literal["lines", "rows", "text"]


@dataclass(frozen=True)
class Position:
    """Where to read on: the file's number, the bytes (or rows) of it that are done, and its next line."""

    file: int = 0
    offset: int = 0
    line: int = 1


@dataclass(frozen=True)
class Piece:
    """Part of one file: whole lines of JSON, rows of Parquet (a tuple a row, a value a key), or a whole text.

    `first` is the number of its first line or row in the file, from 1.
    """

    path: str
    kind: Kind
    first: int
    content: Any


@dataclass(frozen=True)
class Chunk:
    """Pieces in order, the position after them, and the bytes of all input files that lie before it."""

    pieces: list[Piece]
    end: Position
    consumed: int


def find_inputs(paths: Sequence[str]) -> list[Path]:
    """The files in the order given; a folder stands for its files in path order, without hidden ones."""
    files: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if os.path.isdir(path):
            found = (Path(folder, file) for folder, _, names in os.walk(path) for file in names)
            inside = sorted(file for file in found if not _is_hidden(file.relative_to(path)) and file.is_file())
            if not inside:
                raise UserError(f"the folder {path} has no files; give files or folders of text to --input")
            files += inside
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise UserError(f"no such file or folder {path}; give JSONL, Parquet or text to --input")
    return files


def kind_of(path: Path) -> Kind:
    """How a file is read, by its name without .gz or .zst."""
    suffix = (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix
    if suffix == ".parquet":
        return "rows"
    return "lines" if suffix in LINES else "text"


def read_chunks(files: Sequence[Path], start: Position, keys: Sequence[str]) -> Iterator[Chunk]:
    """Chunks of about CHUNK_BYTES from a position on, as often as there is something there; `UserError` for damage."""
    pieces: list[Piece] = []
    size = before = 0
    for number, path in enumerate(files):
        try:
            file_size = path.stat().st_size
            if number >= start.file:
                position = start if number == start.file else Position(number)
                for piece, piece_size, end, read in _read_file(path, position, keys):
                    pieces.append(piece)
                    size += piece_size
                    if size >= CHUNK_BYTES:
                        yield Chunk(pieces, end, before + read)
                        pieces, size = [], 0
            before += file_size
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is damaged or cut short: {error}; copy or make it again") from error
        except OSError as error:
            raise UserError(
                f"cannot read {path}: {error.strerror or error}; make it readable or leave it out"
            ) from error
    if pieces:
        yield Chunk(pieces, Position(len(files)), before)


def _read_file(path: Path, position: Position, keys: Sequence[str]) -> Iterator[tuple[Piece, int, Position, int]]:
    """Each piece, its size, the position after it and the bytes of the file that were read for it."""
    kind = kind_of(path)
    if kind == "rows":
        yield from _read_rows(path, position, keys)
        return
    with path.open("rb") as raw:
        blocks = _blocks(path, raw, position.offset)
        if kind == "text":
            content = b"".join(blocks)
            # the cost of a file, so that a million empty ones are not one chunk
            yield Piece(str(path), kind, 1, content), len(content) + 1024, Position(position.file + 1), raw.tell()
            return
        offset, line = position.offset, position.line
        for content in _whole_lines(blocks):
            piece = Piece(str(path), kind, line, content)
            offset += len(content)
            line += content.count(b"\n")
            yield piece, len(content), Position(position.file, offset, line), raw.tell()


def _whole_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks' bytes cut at line ends, about CHUNK_BYTES each; the last line may lack its end."""
    held: list[bytes] = []
    size = 0
    for block in blocks:
        held.append(block)
        size += len(block)
        cut = block.rfind(b"\n") + 1
        if size >= CHUNK_BYTES and cut:
            held[-1] = block[:cut]
            yield b"".join(held)
            held, size = [block[cut:]], len(block) - cut
    if size:
        yield b"".join(held)


def _blocks(path: Path, raw: BinaryIO, offset: int) -> Iterator[bytes]:
    """The file's bytes, decompressed, after the first `offset` of them."""
    if path.suffix not in COMPRESSED:
        raw.seek(offset)
        while block := raw.read(CHUNK_BYTES):
            yield block
        return
    for block in _gzip_blocks(raw) if path.suffix == ".gz" else _zstandard_blocks(path, raw):
        # decompressing again what was done costs little beside tokenizing it
        if offset < len(block):
            yield block[offset:]
        offset = max(0, offset - len(block))


def _gzip_blocks(raw: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw) as stream:
        while block := stream.read(CHUNK_BYTES):
            yield block


def _zstandard_blocks(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: the library's own stream reader takes a file cut short for a whole one."""
    zstandard = _import("zstandard", "zstd", path)
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
        raise UserError(f"{path} is damaged or cut short: {error}; copy or make it again") from error
    if within:
        raise UserError(f"{path} is damaged or cut short: it ends within a frame; copy or make it again")


def _read_rows(path: Path, position: Position, keys: Sequence[str]) -> Iterator[tuple[Piece, int, Position, int]]:
    parquet, pyarrow = _import("pyarrow.parquet", "parquet", path), _import("pyarrow", "parquet", path)
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [key for key in keys if key not in names]
            if missing:
                raise UserError(f"{path} has no column {missing[0]!r}, only {', '.join(names)}; set --json-key")
            done, size, num_rows = 0, path.stat().st_size, max(file.metadata.num_rows, 1)
            for group in range(file.metadata.num_row_groups):
                group_rows = file.metadata.row_group(group).num_rows
                if done + group_rows <= position.offset:
                    done += group_rows
                    continue
                for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=[group], columns=list(keys)):
                    first = done
                    done += batch.num_rows
                    if done <= position.offset:
                        continue
                    rows = list(zip(*(batch.column(key).to_pylist() for key in keys), strict=True))
                    piece = Piece(str(path), "rows", first + 1, rows)
                    yield piece, batch.nbytes, Position(position.file, done, done + 1), size * done // num_rows
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from error


def _import(package: str, extra: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f'{path} needs the package {package} ({error}): pip install "jaxtron[{extra}]"') from error


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
