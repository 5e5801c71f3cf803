"""Records in pieces of files, with their raw lines, and files written in whole or not at all."""

import gzip
import importlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jaxtron.config import UserError
from jaxtron.curate import rows
from jaxtron.data.files.file_kind import FileKind
from jaxtron.preprocess.documents import Damage, is_blank, read_documents
from jaxtron.preprocess.inputs import InputFile, Position, read_chunks

try:
    import zstandard
except ImportError:
    zstandard = None


@dataclass(frozen=True)
class FilePart:
    """What one task works on: whole lines of a plain file from byte `start` to `end`, or a whole file (end is none)."""

    number: int
    path: str
    taken_for: FileKind
    start: int = 0
    end: int | None = None

    @property
    def has_rows(self) -> bool:
        """Whether it is Parquet."""
        return self.taken_for.kind == "rows"

    @property
    def output_name(self) -> str:
        """`00012-news.jsonl.gz`: its number, then the input's name; names sort in the order of the input."""
        return f"{self.number:05d}-{Path(self.path).name}"


@dataclass(frozen=True)
class Record:
    """One document: its text (or what is wrong with it), its raw line if it has one, and its number in its part."""

    line: int
    text: str
    raw: bytes
    damage: str | None = None


def find_parts(files: Sequence[InputFile], part_bytes: int) -> list[FilePart]:
    """The inputs in order, large plain files in parts of about so many bytes; UserError for what cannot be read."""
    parts: list[FilePart] = []
    for file in files:
        path, found = file.path, file.taken_for
        if found.kind == "text":
            how = "content" if found.by_content else "name"
            raise UserError(
                f"{path} is text by its {how}; curate reads JSON lines (also .gz, .bz2, .xz, .zst) and Parquet"
            )
        if found.compression == "zst" and zstandard is None:
            raise UserError(f'{path} needs zstandard; pip install "jaxtron[zstd]"')
        if found.kind == "rows":
            rows.require(path)
        whole = found.kind == "rows" or found.compression is not None
        ends = [None] if whole else _line_ends(path, part_bytes)
        for start, end in zip([0, *ends], ends, strict=False):
            parts.append(FilePart(len(parts), str(path), found, start or 0, end))
    return parts


def _line_ends(path: Path, part_bytes: int) -> list[int]:
    """The first line end at or after every `part_bytes`, the file's end the last."""
    size, ends = path.stat().st_size, [0]
    try:
        with path.open("rb") as file:
            while ends[-1] + part_bytes < size:
                file.seek(ends[-1] + part_bytes - 1)
                file.readline()
                ends.append(file.tell())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; make it readable or leave it out") from error
    return [*ends[1:], size] if ends[-1] < size or size == 0 else ends[1:]


def read_records(part: FilePart, text_field: str) -> Iterator[Record]:
    """Every document of a part in order; `line` counts lines, or rows of Parquet, from 1 at the part's first."""
    offset = part.start
    for chunk in read_chunks([InputFile(Path(part.path), part.taken_for)], Position(0, part.start, 1), [text_field]):
        for piece in chunk.pieces:
            if piece.kind == "lines" and part.end is not None:
                content = piece.content[: part.end - offset]
                offset += len(piece.content)
                piece = type(piece)(piece.path, piece.kind, piece.first, content)
            raw = _raw_lines(piece.content, piece.first) if piece.kind == "lines" else _row_numbers(piece)
            for (line, entry), document in zip(raw, read_documents(piece, [text_field]), strict=True):
                if isinstance(document, Damage):
                    yield Record(line, "", entry, document.reason)
                else:
                    yield Record(line, document[0], entry)
        if part.end is not None and offset >= part.end:
            return


def _raw_lines(content: bytes, first: int) -> Iterator[tuple[int, bytes]]:
    for line, entry in enumerate(content.split(b"\n"), start=first):
        if not is_blank(entry):
            yield line, entry


def _row_numbers(piece: Any) -> Iterator[tuple[int, bytes]]:
    for line in range(piece.first, piece.first + len(piece.content)):
        yield line, b""


def count_lines(path: str, start: int, end: int) -> int:
    """Line ends from one byte of a file to another."""
    with open(path, "rb") as file:
        file.seek(start)
        left, lines = end - start, 0
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def record_id(record: Record, id_field: str) -> Any:
    """The value of a record's id field, or none."""
    try:
        return json.loads(record.raw).get(id_field)
    except (ValueError, AttributeError, RecursionError):
        return None


def with_text(record: Record, text_field: str, id_field: str, text: str, part: int | None) -> bytes:
    """A record's line with another text; a text id gets `-0`, `-1`, ... where the document became several."""
    fields = json.loads(record.raw)
    fields[text_field] = text
    if part is not None and isinstance(fields.get(id_field), str):
        fields[id_field] += f"-{part}"
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")


@contextmanager
def written_whole(path: Path, compression: str | None = None) -> Iterator[BinaryIO]:
    """A file that appears under its name, compressed, when the block is left without an error."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with aside.open("wb") as raw:
            if compression == "gz":
                # no time or name inside: the same documents are the same bytes
                with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as stream:
                    yield stream  # pyright: ignore[reportReturnType]
            elif compression in ("bz2", "xz"):
                library = importlib.import_module({"bz2": "bz2", "xz": "lzma"}[compression])
                with library.open(raw, "wb") as stream:
                    yield stream
            elif compression == "zst":
                with zstandard.ZstdCompressor().stream_writer(raw, closefd=False) as stream:  # pyright: ignore
                    yield stream
            else:
                yield raw
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under its name when whole."""
    with written_whole(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
