"""Bad values for every setting, made from its own type and bounds; nothing here knows a setting by name but `TEXTS`."""

import random
import re
from collections.abc import Iterator
from typing import Literal, get_args, get_origin

from jaxtron.config import Config, Setting, settings
from tests.sweep.sweep_cases import Case

BOUND = re.compile(r"(>=|>|<=|<) (\S+?)(?:,|$)")
LONG = "x" * 5000
# of the bad values of a setting, how many are tried
VALUES_MOST = 6


def bad_values(setting: Setting) -> dict[str, list[str]]:
    """Words of a flag that its type or bounds refuse, by what is wrong with them."""
    names = {member if isinstance(member, type) else None for member in setting.members}
    found: dict[str, list[str]] = {}
    if setting.is_section:
        found = {"number": ["7"], "list": ["[a, b]"], "text": ["many"], "unknown_key": ["{nowhere: 1}"]}
    elif setting.is_text and not setting.is_sequence and not choices(setting):
        return {}
    elif setting.is_sequence:
        found = {"nested": ["[[[1]]]"], "empty": [""]}
        if not setting.is_text:
            found |= {"mapping": ["{a: 1}"], "text": ["many"], "nan": [".nan"]}
    elif choices(setting):
        first = str(choices(setting)[0])
        found = {"unknown": ["nowhere"], "misspelt": [first[:-1] + "_"], "capital": [first.upper()], "number": ["7"]}
        found |= {"list": ["[a, b]"], "empty": [""], "unicode": ["größe✓"], "long": [LONG]}
    elif bool in names:
        found = {"word": ["maybe"], "number": ["2"], "list": ["[true, false]"], "empty": [""], "mapping": ["{a: 1}"]}
    else:
        found = {"word": ["many"], "list": ["[1, 2]"], "mapping": ["{a: 1}"], "nan": [".nan"], "empty": [""]}
        found |= {"switch": ["true"], "unicode": ["３"], "long": [LONG], "infinite": [".inf"], "below": ["-.inf"]}
        found |= {"unit": ["1k"]}
        if int in names:
            found |= {"fraction": ["1.5"], "hexadecimal": ["0x10"]}
        for sign, bound in BOUND.findall(setting.bounds):
            step = -1 if sign.startswith(">") else 1
            value = float(bound) + (step if "=" in sign else 0)
            found[f"bound{sign}"] = [str(int(value) if int(value) == value else value)]
    return found


def choices(setting: Setting) -> list:
    """The values of a setting that is one of a few."""
    return [choice for member in setting.members if get_origin(member) is Literal for choice in get_args(member)]


def misspelt(name: str, rng: random.Random) -> str:
    """The name with two letters of its last word exchanged, or one left out."""
    head, dot, last = name.rpartition(".")
    place = rng.randrange(len(last) - 1) if len(last) > 1 else 0
    swapped = last[:place] + last[place + 1 : place + 2] + last[place : place + 1] + last[place + 2 :]
    return head + dot + (swapped if swapped != last else last[:place] + last[place + 1 :])


def setting_cases(config: type[Config], start: tuple[str, ...], *, label: str) -> Iterator[Case]:
    """Every setting with some of its bad values, with no value, and misspelt; `start` is a good line before it."""
    rng = random.Random(12)
    for name, setting in settings(config).items():
        values = bad_values(setting)
        for what in rng.sample(list(values), min(VALUES_MOST, len(values))):
            words = values[what]
            yield Case(f"{label} {name} {what}", (*start, f"--{name}", *words), (name,))
        if bool not in setting.members:
            yield Case(f"{label} {name} missing", (*start, f"--{name}"), (name,))
        wrong = misspelt(name, rng)
        if wrong not in settings(config):
            yield Case(f"{label} {name} misspelt", (*start, f"--{wrong}", "1"), (wrong,))
