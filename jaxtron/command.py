"""What every command shares: CONFIG.yaml and flags on its line, `--help`, and one line for an error."""

import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

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

WIDTH = 100
NAME_COLUMN = 36


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
