"""metrics.jsonl, over writing, resuming and being killed."""

import json

import pytest

from jaxtron.run.metrics import MetricsWriter, drop_steps_after, read_metrics


def write_steps(path, steps, resume_step=0):
    writer = MetricsWriter(path, resume_step=resume_step)
    for step in steps:
        writer.write(step, {"loss": 1 / step, "learning_rate": 0.1})
    writer.close()


def test_each_line_is_on_disk_when_write_returns(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(10, {"loss": 2.5, "tokens_per_second": 1000.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 10,
        "loss": 2.5,
        "tokens_per_second": 1000.0,
    }
    writer.write(20, {"loss": 2.4})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20]
    writer.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_null(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(1, {"loss": value, "learning_rate": 0.1})
    writer.close()
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "learning_rate": 0.1, "finite": False}


def test_resumed_file_has_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    write_steps(path, range(5, 10), resume_step=4)
    assert [record["step"] for record in read_metrics(path)] == list(range(1, 10))
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_run_that_begins_again_drops_the_old_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    write_steps(path, [1])
    assert [record["step"] for record in read_metrics(path)] == [1]


@pytest.mark.parametrize("cut", ['{"step": 4, "lo', '{"step": 4, "loss": 2.0}', "\x00\x00", "7\n"])
def test_line_cut_short_by_a_kill_is_dropped(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    with path.open("a") as file:
        file.write(cut)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    write_steps(path, [4, 5], resume_step=10)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert len(path.read_text().splitlines()) == 5


def test_file_with_nothing_to_drop_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    before = path.stat()
    drop_steps_after(path, 3)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
