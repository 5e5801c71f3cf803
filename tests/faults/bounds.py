"""Bounds of one case, CPU seconds and memory: a hang or a huge allocation is a finding, and no end of the run."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CPU_SECONDS = 30.0
MOST_BYTES = 2 << 30
"""Of address space that a case may take beside what the process has; the libraries' threads take some too."""


class TooLong(BaseException):
    """A case has used its CPU seconds."""


@dataclass
class Spent:
    """What a case took: `bytes` is the growth of the most memory that was in use."""

    bytes: int = 0


@contextmanager
def bounded(seconds: float = CPU_SECONDS, most: int = MOST_BYTES) -> Iterator[Spent]:
    """`TooLong` after so many CPU seconds of the block, and `MemoryError` beyond so much memory."""

    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    size, most_before = _status("VmSize"), _reset()
    resource.setrlimit(resource.RLIMIT_AS, (_least(size + most, limit[1]), limit[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    spent = Spent()
    try:
        yield spent
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, limit)
        spent.bytes = max(0, _status("VmHWM") - most_before)


def _least(wanted: int, hard: int) -> int:
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)


def _reset() -> int:
    """Sets the most memory that was in use to what is in use now, and gives it back."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
