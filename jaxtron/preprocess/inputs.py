"""Input files cut into chunks of whole lines, rows or texts, from any position on."""

import importlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from jaxtron.config import UserError
from jaxtron.data.files.decompress import read_blocks
from jaxtron.data.files.file_kind import CHAT_KEYS, FileKind, Kind, file_kind, token_prefix
from jaxtron.data.files.outputs import describe, without_outputs
from jaxtron.data.files.reader import few, repeated, walk

# of text handed to a worker at once: small beside a worker's memory, large beside the cost of handing it over
CHUNK_BYTES = 1 << 20
PARQUET_ROWS = 256


@dataclass(frozen=True)
class Position:
    """Where to read on: the file's number, the bytes (or rows) of it that are done, and its next line."""

    file: int = 0
    offset: int = 0
    line: int = 1


@dataclass(frozen=True)
class InputPiece:
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

    pieces: list[InputPiece]
    end: Position
    consumed: int


@dataclass(frozen=True)
class InputFile:
    """A file and what it is taken for."""

    path: Path
    taken_for: FileKind


def find_inputs(paths: Sequence[str], keys: Collection[str], say: Callable[[str], None]) -> list[InputFile]:
    """The files in the order given, a folder's in path order; `say` is told what is left out or read twice."""
    files: list[Path] = []
    for path in without_outputs([Path(name) for name in paths], say):
        if os.path.isdir(path):
            files += walk(path, say=say, alone=len(paths) == 1)
        elif os.path.isfile(path):
            _check_not_ours(path)
            files.append(path)
        else:
            raise UserError(f"no such file or folder {path}; give JSONL, Parquet or text to --input")
    if paths and not files:
        raise UserError(f"no files in --input {few(paths)} but what Jaxtron wrote; give files of documents")
    for note in repeated(files):
        say(note)
    return [InputFile(path, file_kind(path, keys)) for path in files]


def _check_not_ours(path: Path) -> None:
    """UserError for a file that one of our commands wrote, named by itself."""
    what = describe(path)
    if what == "token files":
        prefix = token_prefix(str(path))
        raise UserError(
            f"{path} is one of two token files, already tokenized; --data.path takes their prefix, {prefix}"
        )
    if what is not None:
        raise UserError(f"{path} is of {what}, not documents; give files of documents")


def taken_for(files: Sequence[InputFile]) -> list[str]:
    """A line for each kind of file there is: what they are read as, and how that was found."""
    names: dict[str, list[str]] = {}
    words = {"lines": "JSON lines", "rows": "Parquet", "text": "text, one document a file"}
    for file in files:
        found = file.taken_for
        by = "content" if found.by_content else "name"
        names.setdefault(f"{words[found.kind]} (by {by})", []).append(file.path.name)
    return [f"{what}: {few(found)}" for what, found in names.items()]


def read_chunks(files: Sequence[InputFile], start: Position, keys: Sequence[str]) -> Iterator[Chunk]:
    """Chunks of about CHUNK_BYTES from a position on, as often as there is something there; `UserError` for damage."""
    pieces: list[InputPiece] = []
    size = before = 0
    for number, file in enumerate(files):
        path = file.path
        try:
            file_size = path.stat().st_size
            if number >= start.file:
                position = start if number == start.file else Position(number)
                for piece, piece_size, end, read in _read_file(file, position, keys):
                    pieces.append(piece)
                    size += piece_size
                    if size >= CHUNK_BYTES:
                        yield Chunk(pieces, end, before + read)
                        pieces, size = [], 0
            before += file_size
        except OSError as error:
            raise UserError(
                f"cannot read {path}: {error.strerror or error}; make it readable or leave it out"
            ) from error
    if pieces:
        yield Chunk(pieces, Position(len(files)), before)


def _read_file(
    file: InputFile, position: Position, keys: Sequence[str]
) -> Iterator[tuple[InputPiece, int, Position, int]]:
    """Each piece, its size, the position after it and the bytes of the file that were read for it."""
    path, kind = file.path, file.taken_for.kind
    if kind == "rows":
        yield from _read_rows(path, position, keys)
        return
    with path.open("rb") as raw:
        blocks = _blocks(file, raw, position.offset)
        if kind == "text":
            content = b"".join(blocks)
            # the cost of a file, so that a million empty ones are not one chunk
            yield InputPiece(str(path), kind, 1, content), len(content) + 1024, Position(position.file + 1), raw.tell()
            return
        offset, line = position.offset, position.line
        for content in _whole_lines(blocks):
            piece = InputPiece(str(path), kind, line, content)
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


def _blocks(file: InputFile, raw: BinaryIO, offset: int) -> Iterator[bytes]:
    """The file's bytes, decompressed, after the first `offset` of them."""
    if file.taken_for.compression is None:
        raw.seek(offset)
        offset = 0
    for block in read_blocks(file.path, raw, file.taken_for.compression, size=CHUNK_BYTES):
        # decompressing again what was done costs little beside tokenizing it
        if offset < len(block):
            yield block[offset:]
        offset = max(0, offset - len(block))


def _read_rows(path: Path, position: Position, keys: Sequence[str]) -> Iterator[tuple[InputPiece, int, Position, int]]:
    parquet, pyarrow = _import("pyarrow.parquet", path), _import("pyarrow", path)
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [key for key in keys if key not in names]
            if missing:
                mend = "set --json-key"
                if not CHAT_KEYS.isdisjoint(names):
                    mend += ", or train on conversations by --data.format chat, once converted to JSON lines"
                raise UserError(f"{path} has no column {missing[0]!r}, only {', '.join(names)}; {mend}")
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
                    rows = list(zip(*(column_values(batch.column(key)) for key in keys), strict=True))
                    piece = InputPiece(str(path), "rows", first + 1, rows)
                    yield piece, batch.nbytes, Position(position.file, done, done + 1), size * done // num_rows
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from error


def column_values(column: Any) -> list[Any]:
    """The values of a column of Parquet; a string that is not UTF-8 stays bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_text_or_bytes(value) for value in column.cast("large_binary").to_pylist()]


def _text_or_bytes(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def _import(package: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f'{path} needs the package {package} ({error}): pip install "jaxtron[parquet]"') from error
