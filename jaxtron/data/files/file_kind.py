"""What a file is taken for: JSON lines, Parquet or text, compressed or not; by its name, else by its content."""

import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxtron.config import UserError
from jaxtron.data.files.decompress import read_blocks

Kind = Literal["lines", "rows", "text"]
# endings, in any case; names with another are judged by their content
KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".jsonlines": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".parquet": "rows",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSIONS = {
    ".gz": "gz",
    ".gzip": "gz",
    ".bz2": "bz2",
    ".xz": "xz",
    ".lzma": "xz",
    ".zst": "zst",
    ".zstd": "zst",
}
MAGICS = {
    b"\x1f\x8b\x08": "gz",
    b"BZh91AY&SY": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zst",
}
ARCHIVES = {
    ".zip": "a zip archive",
    ".tar": "a tar archive",
    ".tgz": "a tar archive",
    ".tbz2": "a tar archive",
    ".txz": "a tar archive",
    ".7z": "a 7z archive",
    ".rar": "a rar archive",
    ".lz4": "compressed with lz4",
    ".lzo": "compressed with lzo",
}
ARCHIVE_MAGICS = {
    b"PK\x03\x04": ".zip",
    b"7z\xbc\xaf\x27\x1c": ".7z",
    b"Rar!\x1a\x07": ".rar",
    b"\x04\x22\x4d\x18": ".lz4",
}
# of Megatron's .idx
INDEX_MAGIC = b"MMIDIDX\0\0"
TOKEN_FILES = (".idx", ".bin")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# where documents usually have their text: a single line with one of these is a file of JSON lines
TEXT_KEYS = frozenset(("text", "content", "messages", "conversations", "instruction"))
# of those the ones of conversations
CHAT_KEYS = TEXT_KEYS - {"text", "content"}
# said of a first line that is only this
NOT_LINES = "the start of one JSON value over several lines, not an object a line; convert it (jq -c '.[]' for a list)"
HEAD_BYTES = 1 << 16
LINES_JUDGED = 10
OBJECT_START = re.compile(rb'\{\s*"(?:[^"\\]|\\.)*"\s*:')


@dataclass(frozen=True)
class FileKind:
    """What a file holds, how it is compressed (`gz`, `bz2`, `xz`, `zst` or none), and whether its content told."""

    kind: Kind
    compression: str | None = None
    by_content: bool = False


def file_kind(path: Path, keys: Collection[str] = TEXT_KEYS) -> FileKind:
    """What a file is taken for; UserError for an archive, and for what cannot be read.

    Where the name does not say, it is JSON lines if most of its first lines are JSON objects; a single one needs one of
    the keys.
    """
    compression = compression_of(path)
    kind = KINDS.get(ending(path))
    by_content = kind is None
    if kind is None:
        head = read_head(path, compression)
        if head.startswith(b"PAR1"):
            kind = "rows"
        else:
            kind = "lines" if is_json_lines(head, keys) else "text"
    if kind == "rows" and compression is not None:
        raise UserError(f"{path} is Parquet compressed once more, which is not read; decompress it first")
    return FileKind(kind, compression, by_content)


def token_prefix(name: str) -> str:
    """The prefix of a pair of token files, which a person may name by one of the two."""
    return name[:-4] if name.endswith(TOKEN_FILES) and os.path.basename(name) not in TOKEN_FILES else name


def ending(path: Path) -> str:
    """The end of a name that says what is in it, in lower case: `.jsonl` of `A.JSONL.gz`."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def compression_of(path: Path) -> str | None:
    """How a file is compressed, by its name, else by its first bytes; UserError for an archive."""
    compression, name = COMPRESSIONS.get(path.suffix.lower()), ending(path)
    archive = name if name in ARCHIVES else None
    if name not in KINDS and compression is None and archive is None:
        start = read_head(path, None, size=512)
        archive = next((name for magic, name in ARCHIVE_MAGICS.items() if start.startswith(magic)), None)
        archive = ".tar" if start[257:262] == b"ustar" else archive
        compression = next((name for magic, name in MAGICS.items() if start.startswith(magic)), None)
    if archive is not None:
        mend = "unpack it" if "archive" in ARCHIVES[archive] else "decompress it, or use .gz, .bz2, .xz or .zst"
        raise UserError(f"{path} is {ARCHIVES[archive]}, which is not read; {mend}")
    return compression


def read_head(path: Path, compression: str | None, *, size: int = HEAD_BYTES + 1) -> bytes:
    """The first bytes of a file's content, no fewer than `size` if it has so many; UserError if it does not read."""
    head = b""
    try:
        with path.open("rb") as raw:
            for block in read_blocks(path, raw, compression, size=size):
                head += block
                if len(head) >= size:
                    break
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; make it readable or leave it out") from error
    return head


def is_json_lines(head: bytes, keys: Collection[str] = TEXT_KEYS, *, least: int = 1) -> bool:
    """Whether a file that begins so is JSON lines: most of its first lines, of which there are at least so many."""
    lines = [line for line in head.removeprefix(BYTE_ORDER_MARK).split(b"\n") if line.strip()]
    if len(head) > HEAD_BYTES and len(lines) == 1:
        # a line that is cut here, and that no text has
        return bool(OBJECT_START.match(lines[0].strip()))
    # the last one may be cut
    lines = lines[:-1] if len(head) > HEAD_BYTES else lines
    found = [_object(line) for line in lines[:LINES_JUDGED]]
    objects = [value for value in found if value is not None]
    if len(found) == least == 1:
        return bool(objects) and not objects[0].keys().isdisjoint(keys)
    return len(found) >= least and 2 * len(objects) > len(found)


def _object(line: bytes) -> dict | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
