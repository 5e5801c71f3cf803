"""What a piece of input says: one text a key for each document, or what is wrong with it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtron.data.file_kind import BYTE_ORDER_MARK, NOT_LINES
from jaxtron.data.files import decode_text
from jaxtron.preprocess.inputs import Piece

MOST_KEYS_SHOWN = 5


@dataclass(frozen=True)
class Damage:
    """Why a line, row or file is no document; `str()` names the place."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def read_documents(piece: Piece, keys: Sequence[str]) -> Iterator[Any]:
    """Each document's texts (a tuple, one a key) or Damage, in order; blank lines are nothing."""
    if piece.kind == "text":
        yield _read_text(piece)
        return
    unit = "line" if piece.kind == "lines" else "row"
    entries = piece.content.split(b"\n") if piece.kind == "lines" else piece.content
    for number, entry in enumerate(entries, start=piece.first):
        if piece.kind == "lines" and is_blank(entry):
            continue
        values = _read_line(entry, keys) if piece.kind == "lines" else entry
        reason = values if isinstance(values, str) else _wrong_text(values, keys)
        yield values if reason is None else Damage(f"{piece.path} {unit} {number}", reason)


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing, but perhaps the mark of UTF-8 that begins some files."""
    return not line.removeprefix(BYTE_ORDER_MARK).strip()


def _read_text(piece: Piece) -> tuple[str] | Damage:
    try:
        return (decode_text(piece.content),)
    except ValueError as error:
        return Damage(piece.path, str(error))


def _read_line(line: bytes, keys: Sequence[str]) -> tuple[Any, ...] | str:
    """The values of the keys, or the reason why there are none."""
    try:
        entry = json.loads(line.removeprefix(BYTE_ORDER_MARK).decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason} at byte {error.start} of the line"
    except (ValueError, RecursionError) as error:
        if line.strip() in (b"[", b"{"):
            return NOT_LINES
        return f"not JSON: {error}"
    if not isinstance(entry, dict):
        return f"a JSON {_kind(entry)}, not an object such as {{{json.dumps(keys[0])}: ...}}"
    for key in keys:
        if key not in entry:
            shown = ", ".join(repr(name) for name in list(entry)[:MOST_KEYS_SHOWN])
            more = ", ..." if len(entry) > MOST_KEYS_SHOWN else ""
            return f"no key {key!r}, only {shown}{more}" if entry else f"no key {key!r}, the object is empty"
    return tuple(entry[key] for key in keys)


def _wrong_text(texts: tuple[Any, ...], keys: Sequence[str]) -> str | None:
    """Why one of the values cannot be tokenized."""
    for key, text in zip(keys, texts, strict=True):
        if not isinstance(text, str):
            return f"{key!r} is a {_kind(text)}, not a string"
        try:
            # JSON can spell half of a pair of surrogates, which is no character
            if not text.isascii():
                text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"{key!r} has half of a surrogate pair, {text[error.start]!a}, as character {error.start}"
    return None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bytes: "binary value",
        bool: "boolean",
        int: "number",
        float: "number",
        list: "list",
        dict: "object",
        str: "string",
    }
    return names.get(type(value), type(value).__name__)
