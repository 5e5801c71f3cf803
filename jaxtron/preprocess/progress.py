"""How far the command is: a bar in a terminal, a line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from jaxtron.words import plural

PRINT_SECONDS = 10.0


class Progress:
    """Shows share of the input, documents and speed on standard error; a context manager."""

    def __init__(self, total_bytes: int, console: Console | None = None):
        self._total = max(total_bytes, 1)
        self._console = console or Console(stderr=True)
        self._start = self._printed = time.monotonic()
        self._text_bytes = 0
        self._bar: RichProgress | None = None
        if self._console.is_terminal:
            columns = (TaskProgressColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            # drawing takes the processor from the work it shows
            self._bar = RichProgress(*columns, console=self._console, refresh_per_second=4)
            self._task = self._bar.add_task("starting", total=self._total)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar is not None:
            self._bar.stop()

    def update(self, consumed: int, *, documents: int, text_bytes: int) -> None:
        """Bytes of the input that are done, all documents so far, and the bytes of text since the last update."""
        self._text_bytes += text_bytes
        now = time.monotonic()
        speed = self._text_bytes / max(now - self._start, 1e-9) / 1e6
        description = f"{plural(documents, 'document')}  {speed:.1f} MB/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=consumed, description=description)
        elif now - self._printed >= PRINT_SECONDS:
            self._printed = now
            self.message(f"{consumed / self._total:.0%}  {description}")

    def message(self, text: str) -> None:
        """Prints a line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._console.file, flush=True)
