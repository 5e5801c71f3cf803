"""What is shown while the command works."""

import io

from rich.console import Console

import jaxtron.preprocess.progress as progress
from jaxtron.preprocess.progress import Progress


def test_a_bar_in_a_terminal_with_lines_above_it():
    output = io.StringIO()
    with Progress(200, Console(file=output, force_terminal=True, width=100)) as shown:
        shown.update(50, documents=1234, text_bytes=10)
        shown.message("left out: in.jsonl line 3: [not] a tag")
    text = output.getvalue()
    assert "25%" in text and "1,234 documents" in text and "[not] a tag" in text


def test_lines_now_and_then_elsewhere(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    output = io.StringIO()
    with Progress(200, Console(file=output)) as shown:
        for step in range(1, 5):
            now = 4.0 * step
            shown.update(50 * step, documents=step, text_bytes=6_000_000)
    # 12 seconds: 10 after the last line, and a first one is not due at once
    assert output.getvalue() == "75%  3 documents  1.5 MB/s\n"
