"""YAML as configurations are written: YAML 1.2's scalars, read and written."""

import re

import yaml
from yaml.constructor import SafeConstructor

# values beyond those that a document has, which its aliases may stand for
MOST_ALIASED = 100_000


class _Unaliased:
    """Of a loader: a document whose aliases make a circle, or stand for more than anyone means, is an error."""

    def get_single_node(self) -> yaml.Node | None:
        """The document's node."""
        node = super().get_single_node()  # pyright: ignore
        if node is not None:
            sizes: dict[int, int] = {}
            if _size(node, sizes) - len(sizes) > MOST_ALIASED:
                raise yaml.YAMLError(f"its aliases stand for more than {MOST_ALIASED:,} values")
        return node


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values of a node with those that aliases in it stand for; `sizes` has those of the nodes within."""
    if id(node) in sizes:
        if sizes[id(node)] < 0:
            raise yaml.YAMLError(f"an alias in line {node.start_mark.line + 1} names what it is a part of")
        return sizes[id(node)]
    sizes[id(node)] = -1
    inner = node.value if isinstance(node, yaml.CollectionNode) else ()
    parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
    sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]


class YamlLoader(_Unaliased, yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-4` is a number, and `no` and `1:30` are text."""


class FastYamlLoader(_Unaliased, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """The same by the parser in C, where PyYAML has one: files take a tenth of the time, errors tell less."""


class Dumper(yaml.SafeDumper):
    """The same scalars, so that what is written reads back."""


for _yaml in (YamlLoader, FastYamlLoader, Dumper):
    _yaml.yaml_implicit_resolvers = {}
    _number = "-+0123456789."
    for _tag, _pattern, _first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("int", r"[-+]?[0-9][0-9_]*", _number),
        ("float", r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", _number),
    ):
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _read_int(loader: SafeConstructor, node: yaml.ScalarNode) -> int:
    # not PyYAML's own, which takes 010 for 8
    return int(loader.construct_scalar(node).replace("_", ""))


for _yaml in (YamlLoader, FastYamlLoader):
    _yaml.add_constructor("tag:yaml.org,2002:int", _read_int)
