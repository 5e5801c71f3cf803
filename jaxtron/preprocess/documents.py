"""What a piece of input says: one text a key for each document, or what is wrong with it."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtron.data.files.file_kind import BYTE_ORDER_MARK, CHAT_KEYS, NOT_LINES
from jaxtron.data.files.reader import CONVERT, NotTextError, decode_text
from jaxtron.preprocess.inputs import InputPiece

MOST_KEYS_SHOWN = 5
CHAT_MEND = "train on conversations without preprocess, by --data.format chat"


@dataclass(frozen=True)
class Damage:
    """Why a line, row or file is no document; `str()` names the place.

    `mend` is what to do about it, "" where the reason says so; `by_key`: another key may be the right one.
    """

    place: str
    reason: str
    mend: str = "mend it"
    by_key: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def read_documents(piece: InputPiece, keys: Sequence[str]) -> Iterator[Any]:
    """Each document's texts (a tuple, one a key) or Damage, in order; blank lines are nothing."""
    if piece.kind == "text":
        yield _read_text(piece)
        return
    unit = "line" if piece.kind == "lines" else "row"
    entries = piece.content.split(b"\n") if piece.kind == "lines" else piece.content
    for number, entry in enumerate(entries, start=piece.first):
        if piece.kind == "lines" and is_blank(entry):
            continue
        place = f"{piece.path} {unit} {number}"
        values = _read_line(entry, keys, place) if piece.kind == "lines" else entry
        yield values if isinstance(values, Damage) else (_wrong_text(values, keys, place) or values)


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing, but perhaps the mark of UTF-8 that begins some files."""
    return not line.removeprefix(BYTE_ORDER_MARK).strip()


def _read_text(piece: InputPiece) -> tuple[str] | Damage:
    try:
        return (decode_text(piece.content),)
    except NotTextError as error:
        return Damage(piece.path, str(error), error.mend)


def _read_line(line: bytes, keys: Sequence[str], place: str) -> tuple[Any, ...] | Damage:
    """The values of the keys, or why there are none."""
    try:
        entry = json.loads(line.removeprefix(BYTE_ORDER_MARK).decode("utf-8"))
    except UnicodeDecodeError as error:
        return Damage(place, f"not UTF-8: {error.reason} at byte {error.start} of the line", CONVERT)
    except (ValueError, RecursionError) as error:
        if line.strip() in (b"[", b"{"):
            return Damage(place, NOT_LINES, "")
        return Damage(place, f"not JSON: {error}")
    if not isinstance(entry, dict):
        return Damage(place, f"a JSON {_kind(entry)}, not an object such as {{{json.dumps(keys[0])}: ...}}")
    for key in keys:
        if key not in entry:
            shown = ", ".join(repr(name) for name in list(entry)[:MOST_KEYS_SHOWN])
            more = ", ..." if len(entry) > MOST_KEYS_SHOWN else ""
            reason = f"no key {key!r}, only {shown}{more}" if entry else f"no key {key!r}, the object is empty"
            return Damage(place, reason, mend_of(entry), by_key=bool(entry))
    return tuple(entry[key] for key in keys)


def mend_of(keys: Collection[str]) -> str:
    """What to do about an entry with other keys than the right one."""
    return "mend it" if CHAT_KEYS.isdisjoint(keys) else CHAT_MEND


def _wrong_text(texts: tuple[Any, ...], keys: Sequence[str], place: str) -> Damage | None:
    """Why one of the values cannot be tokenized."""
    for key, text in zip(keys, texts, strict=True):
        if not isinstance(text, str):
            mend = mend_of([key]) if isinstance(text, list) else "mend it"
            return Damage(place, f"{key!r} is a {_kind(text)}, not a string", mend, by_key=True)
        try:
            # JSON can spell half of a pair of surrogates, which is no character
            if not text.isascii():
                text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"{text[error.start]!a}, as character {error.start}"
            return Damage(place, f"{key!r} has half of a surrogate pair, {half}")
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
