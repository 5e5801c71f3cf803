"""Which checkpoints of a run stay, told in its events."""

import json
from pathlib import Path

from tests.support.command_runs import run_here, small


def test_the_newest_the_best_and_some_for_good_stay(tmp_path: Path):
    flags = [*small(tmp_path), "--train.steps", "8", "--train.sample_tokens", "0", "--train.validate_every", "2"]
    keep = ("--checkpoint.every", "2", "--checkpoint.keep", "1", "--checkpoint.keep_every", "4")
    # so high that the loss does not simply fall
    keep = (
        *keep,
        "--checkpoint.keep_best",
        "1",
        "--optimizer.learning_rate",
        "0.3",
        "--optimizer.schedule",
        "constant",
    )
    ended = run_here(*flags, *keep)
    assert ended.code == 0 and ended.err == ""
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["validation_loss"] for line in lines if line["event"] == "checkpoint"}
    assert list(losses) == [2, 4, 6, 8]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses == {line["step"]: line["validation_loss"] for line in logged if "validation_loss" in line}
    removed = [step for line in lines if line["event"] == "checkpoints_removed" for step in line["steps"]]
    kept = {4, 8, min(losses, key=lambda step: losses[step])}
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {f"step_{step:08d}" for step in kept}
    assert sorted({*removed, *kept}) == [2, 4, 6, 8] and not kept & {*removed}


def test_a_best_one_wants_losses_of_all(tmp_path: Path):
    ended = run_here(*small(tmp_path), "--checkpoint.every", "3", "--checkpoint.keep_best", "1")
    assert ended.code == 2 and "set --train.validate_every 3" in ended.err
    flags = [*small(tmp_path), "--data.validation_fraction", "0", "--train.validate_every", "3"]
    ended = run_here(*flags, "--checkpoint.every", "3", "--checkpoint.keep_best", "1")
    assert ended.code == 2 and "the data have nothing to validate on" in ended.err
