"""A run that is killed, stopped and damaged, and started again each time, ends as one that was left alone.

Kills at any moment, of several processes too: `tests/faults/test_soak.py`.
"""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from jaxtron.runtime.machine import has_driver
from tests.support.command_runs import Ended, end, records, small, start

STEPS = 40
# with all that depends on the step, the sample or the key: dropout, growing batches, warm-up, bfloat16
VARIED = (
    *("--model.dropout", "0.1", "--model.attention_dropout", "0.1", "--train.precision", "bf16"),
    *("--train.batch_ramp.start", "4", "--train.batch_ramp.increment", "4", "--train.batch_ramp.samples", "100"),
    *("--optimizer.warmup_steps", "20", "--train.validate_every", "20", "--train.sample_tokens", "0"),
    *("--train.microbatches", "2"),
    *("--checkpoint.every", "3", "--train.steps", str(STEPS)),
)
# the machine's own device; GPUs may add up in another order each time
DEVICES = ("--devices", "1") if has_driver() else ()


def last_step(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("checkpoints/step_????????"))


def interrupt(process: subprocess.Popen[str], directory: Path, step: int, kind: signal.Signals) -> Ended:
    """Send a signal soon after the step was logged, and there is a checkpoint to lose and one to fall back on."""
    while last_step(directory) < step or len(checkpoints(directory)) < 2:
        assert process.poll() is None, end(process)
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(kind)
    return end(process)


def damage(checkpoint: Path) -> None:
    """Change one byte of its largest file."""
    file = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def undisturbed_run(folder: Path) -> tuple[list[str], list[dict]]:
    """The flags that a run of another directory shares with it, and what it logged."""
    common = [*VARIED, *DEVICES]
    ended = end(start(*small(folder, run="undisturbed"), *common, cache=folder))
    # nothing on standard error, JAX's CUDA plugin installed or not
    assert ended.code == 0 and ended.err == ""
    return common, records(folder / "undisturbed")


@pytest.mark.slow
def test_a_killed_damaged_and_stopped_run_ends_as_an_undisturbed_one(tmp_path: Path):
    common, expected = undisturbed_run(tmp_path)
    directory = tmp_path / "run"
    command = [*small(tmp_path), *common]
    killed = interrupt(start(*command, cache=tmp_path), directory, random.randint(9, 15), signal.SIGKILL)
    assert killed.code == -signal.SIGKILL

    before, newest = checkpoints(directory)[-2:]
    damage(newest)
    stopped = interrupt(start(*command, cache=tmp_path), directory, last_step(directory) + 5, signal.SIGTERM)
    assert stopped.code == 130
    assert [line for line in stopped.err.splitlines() if f"checkpoint {newest} is not used: " in line]
    assert f"checkpoint of step {int(before.name[5:])} found: continuing" in stopped.out
    step = last_step(directory)
    assert f"stopped after step {step}; the same command continues" in stopped.out
    assert (directory / "checkpoints" / f"step_{step:08d}").exists()

    finished = end(start(*command, cache=tmp_path))
    assert finished.code == 0 and finished.err == ""
    assert f"checkpoint of step {step} found: continuing" in finished.out
    assert records(directory) == expected
