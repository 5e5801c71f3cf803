"""What every command shares: CONFIG.yaml and flags on its line, `--help`, files it writes, one line for an error."""

import argparse
import difflib
import importlib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from pydantic_core import PydanticUndefined

from jaxtron.config import (
    Config,
    ConfigType,
    Setting,
    Source,
    UserError,
    format_value,
    gather,
    load,
    settings,
    split_arguments,
)
from jaxtron.quiet import import_jax

WIDTH = 100
NAME_COLUMN = 36
# not a negative number
FLAG = re.compile("--?[A-Za-z]")


def configure(config_type: type[ConfigType], argv: Sequence[str], *, program: str, purpose: str) -> ConfigType | None:
    """The configuration that a command line `[CONFIG.yaml] [--name value ...]` asks for, or None: help was printed."""
    options = [argument for argument in argv if argument not in ("-h", "--help")]
    words, _ = split_arguments(config_type, options)
    if len(words) > 1:
        raise UserError(f"unexpected argument {words[1]!r}: one CONFIG.yaml, then settings as --name value")
    path = Path(words[0]) if words else None
    for word in words:
        options.remove(word)
    if len(options) + len(words) < len(argv):
        print(help_text(config_type, path, options, program=program, purpose=purpose))
        return None
    return load(config_type, path, options)


def help_text(
    config_type: type[Config], path: Path | None, overrides: Sequence[str] = (), *, program: str, purpose: str
) -> str:
    """Every setting with its meaning, type and default (in the given file, where there is one), by section."""
    source = gather(config_type, path, overrides)
    lines = [f"usage: {program} [CONFIG.yaml] [--name value ...]", "", *textwrap.wrap(purpose, WIDTH), ""]
    lines += textwrap.wrap(
        "Lists: --name a b, or --name '[a, b]'. Switches: --name, or --name false. "
        f"Defaults shown are {f'those of {path}' if path else 'those without a CONFIG.yaml'}.",
        WIDTH,
    )
    known = settings(config_type)
    lines += ["", "settings"]
    lines += [line for s in known.values() if "." not in s.name and not s.is_section for line in _entry(s, source)]
    for section in known.values():
        contents = [s for s in known.values() if s.name.startswith(f"{section.name}.") and not s.is_section]
        if "." in section.name or not contents:
            continue
        lines += ["", *textwrap.wrap(f"{section.name}: {_about(section)}", WIDTH, subsequent_indent="  ")]
        lines += [line for setting in contents for line in _entry(setting, source)]
    return "\n".join(lines)


def _about(section: Setting) -> str:
    documentation = next((m.__doc__ for m in section.members if getattr(m, "__doc__", None)), "")
    return section.meaning or documentation.strip().split("\n\n")[0]


def _entry(setting: Setting, source: Source) -> list[str]:
    value = source.get(setting.name)
    default = setting.default if value is PydanticUndefined else value
    shown = "required" if default is PydanticUndefined else f"default {format_value(default) or 'empty'}"
    kind = f"({setting.type_text}; {shown})"
    room = WIDTH - NAME_COLUMN
    if len(setting.meaning) + 1 + len(kind) <= room:
        text = [f"{setting.meaning} {kind}".strip()]
    else:
        text = [line for part in (setting.meaning, kind) for line in textwrap.wrap(part, room, break_on_hyphens=False)]
    name = f"  --{setting.name}"
    if len(name) >= NAME_COLUMN:
        return [name, *(" " * NAME_COLUMN + line for line in text)]
    return [name.ljust(NAME_COLUMN) + text[0], *(" " * NAME_COLUMN + line for line in text[1:])]


class FlagParser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, that takes no abbreviations, and whose help is as wide as ours.

    A flag is known if it was added or is `--` and one of `others`, which `parse_known_args` leaves for another parser.
    """

    def __init__(
        self,
        program: str,
        purpose: str,
        *,
        usage: str | None = None,
        further: str | None = None,
        others: Collection[str] = (),
    ):
        super().__init__(
            prog=program,
            usage=usage,
            description=_wrapped(purpose),
            epilog=None if further is None else _wrapped(further),
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=WIDTH),
            allow_abbrev=False,
        )
        self._others = others

    def parse_known_args(self, args=None, namespace=None):
        # before argparse, which would speak of what is missing because a flag was misspelt
        self._check_flags(list(args or ()))
        return super().parse_known_args(args, namespace)

    def _check_flags(self, words: Sequence[str]) -> None:
        """Refuses flags that nobody knows, and a flag of one value that is given twice."""
        known = [flag for action in self._actions for flag in action.option_strings]
        several = {flag for action in self._actions if action.nargs == "+" for flag in action.option_strings}
        seen: set[str] = set()
        for word in words:
            flag = word.partition("=")[0]
            if word == "--":
                return
            if not FLAG.match(flag) or flag[2:] in self._others:
                continue
            if flag not in known:
                near = difflib.get_close_matches(flag, [*known, *(f"--{other}" for other in self._others)], n=1)
                hint = f"did you mean {near[0]}?" if near else f"{self.prog} --help lists the flags"
                raise UserError(f"unknown flag {flag}; {hint}")
            if flag in seen - several:
                raise UserError(f"{flag} is given twice; keep one")
            seen.add(flag)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; {self.prog} --help lists the flags")


def positive(text: str) -> int:
    """A flag's whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def natural(text: str) -> int:
    """A flag's whole number, 0 or above."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 0 or above")
    return int(text)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, WIDTH, break_on_hyphens=False))


def write_whole(path: Path, text: str, *, advice: str = "") -> None:
    """Writes a file whole or not at all, whenever the command is killed; a UserError, with the advice, if it cannot."""
    replacement = path.with_name(path.name + ".new")
    try:
        replacement.write_text(text, encoding="utf-8")
        replacement.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}{advice and '; '}{advice}") from None


def hand_over(module: str) -> ModuleType:
    """The module that does a verb's work, imported once its command line was read: JAX takes seconds to import."""
    import_jax()
    return importlib.import_module(module)


def run_command(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a command's `main`; bad input is `error: ...` and 2, Ctrl-C is a line and 130, a defect a traceback."""
    try:
        code = main(list(sys.argv[1:] if argv is None else argv)) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output left (`--help | head`); Python would complain once more while closing it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
