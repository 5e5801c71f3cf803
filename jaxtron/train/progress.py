"""Live progress: a bar in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import ProgressColumn, Task
from rich.text import Text

MOST_BAR, LEAST_BAR = 40, 5
# which figures leave a narrow terminal first
DROPPED = ("mfu", "validation_loss", "tokens_per_second", "step_seconds", "loss")


class TrainProgress:
    """Shows step, loss, tokens/s, MFU where known and the time left; silent unless `shown` (process 0).

    A run that continues begins at `first_step`, the steps done before.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        shown: bool,
        first_step: int = 0,
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
            # drawing takes the processor from the training it shows
            self._bar = RichProgress(_Line(self._console), console=self._console, refresh_per_second=4)
            self._task = self._bar.add_task(
                "", total=total_steps, completed=first_step, figures={"step_seconds": "compiling"}
            )
            self._bar.start()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Show that `step` is done; `metrics` are those of a logged step, kept until the next."""
        self._metrics.update(metrics or {})
        if not self._shown:
            return
        if self._bar is not None:
            figures = self._figures(step) or {"step_seconds": "running"}
            self._bar.update(self._task, completed=step, figures=figures)
        elif metrics and self._is_due(step):
            self._last_print = self._clock()
            self.message("  ".join([f"step {step}/{self._total_steps}", *self._figures(step).values()]))

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

    def _figures(self, step: int) -> dict[str, str]:
        """By the metric's name, what is shown of each."""
        formats = {
            "loss": "loss {:.4f}",
            "validation_loss": "validation {:.4f}",
            "tokens_per_second": "{:,.0f} tokens/s",
            "mfu": "MFU {:.1%}",
        }
        shown = {name: text.format(self._metrics[name]) for name, text in formats.items() if name in self._metrics}
        if self._metrics.get("skipped_steps"):
            shown["skipped_steps"] = f"skipped {self._metrics['skipped_steps']:,.0f}"
        if "step_seconds" in self._metrics:
            seconds = (self._total_steps - step) * self._metrics["step_seconds"]
            shown["step_seconds"] = f"{format_seconds(seconds)} left"
        return shown


class _Line(ProgressColumn):
    """The step, a bar and the figures in one line of the terminal: a narrow one loses figures, never the step."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        """The line for the terminal's width of now."""
        step, figures = f"step {task.completed:.0f}/{task.total:.0f}", dict(task.fields["figures"])
        for name in DROPPED:
            room = self._console.width - len("  ".join([step, *figures.values()]))
            if room >= 0:
                break
            figures.pop(name, None)
        room = self._console.width - len("  ".join([step, *figures.values()])) - 1
        width = min(MOST_BAR, room) if room >= LEAST_BAR else 0
        done = round(width * (task.percentage / 100))
        bar = (" " if width else "", ("━" * done, "bar.complete"), ("━" * (width - done), "bar.back"))
        return Text.assemble(step, *bar, "".join(f"  {text}" for text in figures.values()), no_wrap=True)


def format_seconds(seconds: float) -> str:
    """Return seconds as `m:ss`, `h:mm:ss` or `d days h:mm:ss`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    text = f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{days} day{'s' if days > 1 else ''} {text}" if days else text
