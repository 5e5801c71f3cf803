"""Ctrl-C and SIGTERM, at any moment of a command: it ends at once with one line, or after a piece of work that it asks
to finish first. SIGUSR1, by which clusters announce a time limit, is as SIGTERM.

Python answers a signal only between two of the main thread's instructions, with an exception that imports, callbacks
and C++ lose or print. Here a thread answers, whatever the main thread does: it says so, lets the main thread close its
files for a moment, and ends the process.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGUSR1: "terminated by SIGUSR1"}
# of a command that another process's loss ends, or that waited for others in vain: trying again may help (sysexits.h)
TRY_AGAIN = 75
# a launcher and what stands between it and us may both pass a signal on: no second one, but the same
SAME_SECONDS = 0.1
# how long the main thread may take to close what is open
GRACE_SECONDS = 2.0
FLUSH_SECONDS = 0.2


class StopRequest:
    """What a first signal becomes while some work is to be finished: `is_made` once it came."""

    def __init__(self, notice: str, then: Callable[[], None]) -> None:
        self.is_made = False
        self._made_at = 0.0
        self._notice = notice
        self._then = then

    def make(self, number: int) -> None:
        """Remember the signal; Ctrl-C is answered with the notice."""
        self.is_made = True
        self._made_at = time.monotonic()
        if number == signal.SIGINT:
            _write(self._notice)
        self._then()

    def is_answer_to(self, number: int) -> bool:
        """Whether a signal is the one that was heard a moment ago, sent twice; Ctrl-C is pressed twice on purpose."""
        return self.is_made and number != signal.SIGINT and time.monotonic() < self._made_at + SAME_SECONDS


class _State:
    """How this process answers; `ended_by` is the signal that ends it, `stderr` where the user reads, `heard` and
    `answered` count signals.

    Only while it is working has the main thread something to close: not during imports, nor when all is done.
    """

    is_watching = False
    is_working = False
    heard = answered = 0
    is_raised = is_silent = False
    ended_by: int | None = None
    stderr = 2
    request: StopRequest | None = None

    def __init__(self) -> None:
        self.last_words: list[Callable[[str], None]] = []


_state = _State()


def watch() -> None:
    """Answers the signals of this process from now on; called once, before anything that takes time."""
    if _state.is_watching or threading.current_thread() is not threading.main_thread():
        return
    _state.is_watching, _state.stderr = True, os.dup(2)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in SIGNALS:
        # a command in the background of a script ignores Ctrl-C, and goes on doing so
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _in_main_thread)
    os.register_at_fork(after_in_child=_forget)
    # registered first, called last
    atexit.register(_stop_listening)
    threading.Thread(target=_answer, args=(reader,), name="interrupts", daemon=True).start()


@contextmanager
def finish_first(notice: str, then: Callable[[], None] = lambda: None) -> Iterator[StopRequest]:
    """Makes the first signal a request, which the block may ask for; the second ends the command at once.

    `then` is called when the request is made.
    """
    request = StopRequest(notice, then)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if not _state.is_watching:
        for number in SIGNALS:
            signal.signal(number, _without_watching)
    _state.request = request
    try:
        yield request
    finally:
        _state.request = None
        if not _state.is_watching:
            for number in SIGNALS:
                signal.signal(number, before[number])


@contextmanager
def at_the_end(say: Callable[[str], None]) -> Iterator[None]:
    """Calls `say` with a word or two, should a signal end the process inside the block."""
    _state.last_words.append(say)
    try:
        yield
    finally:
        _state.last_words.remove(say)


@contextmanager
def spared() -> Iterator[None]:
    """Processes started inside never hear the Ctrl-C that a terminal sends to all: this one answers for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_ending() -> bool:
    """Whether a signal is ending the process, so that nothing else is to be said."""
    return _state.ended_by is not None


def exit_code() -> int:
    """What a command returns that a signal ends: 130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1.

    Says it, where nobody has.
    """
    if _state.ended_by is None:
        _write(WORDS[signal.SIGINT])
        return 128 + signal.SIGINT
    return 128 + _state.ended_by


@contextmanager
def ending() -> Iterator[None]:
    """Ends the process after the block, should a signal have ended its work; whatever became of the exception."""
    _state.is_working = True
    try:
        yield
    finally:
        # no exception any more
        _state.is_raised = True
        _await_answers()
        _state.is_working = False
        if _state.ended_by is not None:
            # Python would end by the signal itself, had the exception passed an exec; another exec makes it forget
            exec("")
            # while Python takes itself down, the thread waits, and knows what to do if that takes long
            sys.exit(128 + _state.ended_by)


def _answer(reader: int) -> None:
    while True:
        for number in os.read(reader, 16):
            if number in SIGNALS and _state.ended_by is None:
                _received(number)
            _state.answered += 1


def _await_answers() -> None:
    # what the main thread waited for may have ended by the same Ctrl-C, and the main thread be quicker
    deadline = time.monotonic() + GRACE_SECONDS
    while _state.ended_by is None and _state.answered < _state.heard and time.monotonic() < deadline:
        time.sleep(0.001)


def _stop_listening() -> None:
    # all is done and said; Python takes itself down in a moment, stops the thread first, and gives signals back to the
    # system, which would end by one what has ended well
    _await_answers()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _received(number: int) -> None:
    if _state.request is not None and not _state.request.is_made:
        _state.request.make(number)
        return
    if _state.request is not None and _state.request.is_answer_to(number):
        return
    word = WORDS[signal.Signals(number)]
    was_working, _state.ended_by = _state.is_working, number
    # first of all, for they would tell of the loss of this one
    _kill_workers()
    _write(word)
    for say in _state.last_words:
        say(word)
    # the line is all there is to say: what closes in a hurry may complain
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    _state.is_silent = True
    if was_working:
        # interrupts what the main thread waits for, by this one: Ctrl-C may be ignored (a script's `&`)
        signal.pthread_kill(threading.main_thread().ident or 0, number)
        for _ in range(round(GRACE_SECONDS / 0.01)):
            time.sleep(0.01)
            # what held standard error back for a while gives it back
            os.dup2(nowhere, 2)
    leave(128 + number)


def _in_main_thread(_number: int, _frame: object) -> None:
    # the thread decides, and calls here once it has; a second exception would interrupt what closes
    if _state.ended_by is None:
        _state.heard += 1
    elif _state.is_working and _state.is_silent and not _state.is_raised:
        _state.is_raised = True
        raise KeyboardInterrupt


def _without_watching(number: int, _frame: object) -> None:
    if _state.request is None or _state.request.is_made:
        raise KeyboardInterrupt
    _state.request.make(number)


def _forget() -> None:
    # a fork has the pipe and the handlers, but not the thread: a Ctrl-C is its parent's to answer
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    _state.is_watching = False


def _write(line: str) -> None:
    if not _state.is_watching:
        print(line, file=sys.stderr)
        return
    # a terminal shows ^C and perhaps a bar before it, and has no cursor while there is a bar
    before = "\x1b[?25h\n" if os.isatty(_state.stderr) else ""
    with suppress(OSError):
        os.write(_state.stderr, f"{before}{line}\n".encode())


def say(line: str) -> None:
    """Tells the user a line on standard error, whatever became of that since the command began."""
    _write(line)


def leave(code: int) -> None:
    """Ends the process here and now, from any thread: what was printed is written, workers are ended."""
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    # no thread begins while Python takes itself down, which writes by itself
    with suppress(RuntimeError):
        flush.start()
        # the main thread may stand in a write that nobody reads
        flush.join(FLUSH_SECONDS)
    _kill_workers()
    os._exit(code)


def _kill_workers() -> None:
    processes = sys.modules.get("multiprocessing.process")
    for child in processes.active_children() if processes is not None else ():
        child.kill()


def _is_command() -> bool:
    """Whether Python was started as `python -m jaxtron...` or `jaxtron`, and is no worker of such a process."""
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None and processes.parent_process() is not None:
        return False
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = os.path.basename(sys.argv[0]) if spec is None else spec.name
    return name.partition(".")[0] == "jaxtron"


# by being imported first: the other imports of a command take longer than a user's finger
if _is_command():
    watch()
