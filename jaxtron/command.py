"""What every command shares: CONFIG.yaml and flags on its line, `--help`, files it writes, one line for an error."""

import argparse
import contextlib
import difflib
import errno
import functools
import importlib
import importlib.metadata
import json
import logging
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from jaxtron import interrupts
from jaxtron.config import (
    FILE_ENDINGS,
    ConfigType,
    SettingsSource,
    UserError,
    dump,
    expand_home,
    gather,
    load,
    take_file,
)
from jaxtron.help import WIDTH, help_text
from jaxtron.quiet import import_jax

# what a file system says that takes no more: full, a quota, a file too large
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what a file system says of a name, whatever is asked of it
UNREACHABLE = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.EIO, errno.ESTALE)
# not a negative number
FLAG = re.compile("--?[A-Za-z]")
# of a flag; what Python, NumPy and files of indices can hold
WHOLE = re.compile("[0-9]{1,4000}")
LARGEST = 2**63 - 1
# of an error line
LONGEST_WORD = 160
# bytes of the name of a file that is written: file systems take 255, with the ending that it has until it is whole
LONGEST_NAME = 255 - len(".new")
# how a page begins that a command wrote, by which a later one knows that it may replace the file
PAGE = "<!doctype html>\n<!-- a page of jaxtron -->"


HELP = ("-h", "--help")
PRINT = ("--print_config", "--print-config")


def configure(
    config_type: type[ConfigType],
    argv: Sequence[str],
    *,
    program: str,
    purpose: str,
    flags: str = "",
    under: Callable[[SettingsSource], SettingsSource | None] = lambda given: None,
) -> ConfigType | None:
    """The configuration that a command line `[CONFIG.yaml] [--name value ...]` asks for.

    None where it was only printed, or help: `--print_config`, `--help`, `--help SECTION ...`. What was left out of it,
    for flags make it useless, is printed. `flags` are lines of help on the command's own. `under` is shown the settings
    of file and flags, and gives others that lie below them.
    """
    line = list(argv)
    topics = _take_topics(line)
    shows = any(word in PRINT for word in line)
    path, options = take_file(config_type, [word for word in line if word not in PRINT])
    if topics is not None:
        print(help_text(config_type, path, options, program=program, purpose=purpose, flags=flags, topics=topics))
        return None
    below = under(gather(config_type, path, options))
    tell = functools.partial(print, file=sys.stderr if shows else sys.stdout)
    config = load(config_type, path, options, under=below, tell=tell)
    if shows:
        print(dump(config.resolved()), end="")
        return None
    return config


def _take_topics(line: list[str]) -> list[str] | None:
    """Removes `--help` and the sections after it from a line; None where it is not asked for."""
    place = next((place for place, word in enumerate(line) if word in HELP), None)
    if place is None:
        return None
    end = place + 1
    while end < len(line) and not line[end].startswith("-") and not line[end].endswith(FILE_ENDINGS):
        end += 1
    topics = line[place + 1 : end]
    del line[place:end]
    return topics


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
        add_help: bool = True,
    ):
        super().__init__(
            prog=program,
            usage=usage,
            description=_wrapped(purpose),
            epilog=None if further is None else _wrapped(further),
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=WIDTH),
            allow_abbrev=False,
            add_help=add_help,
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
        earlier = ""
        for word in words:
            flag = word.partition("=")[0]
            if word == "--":
                return
            if not word and earlier in known or flag in known and word == f"{flag}=":
                raise UserError(f"{flag or earlier} needs a value; {self.prog} --help lists the flags")
            earlier = word
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
    if not WHOLE.fullmatch(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return _countable(text)


def natural(text: str) -> int:
    """A flag's whole number, 0 or above."""
    if not WHOLE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 0 or above")
    return _countable(text)


def positive_number(text: str, *, example: str = "") -> float:
    """A flag's number above 0, finite; an error may give an example."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        such = f", such as {example}" if example else ""
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0{such}")
    return value


def _countable(text: str) -> int:
    if int(text) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} must be at most {LARGEST:,}")
    return int(text)


def file_name(text: str) -> str:
    """A flag's file or folder, or the beginning of a file's name; `~` is the home directory."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text names no file; leave the flag out or give a name")
    return expand_home(text)


def file_path(text: str) -> Path:
    """A flag's file or folder as a path; `~` is the home directory."""
    return Path(file_name(text))


def check_output(flag: str, path: Path) -> None:
    """`UserError` unless a file can be written there, before the work whose result it is to hold.

    A file that is there is replaced only if it may be an earlier result: by its content, JSON by being one object.
    """
    folder = path.parent
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise UserError(
            f"{flag} {path.name[:40]}...: a file's name has at most {LONGEST_NAME} bytes; give a shorter one"
        )
    if os.path.isdir(path):
        reason = f"{path} is a folder"
    elif os.path.isfile(path) and os.path.getsize(path) and not _is_earlier_result(path):
        raise UserError(f"{flag} {path}: the file is there, and no earlier result of such a command; give another name")
    elif not os.path.isdir(folder):
        reason = f"{folder} is no folder" if os.path.exists(folder) else f"there is no folder {folder}"
    elif not os.access(folder, os.W_OK):
        reason = f"the folder {folder} cannot be written"
    else:
        return
    raise UserError(f"{flag} {path}: {reason}; give a file in a folder that can be written")


def _is_earlier_result(path: Path) -> bool:
    """Whether a file looks like what a command writes under such a name: figure, page, program, table or object."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
            if head.startswith(b"{"):
                return isinstance(json.loads(head + file.read()), dict)
    except (OSError, ValueError, RecursionError):
        return False
    return head.startswith((b"\x89PNG", b"\x93NUMPY", b"HloModule", b"gpu:", PAGE.encode())) or path.suffix == ".csv"


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, WIDTH, break_on_hyphens=False))


def place_advice(error: OSError, flag: str) -> str:
    """What to do about a file that cannot be written: make room, or choose another place with a flag."""
    return f"make room or change {flag}" if error.errno in FULL else f"change {flag}"


def write_whole(path: Path, content: str | bytes, *, advice: str | None = None) -> None:
    """Writes a file whole or not at all, whenever the command is killed; a UserError, with advice, if it cannot."""
    replacement = path.with_name(path.name + ".new")
    try:
        try:
            with replacement.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                # a full disk may show only now
                os.fsync(file.fileno())
            replacement.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                replacement.unlink()
            raise
    except OSError as error:
        advice = advice or ("make room" if error.errno in FULL else "write elsewhere")
        raise UserError(f"cannot write {path}: {error.strerror}; {advice}") from None


def hand_over(module: str, *, jax: bool = True) -> ModuleType:
    """The module that does a verb's work, imported once its command line was read: JAX takes seconds to import."""
    if jax:
        import_jax()
    return importlib.import_module(module)


def version_text() -> str:
    """Jaxtron's version, and those of what computes."""
    versions = {}
    for package in ("jaxtron", "jax", "jaxlib", "flax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def _shortened(word: str) -> str:
    """A word as it is, or one that nobody can read by its beginning and end."""
    return word if len(word) <= LONGEST_WORD else f"{word[: LONGEST_WORD // 2]}...{word[-LONGEST_WORD // 4 :]}"


def run_command(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a command's `main`; bad input or a full disk is `error: ...` and 2, Ctrl-C a line and 130."""
    with interrupts.ending(), _plain_log():
        return _run(main, list(sys.argv[1:] if argv is None else argv))


class _Lines(logging.Handler):
    """What is logged as plain lines on standard error, whatever that is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print("warning:", " ".join(self.format(record).split()), file=sys.stderr)


@contextlib.contextmanager
def _plain_log() -> Iterator[None]:
    """Warnings of Jaxtron's are lines for a person; no library's handler repeats them with the name of a module."""
    logger, lines = logging.getLogger("jaxtron"), _Lines(logging.WARNING)
    before = logger.propagate
    logger.addHandler(lines)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.propagate = before


def _run(main: Callable[[list[str]], int | None], words: list[str]) -> int:
    try:
        if "--version" in words:
            print(version_text())
            return 0
        code = main(words) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        print("error:", " ".join(map(_shortened, str(error).split())), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return interrupts.exit_code()
    except BrokenPipeError:
        # the reader of our output left (`--help | head`)
        _drop_output()
        return 141
    except OSError as error:
        if error.errno in UNREACHABLE and error.filename is not None:
            # raised even by asking whether there is such a file
            print(f"error: {_shortened(str(error.filename))}: {error.strerror}", file=sys.stderr)
            return 2
        if error.errno not in FULL:
            raise
        # whatever is written, the standard output too (`> log`)
        where = error.filename or "the output"
        print(f"error: cannot write {where}: {error.strerror}; make room and run it again", file=sys.stderr)
        _drop_output()
        return 2


def _drop_output() -> None:
    # Python would complain once more while closing what cannot be written; a test's output is no file
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
