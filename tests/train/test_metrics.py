"""metrics.jsonl, over writing, resuming and being killed."""

import json
import math

import numpy as np
import pytest

from jaxtron.run.metrics import Events, MetricsWriter, drop_steps_after, read_metrics, summarize


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


def test_an_event_after_half_a_line_has_a_line_of_its_own(tmp_path):
    path = tmp_path / "events.jsonl"
    for cut in ("", '{"step": 1, "ev', '{"step": 1, "event": "a"}\n'):
        path.write_text(cut)
        events = Events(tmp_path)
        events.write("checkpoint", 2)
        events.write("stopped", 3)
        events.close()
        lines = path.read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines[-2:]] == [2, 3] and len(lines) == 2 + bool(cut)


def test_file_with_nothing_to_drop_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    before = path.stat()
    drop_steps_after(path, 3)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def write_arrays(path, steps, resume_step=0):
    writer = MetricsWriter(path, resume_step=resume_step)
    for step in steps:
        writer.write(step, {"loss": 1 / step}, {"router/load": np.full((2, 3), step / 10, np.float32)})
    writer.close()


def test_arrays_lie_beside_the_lines_with_the_digits_that_they_have(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    counts, norms = np.array([[1, 2], [3, 4]]), np.array([0.1, np.inf, 1e-9], np.float32)
    writer.write(1, {"loss": 2.0}, {"counts": counts, "norms": norms})
    writer.write(2, {"loss": 1.0})
    writer.close()
    (line,) = (tmp_path / "arrays.jsonl").read_text().splitlines()
    assert line == '{"step": 1, "counts": [[1, 2], [3, 4]], "norms": [0.1, null, 1e-09], "finite": false}'
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_arrays_are_resumed_and_rewound_as_the_lines_are(tmp_path):
    path, arrays = tmp_path / "metrics.jsonl", tmp_path / "arrays.jsonl"
    write_arrays(path, range(1, 10))
    whole = arrays.read_text()
    for begun, kept in ((range(1, 8), 4), (range(1, 3), 2)):
        arrays.unlink(missing_ok=True)
        write_arrays(path, begun)
        with arrays.open("a") as file:
            # killed while it was written
            file.write('{"step": 9, "router/lo')
        write_arrays(path, range(kept + 1, 10), resume_step=kept)
        assert arrays.read_text() == whole
        assert [record["step"] for record in read_metrics(path)] == list(range(1, 10))
    # a run that begins again
    write_arrays(path, [1])
    assert [record["step"] for record in read_metrics(arrays)] == [1]


def test_summaries_of_arrays():
    load = np.array([[0.5, 1.5], [2.0, 4.0]], np.float32)
    assert summarize({"load": load, "none": np.zeros((0,))}) == {"load_mean": 2.0, "load_min": 0.5, "load_max": 4.0}
    assert summarize({"x": np.full(4, 60000, np.float16)})["x_mean"] == 60000
    assert math.isnan(summarize({"x": np.array([1.0, np.nan])})["x_max"])
