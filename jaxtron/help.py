"""What `--help` prints of a configuration."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from pydantic_core import PydanticUndefined

from jaxtron.config import Config, Setting, SettingsSource, UserError, format_value, gather, nearest, settings

WIDTH = 100
NAME_COLUMN = 36


def help_text(
    config_type: type[Config],
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    program: str,
    purpose: str,
    flags: str = "",
    topics: Sequence[str] = (),
) -> str:
    """Settings with their meaning, type and default (in the given file, where there is one), by section.

    `flags` are lines about flags that are no settings. `topics` are the sections or settings to show (none: all); a
    `UserError` for one that does not exist.
    """
    source = gather(config_type, path, overrides)
    known = settings(config_type)
    for topic in topics:
        if topic not in known:
            raise UserError(f"--help {topic}: no such section or setting{nearest(topic, known)}")
    lines = [f"usage: {program} [CONFIG.yaml] [--name value ...]", "", *textwrap.wrap(purpose, WIDTH), ""]
    lines += textwrap.wrap(
        "Lists: --name a b, or --name '[a, b]'. Switches: --name, or --name false. --help SECTION shows one section, "
        "--print_config the configuration that would run, --version what is installed. "
        f"Defaults shown are {f'those of {path}' if path else 'those without a CONFIG.yaml'}.",
        WIDTH,
    )
    if topics:
        chosen = [s for s in known.values() if any(f"{s.name}.".startswith(f"{topic}.") for topic in topics)]
        return "\n".join([line for setting in chosen if not setting.is_section for line in _entry(setting, source)])
    if flags:
        lines += ["", flags]
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


def _entry(setting: Setting, source: SettingsSource) -> list[str]:
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
