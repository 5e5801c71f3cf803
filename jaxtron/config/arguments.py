"""A command line's words and flags."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jaxtron.config.base import Config, UserError, expand_home
from jaxtron.config.settings import Setting, settings
from jaxtron.config.yaml_text import YamlLoader

FILE_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class _Piece:
    """A flag with its values, or a word that belongs to none (`name` None): arguments `start` to `end`."""

    start: int
    end: int
    name: str | None
    texts: tuple[str, ...]


def split_arguments(config_type: type[Config], arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    """The words that belong to no flag, and each flag's dotted name and value in order."""
    known = settings(config_type)
    words: list[str] = []
    flags: list[tuple[str, Any]] = []
    for piece in _pieces(known, arguments):
        if piece.name is None:
            words += piece.texts
            continue
        setting = known.get(piece.name)
        if not piece.texts and setting is not None and bool not in setting.members:
            hint = f"; write --{piece.name}=--... for one that begins with --" if setting.is_text else ""
            raise UserError(f"--{piece.name} needs a value: {setting.type_text}{hint}")
        values = [_parse_text(text, setting) for text in piece.texts]
        flags.append((piece.name, values[0] if len(values) == 1 else values or True))
    return words, flags


def take_file(config_type: type[Config], arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The CONFIG.yaml of a command line, wherever it stands, and the rest; a `UserError` for a second one.

    Where no word stands alone, a list's last value of several that ends in .yaml is the file.
    """
    known = settings(config_type)
    pieces = list(_pieces(known, arguments))
    words = [piece for piece in pieces if piece.name is None]
    if len(words) > 1:
        raise UserError(f"unexpected argument {words[1].texts[0]!r}: one CONFIG.yaml, then settings as --name value")
    ends = [piece.start for piece in words] or [
        piece.end - 1
        for piece in pieces
        if piece.name in known
        and known[piece.name].is_sequence
        and len(piece.texts) > 1
        and piece.texts[-1].endswith(FILE_ENDINGS)
    ]
    if len(ends) > 1:
        candidates = " or ".join(arguments[place] for place in ends)
        raise UserError(f"which is the CONFIG.yaml, {candidates}? Give it first, before all settings")
    if not ends:
        return None, list(arguments)
    rest = [argument for place, argument in enumerate(arguments) if place != ends[0]]
    return Path(expand_home(arguments[ends[0]])), rest


def _pieces(known: dict[str, Setting], arguments: Sequence[str]) -> Iterator[_Piece]:
    place = 0
    while place < len(arguments):
        token, start = arguments[place], place
        place += 1
        if not token.startswith("--") or token == "--":
            yield _Piece(start, place, None, (token,))
            continue
        name, equals, text = token[2:].partition("=")
        if equals:
            yield _Piece(start, place, name, (text,))
            continue
        place = _end_of_values(known.get(name), arguments, place)
        yield _Piece(start, place, name, tuple(arguments[start + 1 : place]))


def _end_of_values(setting: Setting | None, arguments: Sequence[str], first: int) -> int:
    """Where the values of a flag end that begin at `first`: none, one, or for a list all up to the next flag."""
    is_list = setting is not None and setting.is_sequence
    place = first
    while place < len(arguments) and (is_list or place == first) and not arguments[place].startswith("--"):
        if setting is not None and bool in setting.members and arguments[place].endswith(FILE_ENDINGS):
            break
        place += 1
    return place


def _parse_text(text: str, setting: Setting | None) -> Any:
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        name = f"--{setting.name}: " if setting is not None else ""
        raise UserError(f"{name}{text!r} is not UTF-8 text")
    is_list = setting is not None and setting.is_sequence and text.startswith("[")
    if not text or (setting is not None and setting.is_text and not is_list):
        return text
    try:
        return yaml.load(text, YamlLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
