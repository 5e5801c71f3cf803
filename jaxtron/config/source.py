"""Configuration files as plain values that know where they came from."""

import copy
import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from jaxtron.config.base import Tree, UserError, format_value, shown
from jaxtron.config.yaml_text import YamlLoader


@dataclass
class SettingsSource:
    """Plain values, and for every dotted name the file and line, or the flag, that it came from.

    `layers` counts what lies over what: a file's parents are under it, flags over all files.
    """

    tree: Tree = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)
    layer: int = 0

    def set(self, name: str, value: Any, origin: str) -> None:
        """Sets one dotted name on the present layer; a mapping is merged into what is there."""
        *parents, last = name.split(".")
        tree = self.tree
        for key in parents:
            if not isinstance(tree.get(key), dict):
                tree[key] = {}
            tree = tree[key]
        if isinstance(value, dict):
            if not isinstance(tree.get(last), dict):
                tree[last] = {}
            for key, item in value.items():
                self.set(f"{name}.{key}", item, origin)
        else:
            tree[last] = value
        self.origins[name] = origin
        self.layers[name] = self.layer

    def drop(self, name: str) -> None:
        """Forgets one dotted name that was set."""
        *parents, last = name.split(".")
        tree = self.tree
        for key in parents:
            tree = tree[key]
        del tree[last]
        for known in [known for known in self.origins if known == name or known.startswith(name + ".")]:
            self.origins.pop(known)
            self.layers.pop(known, None)

    def layer_of(self, name: str) -> int:
        """The highest layer that set a name or a part of it; -1 where none did."""
        return max((layer for known, layer in self.layers.items() if f"{known}.".startswith(f"{name}.")), default=-1)

    def get(self, name: str) -> Any:
        """The value at a dotted name, or `PydanticUndefined` where nothing set it."""
        tree: Any = self.tree
        for key in name.split("."):
            if not isinstance(tree, dict) or key not in tree:
                return PydanticUndefined
            tree = tree[key]
        return tree

    def origin(self, name: str) -> str:
        """Where a name was set, or a part of it, or the section that holds it: ` (configs/a.yaml line 3)`."""
        below = [known for known in self.origins if known.startswith(name + ".")]
        above = [known for known in self.origins if name.startswith(known + ".")]
        known = name if name in self.origins else (below or sorted(above, key=len) or [""])[-1]
        return f" ({self.origins[known]})" if known else ""


def read_file(path: Path, chain: tuple[Path, ...] = (), under: SettingsSource | None = None) -> SettingsSource:
    """A file laid over the one that it `extends`, that over its own, and so on; below all other settings, if any."""
    if path.resolve() in chain:
        raise UserError(f"{path}: extends itself, by way of {' -> '.join(p.name for p in chain)}")
    tree, lines = _read_yaml(path)
    parent = tree.pop("extends", PydanticUndefined)
    source = SettingsSource() if under is None else copy.deepcopy(under)
    if isinstance(parent, str) and parent:
        source = read_file(path.parent / parent, (*chain, path.resolve()), under)
    elif parent is not PydanticUndefined:
        raise UserError(f"{path} line {lines['extends']}: extends takes one file name, not {format_value(parent)}")
    source.layer += 1
    for key, value in tree.items():
        source.set(key, value, f"{path} line {lines[key]}")
    source.origins |= {name: f"{path} line {line}" for name, line in lines.items() if name != "extends"}
    return source


def _read_yaml(path: Path) -> tuple[Tree, dict[str, int]]:
    """A file's mapping, and the line of each dotted name."""
    try:
        loader = YamlLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        lines = dict(_lines(node, path)) if node else {}
        tree = loader.construct_document(node) if node else {}
    except FileNotFoundError:
        there = [*path.parent.glob("*.y*ml"), *Path("configs").glob("*.y*ml")]
        names = {name: file for file in reversed(there) for name in (file.name, file.stem)}
        near = difflib.get_close_matches(path.name, sorted(names), n=1)
        hint = f"; did you mean {names[near[0]]}?" if near else ""
        raise UserError(f"configuration file {path} does not exist{hint}") from None
    except OSError as error:
        raise UserError(f"configuration file {path} cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = f"{error.context} {error.problem}"
        first = next((sign for word, sign in (("alias", "*"), ("tag", "!")) if word in said), None)
        hint = f"; quote text that begins with {first}" if first else ""
        where = f"{path} line {mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {error.problem}{hint}") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a YAML text file: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected settings such as `seed: 1`, got {shown(tree)}")
    # no text, or of a mapping that is merged into this one
    others = [key for key in tree if key not in lines]
    if others:
        raise UserError(f"{path}: {shown(others[0])} is no name of a setting")
    return tree, lines


def _lines(node: yaml.Node, path: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in seen:
            raise UserError(f"{path} line {line}: {name} is set twice; keep one")
        seen.add(name)
        yield name, line
        yield from _lines(value, path, f"{name}.")
