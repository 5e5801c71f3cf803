"""Progress in a terminal and in a log file."""

import io
import re

import pytest
from rich.console import Console

from jaxtron.train.progress import TrainProgress, format_seconds

METRICS = {"loss": 2.34567, "tokens_per_second": 24123.4, "mfu": 0.4123, "step_seconds": 0.5}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_log_gets_a_plain_line_now_and_then():
    now, stream = 0.0, io.StringIO()
    progress = TrainProgress(600, shown=True, print_seconds=10.0, console=Console(file=stream), clock=lambda: now)
    for step in range(1, 601):
        now += 1
        progress.update(step, METRICS if step % 5 == 0 else None)
    progress.message("checkpoint saved")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 5/600  loss 2.3457  24,123 tokens/s  MFU 41.2%  4:58 left"
    assert [line.split("/")[0] for line in lines[:3]] == ["step 5", "step 15", "step 25"]
    assert lines[-2].startswith("step 600/600") and lines[-1] == "checkpoint saved"
    assert len(lines) == 62


def test_mfu_is_left_out_where_unknown_and_validation_stays():
    stream = io.StringIO()
    progress = TrainProgress(10, shown=True, print_seconds=1e-9, console=Console(file=stream))
    progress.update(5, {"loss": 2.0, "validation_loss": 2.5})
    progress.update(6, {"loss": 1.0})
    assert stream.getvalue().splitlines() == [
        "step 5/10  loss 2.0000  validation 2.5000",
        "step 6/10  loss 1.0000  validation 2.5000",
    ]


def test_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    progress = TrainProgress(600, shown=True, console=Console(file=stream))
    progress.update(1)
    progress.update(300, METRICS)
    progress.message("checkpoint saved")
    progress.close()
    output = stream.getvalue()
    for part in ("300/600", "loss 2.3457", "24,123 tokens/s", "MFU 41.2%", "2:30 left", "checkpoint saved"):
        assert part in output


@pytest.mark.parametrize("width", [20, 40, 60, 80, 160])
def test_a_narrow_terminal_loses_figures_and_never_the_step(width):
    stream = Terminal()
    console = Console(file=stream, width=width, color_system=None, force_terminal=True)
    progress = TrainProgress(600_000, shown=True, first_step=1234, console=console)
    progress.update(300_000, METRICS | {"validation_loss": 2.5})
    progress.close()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n").split("\n")
    lines = [line for line in lines if line]
    # a run that continues begins where it was
    assert lines[0].startswith("step 1234/600000")
    assert lines[-1].startswith("step 300000/600000")
    assert all(len(line) <= width and "…" not in line for line in lines)
    figures = ("loss 2.3457", "1 day 17:40:00 left", "24,123 tokens/s", "validation 2.5000", "MFU 41.2%")
    assert [text in lines[-1] for text in figures] == [width >= least for least in (40, 60, 80, 160, 160)]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_processes_print_nothing(stream):
    progress = TrainProgress(10, shown=False, console=Console(file=stream))
    progress.update(10, METRICS)
    progress.message("hello")
    progress.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0:00"),
        (59.6, "1:00"),
        (3599.0, "59:59"),
        (3600.0, "1:00:00"),
        (90061.0, "1 day 1:01:01"),
        (180000.0, "2 days 2:00:00"),
    ],
)
def test_time_left(seconds, text):
    assert format_seconds(seconds) == text
