"""What a line of `metrics.jsonl` says of the steps since the line before, whatever happened between them."""

import json
import re
from pathlib import Path

import pytest

from jaxtron.train import loop
from tests.support.command_runs import FinishedRun, records, run_here, small

DOCUMENTED = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.mark.slow
def test_lines_are_means_that_no_interruption_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flags = "--train.steps 10 --train.validate_every 0 --train.sample_tokens 0 --optimizer.learning_rate 1e-2"
    flags = [*flags.split(), "--checkpoint.every", "100"]
    each = run_here(*small(tmp_path, run="each"), *flags)
    losses = [line["loss"] for line in records(tmp_path / "each")]
    assert each.code == 0 and len(losses) == 10 and losses[-1] < losses[0] - 0.1

    flags += ["--run.log_every", "4"]
    assert run_here(*small(tmp_path, run="whole"), *flags).code == 0
    whole = records(tmp_path / "whole")
    assert [line["step"] for line in whole] == [4, 8, 10]
    assert [line["tokens"] for line in whole] == [step * 8 * 32 for step in (4, 8, 10)]
    for line, mean in zip(whole, (losses[:4], losses[4:8], losses[8:]), strict=True):
        assert line["loss"] == pytest.approx(sum(mean) / len(mean), rel=1e-6)

    # as a signal after step 6 asks for it
    with monkeypatch.context() as patch:
        patch.setattr(loop._Stop, "is_due", lambda self, step: step == 6)
        assert run_here(*small(tmp_path, run="parts"), *flags).code == 130
    assert run_here(*small(tmp_path, run="parts"), *flags).code == 0
    assert records(tmp_path / "parts") == whole


def test_every_name_is_documented(finished: FinishedRun):
    names = set(re.findall(r"^\| `(\w+)` \|", DOCUMENTED.read_text(), re.MULTILINE))
    for line in (finished.directory / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line).keys() <= names
    assert {"loss_scale", "skipped_steps", "peak_memory_bytes", "mfu", "finite"} <= names
