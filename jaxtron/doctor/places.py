"""Directories that a run writes to: room, rights, files, and how fast they are."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from jaxtron.doctor.finding import Finding, doubt, fault, good
from jaxtron.words import readable_bytes

BLOCK = 2**22
WRITTEN, SECONDS = 2**26, 1.0
# bytes a second; and seconds that a checkpoint may take all the same
SLOW, SHORT = 50e6, 60.0
FEW_FILES = 10_000


def check_place(name: str, directory: Path, needed: int = 0) -> Iterator[Finding]:
    """One directory, or where it will be made; `needed` bytes have to fit."""
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        yield fault("disk", f"{name} {directory}: {there} is no folder", f"give another --{name}")
        return
    if not os.access(there, os.W_OK | os.X_OK):
        yield fault("disk", f"{name} {directory}: {there} cannot be written", f"change its rights, or --{name}")
        return
    found = os.statvfs(there)
    free = found.f_bavail * found.f_frsize
    if free < max(needed, 2 * WRITTEN):
        what = f" and {readable_bytes(needed)} are needed" if needed else ""
        yield fault(
            "disk", f"{name} {directory}: {readable_bytes(free)} are free{what}", f"make room, or change --{name}"
        )
        return
    if 0 < found.f_files and found.f_favail < FEW_FILES:
        yield doubt("disk", f"{name} {directory}: only {found.f_favail:,} more files fit", "remove files")
    try:
        rate = _write(there)
    except OSError as error:
        yield fault("disk", f"{name} {directory}: cannot write: {error.strerror}", f"make room, or change --{name}")
        return
    text = f"{name} {directory}: {readable_bytes(free)} free, {readable_bytes(rate)}/s"
    if rate < SLOW and (not needed or needed / rate > SHORT):
        wait = f": a checkpoint takes {needed / rate:,.0f} s" if needed else ""
        yield doubt("disk", f"{text}{wait}", "write to a faster disk, or save less often (checkpoint.every)")
    else:
        yield good("disk", text)


def _write(folder: Path) -> float:
    """Bytes a second of a file that is written to the disk itself, and removed."""
    file = folder / f".jaxtron-doctor-{os.getpid()}"
    block = os.urandom(BLOCK)
    start = time.monotonic()
    written = 0
    try:
        with file.open("xb", buffering=0) as out:
            while written < WRITTEN and time.monotonic() < start + SECONDS:
                written += out.write(block)
                os.fsync(out.fileno())
    finally:
        file.unlink(missing_ok=True)
    return written / (time.monotonic() - start)
