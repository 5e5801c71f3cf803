"""The step after which all processes of a run stop, once one of them is asked to.

JAX has the same (`reached_preemption_sync_point`), but waits for its service with Python's lock held; what JAX sends
goes through a thread of ours (`together.py`), which needs that lock.
"""

import threading
from collections.abc import Callable

STOP, AT, LAST = b"stop\n", b"at ", b"last "


class CommonStop:
    """Once one process is asked, each says which step it has come to and waits; process 0 tells all which is the last.

    That is the one after the furthest of theirs, so that no process is beyond it. `send` writes a line to process 0, or
    in process 0 to all others.
    """

    def __init__(self, process: int, num_processes: int, send: Callable[[bytes], None]) -> None:
        self._process, self._num_processes, self._send = process, num_processes, send
        self._changed = threading.Condition()
        self._step = 0
        self._is_asked = False
        self._last: int | None = None
        # in process 0
        self._reported: dict[int, int] = {}

    def ask(self) -> None:
        """All processes are to stop soon; from any thread, any number of times."""
        with self._changed:
            if self._is_asked:
                return
            self._is_asked = True
            step = self._step
        if self._process == 0:
            self._send(STOP)
            self._report(0, step)
        else:
            self._send(AT + b"%d\n" % step)

    def hear(self, other: int, line: bytes) -> bool:
        """Takes a line of another process; False where it is about something else."""
        if line == STOP:
            self.ask()
        elif line.startswith(AT):
            self._report(other, int(line.removeprefix(AT)))
            self.ask()
        elif line.startswith(LAST):
            self._decide(int(line.removeprefix(LAST)))
        else:
            return False
        return True

    def reached(self, step: int) -> bool:
        """Whether the run stops after this step; every process asks after each, and hears the same."""
        with self._changed:
            self._step = step
            while self._is_asked and self._last is None:
                # with an end, so that signals are answered
                self._changed.wait(1.0)
            return self._last is not None and step >= self._last

    def _report(self, other: int, step: int) -> None:
        with self._changed:
            self._reported[other] = step
            if len(self._reported) < self._num_processes:
                return
            last = max(self._reported.values()) + 1
        self._send(LAST + b"%d\n" % last)
        self._decide(last)

    def _decide(self, last: int) -> None:
        with self._changed:
            self._last = last
            self._changed.notify_all()
