"""What every thread of this process is doing: on standard error, in a file, and the main thread's in a line."""

import faulthandler
import signal
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path

# where the user reads, whatever became of `sys.stderr`
STDERR = 2
FOLDER = "stacks"
# of the frames of the main thread in a line
INNERMOST = 4


def show_on_signal() -> None:
    """From now on SIGUSR2 prints all stacks, even of a process that holds Python's lock in C++."""
    faulthandler.register(signal.SIGUSR2, file=STDERR, all_threads=True)


def show(directory: Path, process: int, heading: str) -> None:
    """Prints all stacks, and adds them to `stacks/process_N.txt` of a run's directory, below a heading."""
    faulthandler.dump_traceback(STDERR, all_threads=True)
    # a file system that hangs may be the very cause: by then it is printed
    with suppress(OSError):
        (directory / FOLDER).mkdir(exist_ok=True)
        with (directory / FOLDER / f"process_{process}.txt").open("a") as file:
            print(heading, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)


def place() -> str:
    """Where the main thread is, innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = traceback.extract_stack(frame)[-INNERMOST:]
    return " < ".join(f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in reversed(frames))


def is_debugged() -> bool:
    """Whether a debugger has the main thread: whoever looks at a breakpoint takes their time."""
    monitoring = getattr(sys, "monitoring", None)
    if monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None:
        return True
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_trace is not None:
            return True
        frame = frame.f_back
    return False
