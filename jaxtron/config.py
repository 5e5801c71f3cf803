"""The base of every configuration model, and how a model is filled: YAML file, its `extends:` parents, dotted flags.

File and flags become one tree of plain values, validated once by the pydantic model itself, so that both get the same
rules and the same words. A `Config` cannot use `mode="before"` model validators: with them pydantic stops reading
lists as tuples.
"""

import difflib
import enum
import json
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


class UserError(ValueError):
    """Bad input from the user; `str()` is one clear line: what is wrong, the values, the fix."""


class Config(BaseModel):
    """A frozen, strictly validated configuration; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


ConfigType = TypeVar("ConfigType", bound=Config)
Tree = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One dotted name that a file or a flag can set: a value, or a whole section (then every member is a `Config`)."""

    name: str
    members: tuple[Any, ...]
    default: Any
    meaning: str
    bounds: str

    @property
    def is_section(self) -> bool:
        return all(_is_config(member) for member in self.members)

    @property
    def scalars(self) -> tuple[Any, ...]:
        """The members that are neither none nor a sequence."""
        return tuple(m for m in self.members if m is not type(None) and not _is_sequence(m))

    @property
    def is_sequence(self) -> bool:
        return any(_is_sequence(member) for member in self.members)

    @property
    def type_text(self) -> str:
        """Its type in words: `int >= 1 | none`, `adamw | sgd`, `[float, float]`."""
        return " | ".join(_describe(member, self.bounds) for member in self.members)

    @property
    def is_text(self) -> bool:
        """Whether a flag's words are taken as they stand, so that `--run.name 7` is a name."""
        pool = self.scalars or tuple(m for s in self.members for m in _element_members(s))
        return bool(pool) and all(_is_text(member) for member in pool)


def settings(config_type: type[Config]) -> dict[str, Setting]:
    """Every dotted name of `config_type` in order, sections before their contents."""
    found: dict[str, Setting] = {}
    for setting in _walk(config_type, "", PydanticUndefined):
        if setting.name in found:
            # alternatives of a union share this name: it takes what either takes
            first = found[setting.name]
            members = tuple(dict.fromkeys(first.members + setting.members))
            setting = Setting(first.name, members, first.default, first.meaning, first.bounds)
        found[setting.name] = setting
    return found


def _walk(config_type: type[Config], prefix: str, instance: Any) -> Iterator[Setting]:
    for key, info in config_type.model_fields.items():
        members = _members(info.annotation)
        if isinstance(instance, config_type):
            default = getattr(instance, key)
        else:
            default = info.get_default(call_default_factory=True, validated_data={})
        meaning = " ".join((info.description or "").split())
        yield Setting(prefix + key, members, default, meaning, _bounds(info))
        for member in members:
            if _is_config(member):
                yield from _walk(member, f"{prefix}{key}.", default)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a (nested, annotated) union; any other type is its own single one."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(dict.fromkeys(m for part in get_args(annotation) for m in _members(part)))
    return (annotation,)


def _element_members(annotation: Any) -> tuple[Any, ...]:
    if not _is_sequence(annotation):
        return ()
    return tuple(m for part in get_args(annotation) if part is not Ellipsis for m in _members(part))


def _is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def _is_sequence(annotation: Any) -> bool:
    return (get_origin(annotation) or annotation) in (tuple, list, set, frozenset, Sequence)


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal or an Enum, else nothing."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return tuple(member.value for member in annotation)
    return ()


def _is_text(annotation: Any) -> bool:
    choices = _choices(annotation)
    if choices:
        return all(isinstance(choice, str) for choice in choices)
    return isinstance(annotation, type) and issubclass(annotation, (str, Path))


def _describe(annotation: Any, bounds: str = "") -> str:
    if choices := _choices(annotation):
        return " | ".join(str(choice) for choice in choices)
    if _is_sequence(annotation):
        parts = ["..." if p is Ellipsis else " | ".join(map(_describe, _members(p))) for p in get_args(annotation)]
        return f"[{', '.join(parts)}]"
    if get_origin(annotation) is dict:
        key, value = get_args(annotation)
        return f"{{{_describe(key)}: {_describe(value)}}}"
    if _is_config(annotation):
        return "{" + ", ".join([*list(annotation.model_fields)[:3], "..."][: len(annotation.model_fields)]) + "}"
    names = {type(None): "none", bool: "true | false", str: "text", Path: "path"}
    name = names.get(annotation) or getattr(annotation, "__name__", str(annotation))
    return name + bounds if annotation in (int, float) else name


def _bounds(info: FieldInfo) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [f"{s} {getattr(m, k)}" for m in info.metadata for k, s in signs.items() if hasattr(m, k)]
    return " " + ", ".join(found) if found else ""


def format_value(value: Any) -> str:
    """A value as a person would write it in a configuration file."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {format_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(format_value, value)) + "]"
    return str(value)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-4` is a number, and `no` and `1:30` are text."""


class _Dumper(yaml.SafeDumper):
    """The same scalars, so that what is written reads back."""


for _yaml in (_Loader, _Dumper):
    _yaml.yaml_implicit_resolvers = {}
    _number = "-+0123456789."
    for _tag, _pattern, _first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("int", r"[-+]?[0-9][0-9_]*", _number),
        ("float", r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", _number),
    ):
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _read_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    # not PyYAML's own, which takes 010 for 8
    return int(loader.construct_scalar(node).replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:int", _read_int)


@dataclass
class Source:
    """Plain values, and for every dotted name the file and line, or the flag, that it came from."""

    tree: Tree = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def set(self, name: str, value: Any, origin: str) -> None:
        """Sets one dotted name; a mapping is merged into what is there."""
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


def _read_file(path: Path, chain: tuple[Path, ...] = ()) -> Source:
    """A file laid over the one that it `extends`, that over its own, and so on."""
    if path.resolve() in chain:
        raise UserError(f"{path}: extends itself, by way of {' -> '.join(p.name for p in chain)}")
    tree, lines = _read_yaml(path)
    parent = tree.pop("extends", PydanticUndefined)
    source = Source()
    if isinstance(parent, str) and parent:
        source = _read_file(path.parent / parent, (*chain, path.resolve()))
    elif parent is not PydanticUndefined:
        raise UserError(f"{path} line {lines['extends']}: extends takes one file name, not {format_value(parent)}")
    for key, value in tree.items():
        source.set(str(key), value, f"{path} line {lines[str(key)]}")
    source.origins |= {name: f"{path} line {line}" for name, line in lines.items() if name != "extends"}
    return source


def _read_yaml(path: Path) -> tuple[Tree, dict[str, int]]:
    """A file's mapping, and the line of each dotted name."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        lines = dict(_lines(node, path)) if node else {}
        tree = loader.construct_document(node) if node else {}
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, sorted(p.name for p in path.parent.glob("*.y*ml")), n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"configuration file {path} does not exist{hint}") from None
    except OSError as error:
        raise UserError(f"configuration file {path} cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = "; quote text that begins with *" if "alias" in f"{error.context} {error.problem}" else ""
        where = f"{path} line {mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {error.problem}{hint}") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a YAML text file: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected settings such as `seed: 1`, got {_show(tree)}")
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


def split_arguments(config_type: type[Config], arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    """The words that belong to no flag, and each flag's dotted name and value in order."""
    known = settings(config_type)
    words: list[str] = []
    flags: list[tuple[str, Any]] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            words.append(token)
            continue
        name, equals, text = token[2:].partition("=")
        setting = known.get(name)
        texts = [text] if equals else _take_values(setting, rest)
        if not texts and setting is not None and bool not in setting.members:
            hint = f"; write --{name}=--... for one that begins with --" if setting.is_text else ""
            raise UserError(f"--{name} needs a value: {setting.type_text}{hint}")
        values = [_parse_text(text, setting) for text in texts]
        flags.append((name, values[0] if len(values) == 1 else values or True))
    return words, flags


def _take_values(setting: Setting | None, rest: list[str]) -> list[str]:
    """Removes from `rest` the values of the flag just read: none, one, or for a list all up to the next flag."""
    taken: list[str] = []
    most = len(rest) if setting is not None and setting.is_sequence else 1
    while rest and len(taken) < most and not rest[0].startswith("--"):
        if setting is not None and bool in setting.members and rest[0].endswith((".yaml", ".yml")):
            break
        taken.append(rest.pop(0))
    return taken


def _parse_text(text: str, setting: Setting | None) -> Any:
    is_list = setting is not None and setting.is_sequence and text.startswith("[")
    if setting is not None and setting.is_text and not is_list:
        return text
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        return text


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def gather(config_type: type[Config], path: Path | None, overrides: Sequence[str] = ()) -> Source:
    """File and flags as plain values with their origins, before validation; raises `UserError` if they do not read."""
    source = _read_file(path) if path is not None else Source()
    known = settings(config_type)
    words, flags = split_arguments(config_type, overrides)
    if words:
        raise UserError(f"unexpected argument {words[0]!r}: settings are given as --name value")
    seen: set[str] = set()
    for name, value in flags:
        if name in seen and name in known and known[name].is_sequence:
            value = _as_list(source.get(name)) + _as_list(value)
        seen.add(name)
        source.set(name, value, f"--{name}")
    for name, setting in known.items():
        value = source.get(name)
        adapted = _adapt(value, setting)
        if adapted is not value:
            source.set(name, adapted, source.origins[name])
        # which of several sections is meant: the default's kind, where none is given
        for tag in _tags(setting) if isinstance(value, dict) and isinstance(setting.default, Config) else ():
            value.setdefault(tag, getattr(setting.default, tag))
    return source


def _tags(setting: Setting) -> list[str]:
    """The fields that tell the sections of a union apart: a Literal in every one."""
    sections = [member.model_fields for member in setting.members if _is_config(member)]
    shared = [key for key in sections[0] if all(key in fields for fields in sections)] if len(sections) > 1 else []
    return [key for key in shared if all(get_origin(fields[key].annotation) is Literal for fields in sections)]


def _adapt(value: Any, setting: Setting) -> Any:
    """`none` for a setting that can be none, and a single value for one that is a list."""
    choices = [choice for member in setting.members for choice in _choices(member)]
    if value == "none" and type(None) in setting.members and "none" not in choices:
        return None
    if setting.is_sequence and not setting.scalars and isinstance(value, (str, int, float)):
        return [value]
    return value


def load(config_type: type[ConfigType], path: Path | None, overrides: Sequence[str] = ()) -> ConfigType:
    """The configuration of a YAML file (none: the defaults) with dotted flags on top.

    Raises `UserError`, one line, for whatever is wrong with either, naming the setting, its value and its origin.
    """
    source = gather(config_type, path, overrides)
    try:
        # as JSON: strict about numbers and text, while lists become tuples and text becomes paths and enums
        return config_type.model_validate_json(json.dumps(source.tree, default=str), strict=True)
    except ValidationError as error:
        raise UserError(_explain(config_type, source, error)) from None


def dump(config: Config) -> str:
    """YAML of a whole configuration, defaults included; `load` reads it back as an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _explain(config_type: type[Config], source: Source, error: ValidationError) -> str:
    """The first error in a line, and how many more there are."""
    known = settings(config_type)
    lines: dict[str, str] = {}
    errors: list[dict[str, Any]] = [dict(details) for details in error.errors(include_url=False)]
    for details in errors:
        name = _dotted_name(known, details["loc"])
        if details["type"] == "union_tag_invalid":
            name = f"{name}.{details['ctx']['discriminator'].strip(chr(39))}"
        if details["type"] == "extra_forbidden":
            value = details["input"]
            name = ".".join([*([name] if name else []), str(details["loc"][-1])])
            while isinstance(value, dict) and value:
                key, value = next(iter(value.items()))
                name = f"{name}.{key}"
            line = f"unknown setting {name}{source.origin(name)}{_nearest(name, known)}"
        else:
            line = _explain_value(name, known, source, details)
        lines.setdefault(name, line)
    first, *others = lines.values()
    return first + (f" (and {len(others)} more)" if others else "")


def _explain_value(name: str, known: dict[str, Setting], source: Source, details: dict[str, Any]) -> str:
    setting, value, kind = known.get(name), source.get(name), details["type"]
    if kind in ("value_error", "assertion_error"):
        message = str(details["ctx"]["error"])
        # a message that speaks in full dotted names needs no other
        return message if not name or f"{name}." in message else f"{name}: {message}"
    if setting is None or value is PydanticUndefined:
        meaning = f" ({setting.type_text}: {setting.meaning})" if setting else ""
        return f"{name} has no value{meaning}: give it in the file or as --{name}"
    bound = kind.startswith(("greater_than", "less_than", "multiple_of", "string_", "finite"))
    if bound and not kind.endswith("_type"):
        expected = details["msg"].replace("Input should", "must").replace("String should", "must")
    else:
        expected = f"expected {setting.type_text}"
    return f"{name}: {expected}, got {_show(value)}{source.origin(name)}"


def _dotted_name(known: dict[str, Setting], location: tuple[int | str, ...]) -> str:
    """The setting at a pydantic location, whose union tags, list places and unknown keys are left out."""
    name = ""
    for part in location:
        longer = f"{name}.{part}" if name else str(part)
        if longer in known:
            name = longer
    return name


def _nearest(name: str, known: dict[str, Setting]) -> str:
    """`; did you mean mesh.tensor?`: by the same last word or its initials, then by likeness."""
    last = name.rpartition(".")[2]
    names = [other for other in known if not name.startswith(f"{other}.")]
    ends = {other.rpartition(".")[2]: other for other in reversed(names)}
    same = [other for other in names if last in _abbreviations(other)]
    near = (
        difflib.get_close_matches(name, same, n=1, cutoff=0.0)
        or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        or [ends[end] for end in difflib.get_close_matches(last, ends, n=1, cutoff=0.6)]
    )
    return f"; did you mean {near[0]}?" if near else "; --help lists the settings"


def _abbreviations(name: str) -> tuple[str, str]:
    """A setting's last word, and its initials: `learning_rate` and `lr`."""
    last = name.rpartition(".")[2]
    return last, "".join(word[:1] for word in last.split("_"))


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else format_value(value)
    return text if len(text) <= 60 else text[:57] + "..."
