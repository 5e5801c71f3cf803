"""What happens between steps."""

import io
import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from jaxtron.config import UserError
from jaxtron.run.metrics import MetricsTally, MetricsWriter, read_metrics
from jaxtron.train.__main__ import main
from jaxtron.train.hooks import (
    Hook,
    HookList,
    MetricsLog,
    Profiler,
    RunEvent,
    RunHook,
    RunStart,
    StepInfo,
    _peak_memory,
    run_hooks,
)
from jaxtron.train.progress import TrainProgress
from jaxtron.train.throughput import Throughput
from tests.support.command_runs import own_programs, small
from tests.support.commands import Ended, run_main


def run_loop(hooks, total_steps, throughput=None):
    throughput = throughput or Throughput()
    for step in range(1, total_steps + 1):
        metrics = {"loss": jnp.float32(4 / step), "learning_rate": jnp.float32(0.1), "gradient_norm": jnp.float32(1)}
        info = StepInfo(step, total_steps, state=None, metrics=metrics, tokens=768)
        throughput.finish_step(768, metrics)
        run_hooks(hooks, info, throughput)


class Witness(RunHook):
    """Remembers what it was told."""

    every, at_end = 2, False

    def __init__(self) -> None:
        self.told: list[Any] = []

    def start(self, run: RunStart) -> None:
        self.told.append(("start", run.directory.name, run.config.train.steps, run.step))

    def after(self, info: StepInfo) -> None:
        self.told.append(("after", info.step))

    def event(self, event: RunEvent) -> None:
        self.told.append((event.name, event.step))

    def close(self) -> None:
        self.told.append("close")


def run_with(hook: RunHook, *flags: str) -> Ended:
    with own_programs():
        return run_main(lambda words: main(words, [hook]), flags)


def test_a_hook_of_ones_own_is_told_of_the_run(tmp_path: Path):
    flags = [*small(tmp_path), "--train.steps", "5", "--train.sample_tokens", "0", "--checkpoint.every", "3"]
    whole = Witness()
    assert run_with(whole, *flags).code == 0
    saved = [("checkpoint", 3), ("after", 4), ("checkpoint", 5), ("complete", 5), "close"]
    assert whole.told == [("start", "run", 5, 0), ("after", 2), *saved]
    # nothing to do is nothing to tell
    again = Witness()
    assert run_with(again, *flags).code == 0 and again.told == ["close"]

    class Failing(Witness):
        def after(self, info: StepInfo) -> None:
            super().after(info)
            raise UserError("enough")

    failing = Failing()
    ended = run_with(failing, *flags, "--train.steps", "8")
    assert ended.code == 2 and "enough" in ended.err
    assert failing.told == [("start", "run", 8, 5), ("checkpoint", 6), ("after", 6), "close"]


def test_all_are_closed_where_one_fails():
    told = []

    class Closing(RunHook):
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            told.append(self.name)
            if self.name == "b":
                raise UserError("no room")

    hooks = HookList([Closing("c"), Closing("d")])
    with pytest.raises(UserError, match="no room"), hooks.joined_by([Closing("a"), Closing("b")]):
        pass
    assert sorted(told) == ["a", "b"]
    hooks.close()
    assert sorted(told) == ["a", "b", "c", "d"]


def test_hooks_run_when_due_and_at_the_end():
    calls = []
    hooks = [
        Hook(lambda info: calls.append(("a", info.step)), every=4),
        Hook(lambda info: calls.append(("b", info.step)), every=6, at_end=False),
    ]
    run_loop(hooks, 10)
    assert calls == [("a", 4), ("b", 6), ("a", 8), ("a", 10)]


def test_time_of_excluded_hooks_is_not_training():
    now = 0.0
    throughput = Throughput(lambda: now)

    def take_time(info):
        nonlocal now
        now += 1.0 if info.step > 1 else 0.0

    run_loop([Hook(take_time), Hook(take_time, excluded=True)], 5, throughput)
    assert throughput.measure().step_seconds == pytest.approx(1.0)


def test_metrics_log_writes_logged_steps_and_those_with_validation(tmp_path):
    stream, tracked = io.StringIO(), []
    throughput = Throughput()

    class Tracker:
        def log(self, step, metrics):
            tracked.append((step, sorted(metrics)))

        def close(self):
            tracked.append("closed")

    log = MetricsLog(
        MetricsWriter(tmp_path / "metrics.jsonl"),
        TrainProgress(11, shown=True, print_seconds=1e-9, console=Console(file=stream)),
        throughput,
        every=4,
        trackers=[Tracker()],
        utilization=lambda tokens_per_second: tokens_per_second / 1e12,
    )
    validate = Hook(lambda info: info.metrics.update(validation_loss=1.5), every=6, at_end=False, excluded=True)
    run_loop([validate, log], 11, throughput)
    log.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [4, 6, 8, 11]
    assert [record.get("validation_loss") for record in records] == [None, 1.5, None, None]
    keys = ["gradient_norm", "learning_rate", "loss", "mfu", "step_seconds", "tokens", "tokens_per_second"]
    written = {*keys, "step", "time", "device", "devices"}
    assert all(record.keys() - {"validation_loss", "peak_memory_bytes"} == written for record in records)
    assert [record["tokens"] for record in records] == [768 * step for step in (4, 6, 8, 11)]
    assert {(record["device"], record["devices"]) for record in records} == {(jax.devices()[0].device_kind, 8)}
    times = [datetime.fromisoformat(record["time"]) for record in records]
    assert times == sorted(times) and abs(datetime.now(UTC) - times[-1]) < timedelta(minutes=1)
    assert all(record["tokens_per_second"] > 0 for record in records)
    assert tracked[0] == (4, keys) and len(tracked) == 5 and tracked[-1] == "closed"
    assert len(stream.getvalue().splitlines()) == 4
    # each line has the mean of the steps since the one before
    for record, steps in zip(records, ((1, 2, 3, 4), (5, 6), (7, 8), (9, 10, 11)), strict=True):
        assert record["loss"] == pytest.approx(sum(4 / step for step in steps) / len(steps))


def test_metrics_by_layer_are_summarized_for_the_line_and_the_trackers(tmp_path):
    tracked = {}

    class Tracker:
        def log(self, step, metrics):
            tracked[step] = metrics

        def close(self):
            pass

    writer, throughput = MetricsWriter(tmp_path / "metrics.jsonl"), Throughput()
    log = MetricsLog(writer, TrainProgress(2, shown=False), throughput, every=2, trackers=[Tracker()])
    for step in (1, 2):
        load = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) * step
        throughput.finish_step(768, None)
        log.after(StepInfo(step, 2, None, {"loss": jnp.float32(1), "router/load": load}))
    log.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    summary = {"router/load_mean": 5.0, "router/load_min": 0.0, "router/load_max": 10.0}
    assert line.items() >= summary.items() and tracked[2].items() >= summary.items()
    assert "router/load" not in line.keys() | tracked[2].keys()
    (arrays,) = read_metrics(tmp_path / "arrays.jsonl")
    assert arrays == {"step": 2, "router/load": [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]}


def test_metrics_log_goes_on_where_an_interrupted_one_ended(tmp_path):
    def log(name: str, tally: MetricsTally | None = None) -> MetricsLog:
        writer = MetricsWriter(tmp_path / name, resume_step=2 if tally else 0)
        return MetricsLog(writer, TrainProgress(6, shown=False), Throughput(), every=4, tally=tally)

    def run(log: MetricsLog, first: int, last: int) -> MetricsTally:
        for step in range(first, last + 1):
            log._throughput.finish_step(768, None)
            log.after(StepInfo(step, 6, None, {"loss": jnp.float32(1 / step)}, tokens=768))
        log.close()
        return log.tally()

    run(log("whole.jsonl"), 1, 6)
    # a checkpoint carries it as JSON
    extra = json.loads(json.dumps({"position": 9, "tally": asdict(run(log("parts.jsonl"), 1, 2))}))
    run(log("parts.jsonl", MetricsTally.of(extra, 128)), 3, 6)
    exact = [
        [(record["step"], record["loss"], record["tokens"]) for record in read_metrics(tmp_path / name)]
        for name in ("whole.jsonl", "parts.jsonl")
    ]
    assert exact[0] == exact[1] and [step for step, _, _ in exact[0]] == [4, 6]
    # one of an older version knows the samples alone
    assert MetricsTally.of({"position": 9}, 128) == MetricsTally(tokens=9 * 128)


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    found = [Device({"peak_bytes_in_use": 7, "bytes_in_use": 9}), Device({"peak_bytes_in_use": 8}), Device(None)]
    monkeypatch.setattr(jax, "local_devices", lambda: found)
    assert _peak_memory() == {"peak_memory_bytes": 8}
    monkeypatch.setattr(jax, "local_devices", lambda: found[2:])
    assert _peak_memory() == {}


def test_first_logged_step_has_a_speed_too(tmp_path):
    throughput = Throughput()
    log = MetricsLog(MetricsWriter(tmp_path / "metrics.jsonl"), TrainProgress(1, shown=False), throughput, every=10)
    run_loop([log], 1, throughput)
    log.close()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["tokens_per_second"] > 0 and "mfu" not in record


def test_profiler_traces_the_steps_asked_for(tmp_path, monkeypatch):
    calls, step = [], 0
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: calls.append(("start before", step + 1)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop after", step)))
    profiler = Profiler(tmp_path / "profile", (3, 5))
    for step in range(1, 11):
        profiler.after(StepInfo(step, 10, state=None))
    profiler.close()
    assert calls == [("start before", 3), ("stop after", 5)]


def test_profiler_writes_a_trace(tmp_path):
    profiler = Profiler(tmp_path / "profile", (2, 2))
    run_loop([profiler], 2)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_trace_of_a_run_that_stops_inside_the_range_is_ended(tmp_path):
    profiler = Profiler(tmp_path / "profile", (2, 9))
    run_loop([profiler], 3)
    profiler.close()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
