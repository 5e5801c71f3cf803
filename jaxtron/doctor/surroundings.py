"""What a check may ask of the machine, so that a test can answer in its place."""

import importlib.metadata
import os
import resource
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# a driver in trouble may never answer
COMMAND_SECONDS = 10.0
ABSENT, SILENT = 127, 124


@dataclass(frozen=True)
class Answer:
    """A program's exit code and what it wrote; ABSENT where there is none, SILENT where it did not end in time."""

    code: int
    text: str


def ask(command: Sequence[str]) -> Answer:
    """Runs a program that only looks."""
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=COMMAND_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Answer(SILENT, "")
    except OSError:
        return Answer(ABSENT, "")
    return Answer(result.returncode, result.stdout)


def installed(package: str) -> str | None:
    """The version of a Python package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _environment() -> Mapping[str, str]:
    return dict(os.environ)


@dataclass(frozen=True)
class Surroundings:
    """Files below `root`, variables, programs, packages, limits and processors of this machine."""

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=_environment)
    ask: Callable[[Sequence[str]], Answer] = ask
    version: Callable[[str], str | None] = installed
    limit: Callable[[int], tuple[int, int]] = resource.getrlimit
    processors: int = os.cpu_count() or 1
    usable: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    host: str = socket.gethostname()
    resolve: Callable[[str], str] = socket.gethostbyname

    def path(self, name: str) -> Path:
        """A file of the machine, such as /dev/shm."""
        return self.root / name.lstrip("/")

    def text(self, name: str) -> str | None:
        """What such a file says, or None."""
        try:
            return self.path(name).read_text().strip()
        except OSError:
            return None
