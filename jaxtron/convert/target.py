"""A directory that is there whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxtron import interrupts
from jaxtron.command import FULL
from jaxtron.config import UserError
from jaxtron.words import readable_bytes


def check_new(flag: str, path: Path) -> None:
    """`UserError` unless nothing is there, in a folder that can be written or made."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{flag} {path} is there already; give a new directory")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {path}: {folder} is no folder that can be written; give another place")


@contextlib.contextmanager
def whole_directory(flag: str, path: Path) -> Iterator[Path]:
    """A directory beside `path` that becomes it at the end of the block, and is removed if that fails.

    A kill leaves it under a name that begins with a dot. `UserError` where it cannot be written, or something is there
    that is no empty directory.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".unfinished", dir=path.parent))
        try:
            yield made
            if interrupts.is_ending():
                # the exception of a signal may be lost on its way
                raise KeyboardInterrupt
            # as a directory that anyone makes
            made.chmod(0o777 & ~_umask())
            if path.exists() and not (path.is_dir() and not any(path.iterdir())):
                raise UserError(f"{flag} {path} was made by another command meanwhile; give a new directory")
            made.rename(path)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    except OSError as error:
        advice = "make room" if error.errno in FULL else "give another place"
        raise UserError(f"{flag} {path} cannot be written: {error.strerror or error}; {advice}") from None


def check_room(flag: str, directory: Path, needed: int) -> None:
    """`UserError` unless the disk of a directory has room for so many bytes, as far as it knows."""
    disk = shutil.disk_usage(directory)
    if disk.total > 0 and disk.free < needed:
        raise UserError(
            f"{flag}: it takes {readable_bytes(needed)}, and {readable_bytes(disk.free)} are left on that disk; make "
            "room or give another place"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
