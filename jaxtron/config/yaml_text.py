"""YAML as configurations are written: YAML 1.2's scalars, read and written."""

import re

import yaml
from yaml.constructor import SafeConstructor


class YamlLoader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-4` is a number, and `no` and `1:30` are text."""


class FastYamlLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
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
