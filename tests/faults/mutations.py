"""Damage that knows what it damages: bytes of any file, values of JSON, text of YAML, fields of binary formats.

Every function takes what a file holds and a source of chance, and gives what it holds instead: the same seed, the same
damage. What is given back may be a good file; whether it is one, the case's own rule says (`rules.py`).
"""

import base64
import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

# places of numbers where readers go wrong: signs, widths, floats that are none
NUMBERS = (
    0,
    1,
    -1,
    2,
    127,
    255,
    2**15,
    2**31 - 1,
    2**31,
    -(2**31) - 1,
    2**32,
    2**53 + 1,
    2**63,
    -(2**63),
    2**64,
    10**30,
)
FLOATS = (0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"))
TEXTS = ("", "none", "nan", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "\u2028", "ß🙂", "0x10", "x" * 3000)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, [1, "a"], {"a": {"a": {}}})
LOST = object()


def value(chance: random.Random) -> Any:
    """Any value of JSON."""
    return chance.choice(chance.choice((NUMBERS, FLOATS, TEXTS, OTHERS)))


def bytes_changed(content: bytes, chance: random.Random) -> bytes:
    """What disks, copies and tools do to any file, once or a few times."""
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        content = chance.choice(BYTES)(content, chance)
    return content


def _flipped(content: bytes, chance: random.Random) -> bytes:
    if not content:
        return b"\1"
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def _taken_out(content: bytes, chance: random.Random) -> bytes:
    start, end = _span(content, chance)
    return content[:start] + content[end:]


def _put_in(content: bytes, chance: random.Random) -> bytes:
    place, size = chance.randrange(len(content) + 1), chance.choice((1, 2, 8, 64))
    return content[:place] + chance.choice((chance.randbytes(size), bytes(size), b"\xff" * size)) + content[place:]


def _overwritten(content: bytes, chance: random.Random) -> bytes:
    start, end = _span(content, chance)
    size = end - start
    return content[:start] + chance.choice((chance.randbytes(size), bytes(size), b"\xff" * size)) + content[end:]


def _doubled(content: bytes, chance: random.Random) -> bytes:
    start, end = _span(content, chance)
    return content[:end] + content[start:]


def _exchanged(content: bytes, chance: random.Random) -> bytes:
    start, end = _span(content, chance)
    middle = (start + end) // 2
    return content[:start] + content[middle:end] + content[start:middle] + content[end:]


def _number_changed(content: bytes, chance: random.Random) -> bytes:
    """A number of 1, 2, 4 or 8 bytes at an even place is another."""
    size = chance.choice((1, 2, 4, 8))
    if len(content) < size:
        return content
    place = chance.randrange((len(content) - size) // size + 1) * size
    number = chance.choice(NUMBERS) % 256**size
    return content[:place] + number.to_bytes(size, chance.choice(("little", "big"))) + content[place + size :]


def _span(content: bytes, chance: random.Random) -> tuple[int, int]:
    start = chance.randrange(len(content) + 1)
    return start, min(len(content), start + chance.choice((1, 2, 7, 40, 500)))


BYTES: tuple[Mutation, ...] = (
    _flipped, _flipped, _cut, _taken_out, _put_in, _overwritten, _doubled, _exchanged, _number_changed
)  # fmt: skip


def text_changed(content: bytes, chance: random.Random) -> bytes:
    """What editors and other systems do to text: encodings, line ends, lines that are gone, doubled or joined."""
    text = content.decode(errors="replace")
    lines = text.splitlines(keepends=True) or [""]
    place = chance.randrange(len(lines))
    return chance.choice(
        (
            lambda: text.encode("utf-16"),
            lambda: text.encode("utf-32-be"),
            lambda: text[: len(text) // 2].encode() + b"\xe9\xff" + text[len(text) // 2 :].encode(),
            lambda: b"\xef\xbb\xbf" + content,
            lambda: text.replace("\n", chance.choice(("\r\n", "\r", "\u2028", "\0", ""))).encode(),
            lambda: "".join(lines[:place] + lines[place + 1 :]).encode(),
            lambda: "".join(lines[: place + 1] + lines[place:]).encode(),
            lambda: "".join(chance.sample(lines, len(lines))).encode(),
            lambda: "".join([*lines[:place], lines[place].rstrip("\n"), *lines[place + 1 :]]).encode(),
            lambda: "".join([*lines[:place], chance.choice(TEXTS) + "\n", *lines[place:]]).encode("utf-8", "replace"),
            lambda: text.replace(" ", chance.choice(("\t", "\u00a0", "")), chance.randrange(1, 9)).encode(),
        )
    )()


def tree_changed(tree: Any, chance: random.Random) -> Any:
    """A value of JSON with some of its parts another, gone, renamed, exchanged or in a list."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        places = list(_places(tree))
        if not places or chance.random() < 0.02:
            return value(chance)
        path = chance.choice(places)
        old = _at(tree, path)
        kind = chance.randrange(7)
        if kind == 0:
            tree = _with(tree, path, LOST)
        elif kind == 1:
            tree = _with(tree, path, [old])
        elif kind == 2:
            tree = _with(tree, path, _at(tree, chance.choice(places)))
        elif kind == 3 and isinstance(path[-1], str):
            tree = _with(_with(tree, path, LOST), (*path[:-1], chance.choice((path[-1] + "x", "", "🙂"))), old)
        elif kind == 4 and isinstance(old, int | float) and not isinstance(old, bool):
            tree = _with(tree, path, chance.choice((-old, old + 1, old * 10**6, str(old), float(old), old == 1)))
        else:
            tree = _with(tree, path, value(chance))
    return tree


def json_changed(content: bytes, chance: random.Random) -> bytes:
    """`tree_changed` of a file, and what only its text can have: keys that are there twice, depth, endless digits."""
    text = json.dumps(tree_changed(json.loads(content), chance))
    kind = chance.randrange(12)
    if kind == 0 and (start := text.find('"')) >= 0:
        # the first key, or text, again with another value
        return (text[:start] + '"twice": 1, "twice": 2, ' * (text[0] == "{") + text[start:]).encode()
    if kind == 1:
        depth = chance.choice((50, 3000, 100_000))
        return ("[" * depth + "]" * depth).encode()
    if kind == 2:
        return text.replace("1", "1" * chance.choice((30, 400, 5000)), 1).encode()
    if kind == 3:
        return text.replace(":", chance.choice((": -", ":: ", "= ", ": 0")), 1).encode()
    return text.encode()


def lines_changed(content: bytes, chance: random.Random) -> bytes:
    """`json_changed` of a line of JSON lines, or lines that are gone, twice or halves."""
    lines = content.split(b"\n")
    place = chance.randrange(max(1, len(lines) - 1))
    if chance.random() < 0.25:
        return text_changed(content, chance)
    try:
        lines[place] = json_changed(lines[place], chance)
    except ValueError:
        lines[place] = bytes_changed(lines[place], chance)
    return b"\n".join(lines)


def yaml_changed(content: bytes, chance: random.Random) -> bytes:
    """Text of YAML with anchors in circles, bombs of aliases, tags, keys twice, other documents, or as text is changed.

    Values that are another are those of flags: `flags` in `inputs.py`.
    """
    text = content.decode()
    lines = text.splitlines(keepends=True) or [""]
    place = chance.randrange(len(lines))
    scalar = json.dumps(value(chance))
    inserted = chance.choice(
        (
            "a: &a {b: *a}\n",
            "a: &a [*a, *a]\n",
            bomb(chance.choice((6, 12, 40))),
            "a: !!python/object/apply:os.system ['true']\n",
            "!!binary aaaa: 1\n",
            "a: !!set {b, c}\n",
            "a: !!timestamp 2001-12-14t21:59:43.10-05:00\n",
            "<<: {seed: 1}\n",
            "? [a, b]\n: 1\n",
            f"seed: {scalar}\n",
            f"train: {scalar}\n",
            "extends: ../tiny.yaml\n",
            "extends: /etc/passwd\n",
            "---\nseed: 1\n",
            "%YAML 9.9\n---\n",
            "seed: 1\nseed: 2\n",
            "? " * 4000 + "\n",
            "- " * 4000 + "\n",
            "seed: " + "9" * 5000 + "\n",
        )
    )
    if chance.random() < 0.5:
        return "".join([*lines[:place], inserted, *lines[place:]]).encode("utf-8", "replace")
    word = chance.choice(text.replace("{", " ").replace("}", " ").replace(",", " ").split() or [""])
    return text.replace(word, chance.choice((scalar, "", word * 2, "*a", "&a", "!!int", "{", "]")), 1).encode(
        "utf-8", "replace"
    )


def bomb(levels: int) -> str:
    """A mapping of so many levels, each of which names the one before twice: small, and endless when written out."""
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def index_changed(content: bytes, chance: random.Random) -> bytes:
    """A Megatron index (`.idx`) with another header, count, length, pointer, bound of documents, or more of one."""
    head, counts = 18, 34
    if len(content) < counts:
        return bytes_changed(content, chance)
    sequences, bounds = struct.unpack("<QQ", content[head:counts])
    lengths = counts
    pointers = lengths + 4 * sequences
    documents = pointers + 8 * sequences
    kind = chance.randrange(8)
    if kind == 0:
        return content[:9] + struct.pack("<Q", chance.choice(NUMBERS) % 2**64) + content[17:]
    if kind == 1:
        return content[:17] + bytes([chance.randrange(256)]) + content[18:]
    if kind == 2:
        counted = [sequences, bounds]
        counted[chance.randrange(2)] = chance.choice((*NUMBERS, sequences + 1, max(0, sequences - 1))) % 2**64
        return content[:head] + struct.pack("<QQ", *counted) + content[counts:]
    if kind == 3 and sequences:
        place = lengths + 4 * chance.randrange(sequences)
        return content[:place] + struct.pack("<I", chance.choice(NUMBERS) % 2**32) + content[place + 4 :]
    if kind == 4 and sequences:
        place = pointers + 8 * chance.randrange(sequences)
        return content[:place] + struct.pack("<Q", chance.choice(NUMBERS) % 2**64) + content[place + 8 :]
    if kind == 5 and bounds:
        place = documents + 8 * chance.randrange(bounds)
        return content[:place] + struct.pack("<Q", chance.choice((*NUMBERS, sequences)) % 2**64) + content[place + 8 :]
    if kind == 6 and sequences > 1:
        # two sequences change places, with their lengths and not their pointers
        first, second = (lengths + 4 * place for place in chance.sample(range(sequences), 2))
        changed = bytearray(content)
        changed[first : first + 4], changed[second : second + 4] = (
            content[second : second + 4],
            content[first : first + 4],
        )
        return bytes(changed)
    return content + content[documents:][: 8 * chance.randrange(1, 4)]


def safetensors_changed(content: bytes, chance: random.Random) -> bytes:
    """A file of safetensors whose head says something else: its length, types, shapes, offsets, names."""
    if len(content) < 8:
        return bytes_changed(content, chance)
    size = int.from_bytes(content[:8], "little")
    head, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    kind = chance.randrange(6)
    if kind == 0:
        return struct.pack("<Q", chance.choice((*NUMBERS, size - 1, size + 1)) % 2**64) + content[8:]
    tensors = [name for name in head if name != "__metadata__"]
    name = chance.choice(tensors)
    if kind == 1:
        head[name]["dtype"] = chance.choice(("F64", "F16", "I64", "U8", "F8_E4M3", "BOOL", "Q9", 7))
    elif kind == 2:
        shape = head[name]["shape"]
        head[name]["shape"] = chance.choice((shape[::-1], [*shape, 1], shape[1:], [-1], [2**62, 4], [0], "x"))
    elif kind == 3:
        start, end = head[name]["data_offsets"]
        offsets = ([start, end + 4], [start - 4, end], [end, start], [0, len(data)], [2**63, 2**63 + 4], [start])
        head[name]["data_offsets"] = chance.choice(offsets)
    elif kind == 4:
        other = chance.choice(tensors)
        head[name], head[other] = head[other], head[name]
    else:
        head = tree_changed(head, chance)
    written = json.dumps(head).encode()
    return struct.pack("<Q", len(written)) + written + data


def protobuf_changed(content: bytes, chance: random.Random) -> bytes:
    """Fields of a message (a SentencePiece model) that are gone, twice, in another order, of another type or length."""
    fields = list(_fields(content))
    if not fields:
        return bytes_changed(content, chance)
    place = chance.randrange(len(fields))
    field = fields[place]
    kind = chance.randrange(6)
    if kind == 0:
        fields.pop(place)
    elif kind == 1:
        fields.insert(place, field)
    elif kind == 2:
        chance.shuffle(fields)
    elif kind == 3:
        fields[place] = bytes([field[0] ^ chance.choice((1, 2, 3, 5, 7, 8))]) + field[1:]
    elif kind == 4:
        fields[place] = field[:1] + bytes([0xFF, 0xFF, 0xFF, 0xFF, 0x07]) + field[2:]
    else:
        fields[place] = field[:2] + bytes_changed(field[2:], chance)
    return b"".join(fields)


def _fields(content: bytes) -> Any:
    """The fields of a message of which each has a length below 2**14."""
    place = 0
    while place < len(content):
        start, tag = place, content[place]
        size, shift, place = 0, 0, place + 1
        while place < len(content):
            byte = content[place]
            size, shift, place = size | (byte & 0x7F) << shift, shift + 7, place + 1
            if not byte & 0x80:
                break
        place += size if tag & 7 == 2 else 0
        yield content[start:place]


def ranks_changed(content: bytes, chance: random.Random) -> bytes:
    """Lines of ranks (tiktoken) with another rank, one of another's, tokens twice, and what is no base64."""
    lines = content.splitlines()
    place = chance.randrange(len(lines))
    token, _, rank = lines[place].partition(b" ")
    other = lines[chance.randrange(len(lines))].partition(b" ")
    lines[place] = chance.choice(
        (
            token + b" " + str(chance.choice(NUMBERS)).encode(),
            token + b" " + other[2],
            other[0] + b" " + rank,
            b"*" + token + b" " + rank,
            token,
            token + b" " + rank + b" " + rank,
            base64.b64encode(b"") + b" " + rank,
            rank + b" " + token,
        )
    )
    return b"\n".join(lines) + b"\n"


def _places(tree: Any, path: tuple = ()) -> Any:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


def _at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _with(tree: Any, path: tuple, new: Any) -> Any:
    key, *rest = path
    copy = tree.copy()
    if rest:
        copy[key] = _with(tree[key], tuple(rest), new)
    elif new is LOST:
        del copy[key]
    else:
        copy[key] = new
    return copy
