"""Ways in which a file is damaged, the same in every run: by bytes, and where it is JSON or YAML also by its tree."""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import yaml

# one of each kind of value, for the place of another
VALUES: tuple[Any, ...] = (None, True, -1, 2**70, 1.5, float("nan"), "", "nowhere", [], [1], {}, {"a": 1})


def byte_damages(content: bytes, *, seed: int, flips: int = 6) -> Iterator[tuple[str, bytes]]:
    """Damage that happens to any file: cut short, lost, overwritten, copied wrongly, single bits."""
    rng = random.Random(seed)
    size = len(content)
    yield "emptied", b""
    for part in (1, 2, 3):
        yield f"cut at {part}/4", content[: size * part // 4]
    yield "last byte lost", content[:-1]
    yield "first byte lost", content[1:]
    yield "begins later", content[size // 3 :]
    yield "a hole of zeros", content[: size // 3] + bytes(size // 3) + content[2 * (size // 3) :]
    yield "all zeros", bytes(size)
    yield "noise", rng.randbytes(size)
    yield "noise at the end", content + rng.randbytes(17)
    yield "zeros at the end", content + bytes(512)
    yield "written twice", content + content
    yield "halves exchanged", content[size // 2 :] + content[: size // 2]
    yield "of a web page", b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"
    for number in range(flips if size else 0):
        place, bit = rng.randrange(size), rng.randrange(8)
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        yield f"bit {bit} of byte {place} flipped ({number})", bytes(changed)


def text_damages(content: bytes, *, seed: int) -> Iterator[tuple[str, bytes]]:
    """What editors and other systems do to text."""
    rng, text = random.Random(seed), content.decode()
    yield "UTF-16", text.encode("utf-16")
    yield "Latin-1", (text[: len(text) // 2] + "é" + text[len(text) // 2 :]).encode("latin-1", errors="replace")
    yield "a byte order mark", b"\xef\xbb\xbf" + content
    yield "line ends of Windows", text.replace("\n", "\r\n").encode()
    yield "line ends of old Macs", text.replace("\n", "\r").encode()
    yield "tabs", text.replace("  ", "\t").encode()
    yield "a zero byte", content[: len(content) // 2] + b"\0" + content[len(content) // 2 :]
    lines = text.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    yield "a line lost", "".join(lines[:place] + lines[place + 1 :]).encode()
    yield "a line twice", "".join(lines[: place + 1] + lines[place:]).encode()
    yield "a line of conflict marks", "".join([*lines[:place], "<<<<<<< HEAD\n", *lines[place:]]).encode()
    yield "blank", b"\n \n\n"


def tree_damages(tree: Any, write: Callable[[Any], str], *, seed: int, count: int = 14) -> Iterator[tuple[str, bytes]]:
    """The right syntax with a wrong content: other values, and keys that are missing, too many or of another kind."""
    rng = random.Random(seed)
    for value in VALUES:
        yield f"only {value!r}", write(value).encode()
    yield "nested deeply", ("[" * 100_000).encode()
    yield "nested deeply and closed", ("[" * 3000 + "]" * 3000).encode()
    places = list(_places(tree))
    for place in sorted(rng.sample(range(len(places)), min(count, len(places)))):
        path = places[place]
        value = rng.choice(VALUES)
        yield f"{_name(path)} is {value!r}", write(_changed(tree, path, value)).encode()
        yield f"{_name(path)} lost", write(_changed(tree, path, _LOST)).encode()


_LOST = object()


def _places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _changed(tree: Any, path: tuple, value: Any) -> Any:
    key, *rest = path
    copy = tree.copy()
    if rest:
        copy[key] = _changed(tree[key], tuple(rest), value)
    elif value is _LOST:
        del copy[key]
    else:
        copy[key] = value
    return copy


def _name(path: tuple) -> str:
    return ".".join(map(str, path))[:60]


def json_damages(content: bytes, *, seed: int, count: int = 14) -> Iterator[tuple[str, bytes]]:
    """`tree_damages` of a JSON file."""
    yield from tree_damages(json.loads(content), json.dumps, seed=seed, count=count)


def lines_damages(content: bytes, *, seed: int, count: int = 14) -> Iterator[tuple[str, bytes]]:
    """`tree_damages` of one of the lines of a file of JSON lines."""
    before, line, after = content.partition(b"\n")
    rest = after.split(b"\n")
    for name, changed in json_damages(rest[0], seed=seed, count=count):
        yield name, b"\n".join([before, changed, *rest[1:]])


def yaml_damages(content: bytes, *, seed: int, count: int = 14) -> Iterator[tuple[str, bytes]]:
    """`tree_damages` of a YAML file, and what only YAML has."""
    yield from tree_damages(yaml.safe_load(content), yaml.dump, seed=seed, count=count)
    yield "two documents", content + b"---\n" + content
    yield "a tag of Python", b"a: !!python/object/apply:os.system ['true']\n"
    yield "an anchor in itself", b"a: &a {b: *a}\n"
    yield "a key that is a list", b"? [a, b]\n: 1\n"
