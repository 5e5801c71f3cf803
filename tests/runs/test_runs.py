"""`python -m jaxtron.runs`: what it says of runs in every state, from their files alone."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxtron.checkpoint.record import CheckpointRecord, write
from jaxtron.config import dump, load
from jaxtron.run.configuration import Configuration
from jaxtron.runs.__main__ import main
from jaxtron.runs.curve import TextCurve, draw
from jaxtron.runs.losses import read_losses
from tests.support.commands import Ended, run_main

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "gpt_tiny.yaml"


def line(step: int, loss: float | None, **more: object) -> str:
    time = f"2026-01-01T00:{step // 60 % 60:02d}:{step % 60:02d}.000+00:00"
    return json.dumps({"step": step, "tokens": step * 1536, "loss": loss, "time": time, **more}) + "\n"


def make(folder: Path, *flags: str, steps: int = 40, checkpoint: int | None = 40, every: int = 10) -> Path:
    """A run of configs/gpt_tiny.yaml that logged its steps, and its newest checkpoint's record."""
    folder.mkdir(parents=True)
    config = load(Configuration, TINY, ["--train.steps", "40", *flags])
    (folder / "config.yaml").write_text(dump(config.resolved()))
    text = "".join(line(step, 5 - step / 40, validation_loss=4.5) for step in range(every, steps + 1, every))
    (folder / "metrics.jsonl").write_text(text)
    entry = {"time": "2026-01-01T00:00:00+00:00", "step": 0, "changes": {}, "devices": {"kind": "cpu", "count": 8}}
    (folder / "history.jsonl").write_text(json.dumps(entry) + "\n")
    if checkpoint is not None:
        path = folder / "checkpoints" / f"step_{checkpoint:08d}"
        path.mkdir(parents=True)
        write(CheckpointRecord(checkpoint, {}, {}), path)
    return folder


def runs(*words: object) -> Ended:
    return run_main(main, words)


def states(folder: Path) -> dict[str, str]:
    ended = runs("list", folder, "--json", "-")
    assert ended.code == 0, ended
    return {run["name"]: run["state"] for run in json.loads(ended.out)["runs"]}


def test_each_state_by_what_lies_there(tmp_path: Path):
    make(tmp_path / "complete")
    make(tmp_path / "sweep" / "stopped", steps=20, checkpoint=20)
    make(tmp_path / "cleaned", checkpoint=None)
    # killed before its last checkpoint was whole
    make(tmp_path / "last", checkpoint=20)
    # nobody holds its lock any more
    killed = make(tmp_path / "killed", steps=20, checkpoint=None)
    (killed / "lock").write_text("process 1 on elsewhere since 2026-01-01 00:00:00")
    diverged = make(tmp_path / "diverged", steps=20, checkpoint=20)
    with (diverged / "history.jsonl").open("a") as file:
        file.write(json.dumps({"step": 30, "ended": "diverged", "reason": "step 31: loss nan"}) + "\n")
    null = make(tmp_path / "null", steps=20, checkpoint=20)
    with (null / "metrics.jsonl").open("a") as file:
        file.write(line(30, None, finite=False))
    # bad steps that were passed over
    for name, flags in (("skipped", ["--train.health.on_bad", "skip"]), ("done", [])):
        run = make(tmp_path / name, *flags, steps=30, checkpoint=40 if name == "done" else 20)
        with (run / "metrics.jsonl").open("a") as file:
            file.write(line(40, None, finite=False))
    make(tmp_path / "new", checkpoint=0, steps=0)
    for name in ("metrics.jsonl", "history.jsonl"):
        (make(tmp_path / f"no_{name[:-6]}") / name).unlink()
    bare = make(tmp_path / "bare")
    (bare / "config.yaml").unlink()
    record = make(tmp_path / "record") / "checkpoints" / "step_00000040" / "jaxtron.json"
    record.write_text(record.read_text().replace("40", "41"))
    busy = make(tmp_path / "busy", steps=20)
    (busy / "config.yaml").unlink()
    with (busy / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = states(tmp_path)
    assert found == {
        "complete": "complete",
        "stopped": "stopped",
        "cleaned": "complete",
        "last": "stopped",
        "killed": "stopped",
        "diverged": "diverged",
        "null": "diverged",
        "skipped": "stopped",
        "done": "complete",
        "new": "new",
        "no_metrics": "complete",
        "no_history": "complete",
        "bare": "damaged",
        "record": "damaged",
        "busy": "running",
    }
    listed = runs("list", tmp_path)
    assert "bare: no config.yaml\n" in listed.out and "the checksum of jaxtron.json is wrong" in listed.out
    assert "sweep/stopped" in listed.out and "836,736" in listed.out
    assert "process 1 on elsewhere since 2026-01-01 00:00:00 was killed" in runs("show", killed).out
    assert "step 31: loss nan" in runs("show", diverged).out
    assert runs("list", tmp_path, "--state", "running", "new").out.count("\n") == 2


def test_a_look_changes_nothing_and_waits_for_nobody(tmp_path: Path):
    run = make(tmp_path / "run")
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        for words in (["list", tmp_path], ["show", run]):
            assert runs(*words).code == 0
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_lines_that_do_not_read_are_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    good = line(1, 3.0) + line(2, 2.0)
    # half a line at the end is being written, and no damage
    path.write_text(good + line(3, 1.0)[:-9])
    log = read_losses(path)
    assert [(read.step, read.loss) for read in log.lines] == [(1, 3.0), (2, 2.0)] and not log.broken
    odd = ["[1]", "{", '{"step": "4"}', '{"step": true}', '{"step": -1}', "\x00\xff", "[" * 9999]
    path.write_text(good + "\n".join(odd) + "\n\n" + line(3, 1.0), encoding="latin-1")
    log = read_losses(path)
    assert [read.step for read in log.lines] == [1, 2, 3] and log.broken == len(odd)
    # numbers that are none, and steps again and out of order: of a step the last line counts
    path.write_text(
        line(3, 9.0) + line(1, 7.0) + line(3, 8.0) + '{"step": 4, "loss": NaN}\n{"step": 5, "loss": "low"}\n'
        '{"step": 6, "loss": 1e999, "tokens": 1.5, "time": 3}\n{"step": 7, "loss": ' + "9" * 400 + "}\n"
    )
    log = read_losses(path)
    assert [(read.step, read.loss) for read in log.lines[:2]] == [(1, 7.0), (3, 8.0)]
    assert [read.loss for read in log.lines[2:]] == [None] * 4 and log.broken == 0


def test_a_large_file_is_sampled_and_its_lines_are_found(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(step, 1 + 1 / step) for step in range(2, 40_001, 2)) + '{"step": 4')
    log = read_losses(path, whole_bytes=1000, samples=50)
    assert log.is_sample and 50 < len(log.lines) < 1000 and not log.broken
    assert log.lines[0].step == 2 and log.last is not None and log.last.step == 40_000
    whole = read_losses(path)
    for step in (2, 4, 1234, 20_000, 39_998, 40_000):
        assert log.find(step) == whole.find(step) is not None
        assert log.find(step * 1536, "tokens") == whole.find(step)
    for step in (0, 1, 1235, 40_001, 10**9):
        assert log.find(step) is None


def test_hundreds_of_runs_in_little_time(tmp_path: Path):
    first = make(tmp_path / "run_0", every=1)
    for number in range(1, 200):
        shutil.copytree(first, tmp_path / f"run_{number}")
    began = time.process_time()
    ended = runs("list", tmp_path)
    assert ended.out.count("complete") == 200
    # 1.5 seconds on the machine that this was written on
    assert time.process_time() - began < 15


def test_show(tmp_path: Path):
    run = make(tmp_path / "run", "--model.num_layers", "2")
    ended = runs("show", run, "--png", tmp_path / "loss.png", "--json", tmp_path / "run.json")
    assert ended.code == 0 and "model.num_layers" in ended.out
    # neither defaults nor where it lies
    assert "optimizer.name" not in ended.out and "run.directory" not in ended.out
    assert "training loss    4.0000, at best 4.0000 at step 40" in ended.out
    assert "2026-01-01 00:00  step 0  on 8 cpu" in ended.out
    # 4.75 at step 10 is the highest, and on the left
    rows = [row for row in ended.out.splitlines() if " |" in row]
    assert rows[0] == "   4.7500 |*" and rows[-1].startswith("   4.0000 |") and rows[-1].endswith("*")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["best_loss"] == {"step": 40, "loss": 4.0} and content["settings"]["model.num_layers"] == 2


def test_compare(tmp_path: Path):
    a = make(tmp_path / "one" / "run")
    b = make(tmp_path / "two" / "run", "--optimizer.learning_rate", "0.1", "--run.log_every", "20", every=20)
    c = make(tmp_path / "$third$", steps=0, checkpoint=None)
    ended = runs("compare", a, b, "--png", tmp_path / "both.png")
    assert ended.code == 0 and "one/run" in ended.out and "two/run" in ended.out
    table = ended.out.split("settings that differ")[1].split("\n\n")[0].split("\n")[1:]
    assert [row.split() for row in table] == [
        ["optimizer.learning_rate", "0.003", "0.1"],
        ["run.log_every", "10", "20"],
    ]
    losses = ended.out.split("loss at step")[1].split("\n\n")[0].split("\n")[1:]
    assert [row.split() for row in losses] == [
        ["20", "4.5000", "4.5000", "4.5000", "4.5000"],
        ["40", "4.0000", "4.0000", "4.5000", "4.5000"],
    ]
    assert "  # several" in ended.out
    found = json.loads(runs("compare", a, b, c, "--json", "-", "--by", "tokens", "--png", tmp_path / "c.png").out)
    assert found["settings"]["optimizer.learning_rate"] == [0.003, 0.1, 0.003]
    # the third has logged nothing
    assert found["losses"] == [] and len(found["runs"]) == 3
    assert "no step at which all of them logged a loss" in runs("compare", a, c).out
    (b / "config.yaml").write_text("model: [")
    ended = runs("compare", a, b)
    assert ended.code == 0 and "settings of b do not read" in ended.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shwo", "{run}"], "unknown subcommand 'shwo'; did you mean show?"),
        (["{run}"], "give list, show RUN or compare RUN RUN"),
        (["show"], "the following arguments are required: RUN"),
        (["show", "{run}", "{run}"], "unrecognized arguments"),
        (["show", "{no}"], "is not there; give the directory of a run"),
        (["show", "{file}"], "is a file; give the directory of a run"),
        (["show", "{all}"], "it has runs in it, give one"),
        (["show", "{empty}"], "nothing there is of a training"),
        (["show", ""], "an empty text names no file"),
        (["show", "{run}", "--png", "{run}"], "is a folder; give a file in a folder that can be written"),
        (["show", "{run}", "--png", "-"], "--png - would put a picture on the terminal"),
        (["show", "{run}", "--jsn", "a"], "unknown flag --jsn; did you mean --json?"),
        (["show", "{run}", "--json", "{config}"], "the file is there, and no earlier result of such a command"),
        (["show", "{run}", "--by", "time"], "invalid choice: 'time'"),
        (["list", "{empty}"], "has no runs: nothing in it was left by python -m jaxtron.train"),
        (["list", "{no}"], "is not there; give a directory of runs"),
        (["list", "{file}"], "is a file; give a directory of runs"),
        (["list", "{all}", "--state", "paused"], "invalid choice: 'paused'"),
        (["list", "{all}", "--state", "diverged"], "none of 1 run is diverged; leave --state out"),
        (["list", "{all}", "--sort", "size"], "invalid choice: 'size'"),
        (["list", "{all}", "--sort"], "--sort: expected one argument"),
        (["compare", "{run}"], "give two runs or more, or use show"),
        (["compare", "{run}", "{run}/../run"], "is given twice; give each run once"),
        (["compare", "{run}", "{no}"], "is not there"),
        (["compare", *["{run}"] * 27], "27 runs are more than 26 to compare; give fewer"),
        (["compare", "{run}", "{run}", "--json", "{no}/a.json"], "there is no folder"),
    ],
)
def test_bad_lines_are_told_in_one(words: list[str], message: str, tmp_path: Path):
    run, empty = make(tmp_path / "all" / "run"), tmp_path / "empty"
    empty.mkdir()
    places = {"run": run, "all": run.parent, "empty": empty, "no": tmp_path / "no", "file": run / "metrics.jsonl"}
    ended = runs(*(word.format(**places, config=run / "config.yaml") for word in words))
    assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended
    assert message in ended.err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b""),
        ("config.yaml", b"\xff\xfe\x00"),
        ("config.yaml", b"model: 3\ndata: {}\ntrain: {}\noptimizer: {}\n"),
        ("config.yaml", b"model: {family: 7}\ndata: {}\ntrain: {steps: many}\noptimizer: {}\n"),
        ("config.yaml", b"model: {family: no.such}\ndata: {sequence_length: x}\ntrain: {}\noptimizer: {}\n"),
        ("config.yaml", b"model: &a {a: *a}\ndata: {}\ntrain: {}\noptimizer: {}\n"),
        ("config.yaml", b"? [a, b]\n: 3\n"),
        ("config.yaml", b"[" * 3000),
        ("config.yaml", None),
        ("metrics.jsonl", b"\n\n\n"),
        ("metrics.jsonl", b'{"step": 99999999999999999999, "loss": 1e308}\n{"step": 1, "loss": -1e308}\n'),
        ("metrics.jsonl", None),
        ("history.jsonl", b'[1]\n{"changes": 3, "devices": [], "time": 5, "step": null}\n{"changes": {"a": 1}}\n'),
        ("history.jsonl", None),
        ("history.jsonl", b'{"time": "soon", "changes": {"seed": [NaN, Infinity]}, "step": -Infinity}\n'),
        ("config.yaml", b"model: {dropout: .inf, norm: .nan}\ndata: {}\ntrain: {steps: 1e3}\noptimizer: {}\n"),
        ("lock", b"\x1b[2J"),
        ("lock", None),
        ("checkpoints/step_00000040/jaxtron.json", b"00000000\n[]\n"),
        ("checkpoints/step_00000040/jaxtron.json", b""),
        ("checkpoints/step_00000040/jaxtron.json", None),
    ],
)
def test_files_in_any_state_are_no_error(name: str, content: bytes | None, tmp_path: Path):
    run, other = make(tmp_path / "all" / "run\x1b[31m"), make(tmp_path / "all" / "other")
    path = run / name
    path.unlink(missing_ok=True)
    if content is None:
        # neither a file nor to be waited for
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    for words in (["list", run.parent], ["show", run], ["compare", run, other, "--png", tmp_path / "a.png"]):
        ended = runs(*words)
        assert ended.code == 0, (words, ended.err)
        assert "\x1b" not in ended.out
    assert json.loads(runs("compare", run, other, "--json", "-").out)["runs"][1]["state"] == "complete"
    assert json.loads(runs("show", run, "--json", "-").out)["state"] in ("complete", "damaged", "stopped")


def test_a_link_to_itself_ends(tmp_path: Path):
    run = make(tmp_path / "run")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "same").symlink_to(run)
    assert list(states(tmp_path).values()) == ["complete"]


def test_curves_of_one_point_of_none_and_of_huge_numbers():
    assert draw([], "step") == ["no losses yet"]
    for points in ([(5, 2.0)], [(1, 3.0), (9, 3.0)], [(0, -1e308), (1, 1e308)], [(1, 1e-300), (10**18, 2e-300)]):
        lines = draw([TextCurve("a", "run", points), TextCurve("b", "empty", [])], "step", width=60)
        assert sum("a" in row.partition("|")[2] for row in lines) >= 1 and all(len(row) <= 60 for row in lines)
        assert lines[-1] == "  b empty (no losses yet)"


def test_nothing_heavy_is_imported():
    code = "import sys, jaxtron.runs.report; print(*({'jax', 'numpy', 'matplotlib', 'flax'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == ""
