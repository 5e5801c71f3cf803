"""What the sweep holds every bad command line and every damaged input to."""

import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxtron.__main__ import main
from jaxtron.run.step import Trainer
from tests.support.commands import Ended, run_main

# an error is read in a terminal; a longer one says too much or repeats what it was given
LONGEST = 400
# cases of each kind in the short lane
SHORT = 15
# what a command says on its way; nothing else may come before an error
PROGRESS = re.compile(r"starting JAX|reading the data|read as\b.*|.*: \d+ in [\d.]+ s")
STARTED = Ended(0, "the work would have begun", "")


class WorkStarted(BaseException):
    """The command has checked everything and would begin."""


@dataclass(frozen=True)
class Case:
    """A line after `jaxtron`, and fragments one of which the error must have: the setting or the file that is wrong."""

    name: str
    words: tuple[str, ...]
    mentions: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """How a command ended: as `Ended`, what it raised instead, warnings, and the files below a folder after it."""

    ended: Ended
    defects: tuple[str, ...]
    before: dict[str, str]
    after: dict[str, str]

    @property
    def changes(self) -> list[str]:
        """Files and folders that the command made, changed or removed."""
        paths = sorted(
            path for path in self.before.keys() | self.after.keys() if self.before.get(path) != self.after.get(path)
        )
        what = {
            path: "left" if path not in self.before else "removed" if path not in self.after else "changed"
            for path in paths
        }
        return [f"{what[path]}: {path}" for path in paths]


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder below one, with a hash of what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = content
    return found


@contextmanager
def nothing_starts() -> Iterator[None]:
    """Where a model would get its first values or be compiled, `WorkStarted` instead."""

    def refuse(*_, **__):
        raise WorkStarted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "initial_state", refuse)
        patch.setattr("jaxtron.plan.show.rehearse", refuse)
        patch.setattr("jaxtron.plan.show.search", refuse)
        yield


def run_in(folder: Path, words: Sequence[str]) -> Result:
    """`jaxtron WORDS`, up to where its work would begin; `folder` is the working directory."""
    before, defects, ended = snapshot(folder), [], STARTED
    with warnings.catch_warnings(record=True) as warned, nothing_starts():
        warnings.simplefilter("always")
        try:
            ended = run_main(main, words)
        except WorkStarted:
            pass
        except Exception as error:
            defects.append(f"a traceback: {type(error).__name__}: {str(error)[:200]}")
        except SystemExit as error:
            defects.append(f"left by SystemExit {error.code}")
    defects += [f"a warning: {warning.message}" for warning in warned]
    return Result(ended, tuple(defects), before, snapshot(folder))


def error_faults(result: Result, mentions: Sequence[str]) -> list[str]:
    """What is wrong with how a refused command ended; empty where nothing is.

    Right is: exit code 2, one line `error: ...` that is short and has one of `mentions`, after nothing but progress, no
    warning, no traceback, and every file and folder as it was.
    """
    ended = result.ended
    found = list(result.defects)
    if ended == STARTED:
        return found or ["was taken for good: its work would have begun"]
    if ended.code != 2:
        return [*found, f"exit code {ended.code}, not 2; it printed {ended.out[:200]!r} {ended.err[:200]!r}"]
    *before, line = ended.err.splitlines() or [""]
    before += ended.out.splitlines()
    if not line.startswith("error: ") or not ended.err.endswith("\n"):
        found.append(f"does not end with a line that begins with `error: `: {ended.err[:600]!r}")
    elif len(line) > LONGEST:
        found.append(f"{len(line)} characters: {line}")
    # one of a pair of token files is named by what both share
    elif not any(fragment.removesuffix(".bin")[:40] in line for fragment in mentions):
        found.append(f"does not name {' or '.join(mentions)}: {line}")
    if not all(map(PROGRESS.fullmatch, before)):
        found.append(f"said before the error: {before[:5]}")
    return found + result.changes


def shortlist(count: int) -> set[int]:
    """Of so many cases in a row, the numbers of those in the short lane: spread over all."""
    return {round((number + 0.5) * count / SHORT) for number in range(SHORT)}
