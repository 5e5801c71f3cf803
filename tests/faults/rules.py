"""What a rule could tell of a damaged file, by readers that share nothing with the program's.

Each gives a reason for which the file must be refused, or None where nothing but a checksum that the format lacks could
tell it from a good one.
"""

import base64
import binascii
import json
import struct
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import yaml

from jaxtron.config import settings
from jaxtron.run.configuration import Configuration

Rule = Callable[[Path], str | None]

MARK = b"\xef\xbb\xbf"
WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class Twice(ValueError):
    """A key is there twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Twice
    return found


def any_json(path: Path) -> str | None:
    """A JSON object, as readers take it that keep the last of two equal keys."""
    try:
        found = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error!r}"
    return None if isinstance(found, dict) else "no JSON object"


def json_object(path: Path) -> str | None:
    """A JSON object whose keys are each there once."""
    try:
        found = json.loads(path.read_bytes().decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        return f"no JSON of keys that are there once: {error!r}"
    return None if isinstance(found, dict) else "no JSON object"


def documents(path: Path) -> str | None:
    """Lines that are blank, or JSON objects with a `text` that can be written as UTF-8."""
    for number, line in enumerate(path.read_bytes().split(b"\n")):
        line = line.removeprefix(MARK)
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode())["text"]
            assert isinstance(text, str)
            text.encode()
        except (ValueError, RecursionError, LookupError, TypeError, AssertionError) as error:
            return f"line {number}: {error!r}"
    return None


def json_lines(path: Path) -> str | None:
    """Lines that are blank or JSON."""
    for number, line in enumerate(path.read_bytes().split(b"\n")):
        try:
            _ = line.removeprefix(MARK).strip() and json.loads(line.removeprefix(MARK).decode())
        except (ValueError, RecursionError) as error:
            return f"line {number}: {error!r}"
    return None


def token_files(prefix: Path, vocabulary: int | None) -> str | None:
    """A pair of Megatron's files whose lengths, places and documents agree, with ids below `vocabulary` (none: any)."""
    index, tokens = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    if len(index) < 34 or index[:9] != b"MMIDIDX\0\0" or struct.unpack("<Q", index[9:17])[0] != 1:
        return "no head"
    code, sequences, bounds = struct.unpack("<BQQ", index[17:34])
    if code not in WIDTHS:
        return f"type {code}"
    size = 34 + 12 * sequences + 8 * bounds
    if bounds < 1 or len(index) not in (size, size + sequences):
        return "another size than its counts say"
    lengths = struct.unpack(f"<{sequences}i", index[34 : 34 + 4 * sequences])
    pointers = struct.unpack(f"<{sequences}q", index[34 + 4 * sequences : 34 + 12 * sequences])
    documents = struct.unpack(f"<{bounds}q", index[34 + 12 * sequences : size])
    place = 0
    for length, pointer in zip(lengths, pointers, strict=True):
        if length < 0 or pointer != place:
            return f"a sequence of {length} at {pointer}, not at {place}"
        place += length * WIDTHS[code]
    if place != len(tokens):
        return f"{len(tokens)} bytes of tokens, not {place}"
    if documents[0] != 0 or documents[-1] != sequences or list(documents) != sorted(documents):
        return "documents out of order"
    if vocabulary is None:
        return None
    # floats are no ids, and signed ones may be negative
    kind = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}.get(code)
    if kind is None:
        return "tokens that are no whole numbers"
    ids = struct.unpack(f"<{len(tokens) // WIDTHS[code]}{kind}", tokens)
    return None if not ids or 0 <= min(ids) and max(ids) < vocabulary else "ids of no token"


def safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> str | None:
    """A file whose head describes all of its bytes, each once; of these tensors, where they are given."""
    content = path.read_bytes()
    if len(content) < 8:
        return "no head"
    size = int.from_bytes(content[:8], "little")
    try:
        head = json.loads(content[8 : 8 + size].decode(), object_pairs_hook=_once)
        assert len(content) >= 8 + size and isinstance(head, dict)
        tensors = {
            name: (one["dtype"], one["shape"], *one["data_offsets"])
            for name, one in head.items()
            if name != "__metadata__"
        }
        place = 0
        for dtype, shape, start, end in sorted(tensors.values(), key=lambda one: one[2:]):
            assert all(type(number) is int and number >= 0 for number in (*shape, start, end))
            assert start == place and end - start == SIZES[dtype] * prod(shape)
            place = end
        assert place == len(content) - 8 - size
    except (ValueError, RecursionError, LookupError, TypeError, AssertionError) as error:
        return f"a head that does not describe it: {error!r}"
    found = {name: tuple(one[1]) for name, one in tensors.items()}
    return None if shapes is None or found == shapes else "other tensors"


def ranks(path: Path) -> str | None:
    """Lines of a token in base64 and its rank, each once."""
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line]
        tokens = [base64.b64decode(token, validate=True) for token, _ in pairs]
        numbers = [int(rank) for _, rank in pairs]
        assert min(numbers) >= 0
    except (ValueError, binascii.Error, AssertionError) as error:
        return repr(error)
    same = len(set(tokens)) < len(tokens) or len(set(numbers)) < len(numbers)
    return "a token or a rank twice" if same or not tokens else None


def configuration(path: Path) -> str | None:
    """YAML of one document, whose sections and settings are all known and each there once."""
    known = settings(Configuration)
    try:
        node = yaml.compose(path.read_bytes().decode(), yaml.SafeLoader)
        for name in _names(node):
            if name != "extends" and not any(f"{one}.".startswith(f"{name}.") for one in known):
                return f"no setting is called {name[:60]!r}"
    except (yaml.YAMLError, ValueError, RecursionError, Twice) as error:
        return repr(error)[:200]
    return None


def _names(node: yaml.Node | None, prefix: str = "", depth: int = 0) -> list[str]:
    """Of settings; a value that is no mapping is none's beginning. Deeper than settings go nothing is read."""
    if not isinstance(node, yaml.MappingNode) or depth > 4:
        return [] if depth else ([] if node is None else ["a document that is no mapping"])
    names = [f"{prefix}{key.value}" for key, _ in node.value]
    if len(set(names)) < len(names):
        raise Twice
    # of a mapping that is a value, such as a chat's variables, the keys are anybody's
    inner = [found for key, item in node.value for found in _names(item, f"{prefix}{key.value}.", depth + 1)]
    return [name for name in (*names, *inner) if ".variables." not in name]
