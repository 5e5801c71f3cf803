"""`python -m jaxtron.launch.child PARENT COMMAND ...`: becomes the command, and is killed once its parent is gone."""

import ctypes
import os
import signal
import sys

# of Linux's prctl: which signal a process gets when its parent ends, however that ends
SET_DEATH_SIGNAL = 1


def main(parent: str, *command: str) -> None:
    """Never returns; what the parent started does not outlive it, for others may have its place by then."""
    ctypes.CDLL(None, use_errno=True).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != int(parent):
        # it ended before we asked
        sys.exit(128 + signal.SIGKILL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"error: cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
