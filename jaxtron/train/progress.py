"""Live progress: a bar in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Shows step, loss, tokens/s, MFU where known and the time left; silent unless `shown` (process 0)."""

    def __init__(
        self,
        total_steps: int,
        *,
        shown: bool,
        print_seconds: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total_steps = total_steps
        self._shown = shown
        self._print_seconds = print_seconds
        self._console = console or Console()
        self._clock = clock
        self._last_print: float | None = None
        self._metrics: dict[str, float] = {}
        self._bar: RichProgress | None = None
        if shown and self._console.is_terminal:
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
            # drawing takes the processor from the training it shows
            self._bar = RichProgress(*columns, console=self._console, refresh_per_second=4)
            self._task = self._bar.add_task("compiling", total=total_steps)
            self._bar.start()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Show that `step` is done; `metrics` are those of a logged step, kept until the next."""
        self._metrics.update(metrics or {})
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self._describe(step) or "running")
        elif metrics and self._is_due(step):
            self._last_print = self._clock()
            self.message(f"step {step}/{self._total_steps}  {self._describe(step)}")

    def message(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._console.print(text, highlight=False, markup=False)
        elif self._shown:
            print(text, file=self._console.file, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

    def _is_due(self, step: int) -> bool:
        if self._last_print is None or step == self._total_steps:
            return True
        return self._clock() - self._last_print >= self._print_seconds

    def _describe(self, step: int) -> str:
        formats = {
            "loss": "loss {:.4f}",
            "validation_loss": "validation {:.4f}",
            "tokens_per_second": "{:,.0f} tokens/s",
            "mfu": "MFU {:.1%}",
        }
        parts = [text.format(self._metrics[name]) for name, text in formats.items() if name in self._metrics]
        if "step_seconds" in self._metrics:
            parts.append(f"{format_seconds((self._total_steps - step) * self._metrics['step_seconds'])} left")
        return "  ".join(parts)


def format_seconds(seconds: float) -> str:
    """Return seconds as `m:ss`, `h:mm:ss` or `d days h:mm:ss`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    text = f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{days} day{'s' if days > 1 else ''} {text}" if days else text
