"""One command at a time trains in a directory: a lock file that the system takes back from a process that dies."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import jax

from jaxtron.checkpoint.processes import gather_texts
from jaxtron.config import UserError
from jaxtron.run.configuration import LOCK_FILE

# whoever makes it asks the run to save and stop
STOP_FILE = "stop"
# what file systems without locks answer
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

logger = logging.getLogger(__name__)


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Holds the directory for this run, all of whose processes call it; the first one has the lock for all.

    The directory is made, and the file removed in the end. A `UserError` on every process if another command trains
    there, or the directory cannot be written.
    """
    lock, refusal = None, ""
    if jax.process_index() == 0:
        try:
            check_stop_file(directory)
            lock = _acquire(directory)
        except UserError as error:
            refusal = str(error)
    refusal = gather_texts(refusal)[0]
    if refusal:
        raise UserError(refusal)
    try:
        yield
    finally:
        if lock is not None:
            # removed while it is held: whoever waits for this file finds that it is no longer the directory's
            (directory / LOCK_FILE).unlink(missing_ok=True)
            os.close(lock)


def check_stop_file(directory: Path) -> None:
    """`UserError` where a file asks for the run's stop: it would end after its first step."""
    if (directory / STOP_FILE).exists():
        raise UserError(f"{directory / STOP_FILE} asks the run to stop: remove it to go on")


def _acquire(directory: Path) -> int:
    """The open lock file; it says who has it."""
    path = directory / LOCK_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                _flock(lock, path)
                if _is_at(lock, path):
                    _tell_of_stranger(lock, path)
                    os.ftruncate(lock, 0)
                    os.pwrite(lock, _owner().encode(), 0)
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)
    except BlockingIOError:
        owner = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
        raise UserError(
            f"{directory} is being trained by another command{owner and f' ({owner})'}; wait for it, stop it, or "
            "choose another --run.directory"
        ) from None
    except OSError as error:
        reason = os.strerror(errno.ENOTDIR) if isinstance(error, FileExistsError) else error.strerror
        raise UserError(
            f"run.directory {directory} cannot be written to: {reason}; choose another --run.directory"
        ) from error


def _flock(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s cannot be locked (%s): start no second run in this directory", path, error.strerror)


def _is_at(lock: int, path: Path) -> bool:
    """Whether the file is still the one of that name: its last owner may have removed it in the meantime."""
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _tell_of_stranger(lock: int, path: Path) -> None:
    """Says so where the last owner was on another host and did not end by itself: that lock may not reach this one."""
    owner = os.pread(lock, 1000, 0).decode(errors="replace").strip()
    if owner and f" on {socket.gethostname()} since " not in owner:
        logger.warning(
            "%s was left by %s: it was killed, or this file system does not share locks between hosts; make sure that "
            "it has ended",
            path,
            owner,
        )


def _owner() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
