"""The fault injector: each fault is what it says, and what meets it notices."""

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.checkpoint.restore import restore_newest
from jaxtron.command import write_whole
from jaxtron.config import UserError
from jaxtron.interrupts import TRY_AGAIN
from tests.faults import inject
from tests.support.command_runs import end, free_port, records, run_here, small, start

COUNTS = "import time\nn = 0\nwhile True:\n    n += 1\n    print(n, flush=True)\n    time.sleep(0.01)"


@pytest.fixture
def counter():
    """A process that counts a hundred a second, and `rate()` of it."""
    process = subprocess.Popen([sys.executable, "-c", COUNTS], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    os.set_blocking(process.stdout.fileno(), False)

    def lines(seconds: float) -> int:
        assert process.stdout is not None
        process.stdout.read()
        time.sleep(seconds)
        return (process.stdout.read() or b"").count(b"\n")

    yield process.pid, lines
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_process_is_paused_slowed_and_killed(counter):
    process, lines = counter
    with inject.paused(process):
        lines(0.1)
        assert lines(0.3) == 0
    assert lines(0.5) > 0
    with inject.slowed(process, 0.9):
        slow = lines(1.0)
    assert 0 < slow < lines(1.0)
    inject.kill(process)
    assert os.waitpid(process, 0)[1] == 9


def test_a_disk_is_full_for_a_while(tmp_path: Path):
    with inject.full_disk(), pytest.raises(UserError, match="cannot write .*; make room|cannot write .*File too large"):
        write_whole(tmp_path / "a", "a" * 10_000)
    assert list(tmp_path.iterdir()) == []
    write_whole(tmp_path / "a", "a" * 10_000)


def test_a_flipped_bit_of_a_file_is_noticed_and_flipped_back(tmp_path: Path):
    state = {"weight": jnp.arange(64.0)}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, state, {})
    checkpoints.close()
    files = [path for path in (tmp_path / "step_00000001").rglob("*") if path.is_file()]
    path = max(files, key=lambda one: one.stat().st_size)
    flipped = inject.flip_in_file(path, random.Random(0), bits=3)
    with pytest.raises(UserError, match="is damaged"):
        restore_newest(tmp_path, jax.eval_shape(lambda: state))
    inject.flip_back(path, flipped)
    restored = restore_newest(tmp_path, jax.eval_shape(lambda: state))
    assert restored is not None and (restored.state["weight"] == state["weight"]).all()


def test_a_bit_of_memory_is_one_bit_of_one_number():
    tree = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.arange(5), "c": jnp.float32(3)}
    for seed in range(8):
        changed = inject.flip_in_memory(tree, random.Random(seed))
        words = [np.asarray(one).view(np.uint32).ravel() for one in (tree["a"], changed["a"], tree["c"], changed["c"])]
        bits = np.bitwise_count(words[0] ^ words[1]).sum() + np.bitwise_count(words[2] ^ words[3]).sum()
        assert bits == 1 and (changed["b"] == tree["b"]).all()
    assert not np.isfinite(inject.flip_in_memory({"a": jnp.ones(3)}, random.Random(0), bit=30)["a"]).all()


def test_connections_are_held_and_cut():
    with socket.create_server(("127.0.0.1", 0)) as server, inject.Wire(server.getsockname()[1]) as wire:
        near = socket.create_connection(("127.0.0.1", wire.port), timeout=5)
        far, _ = server.accept()
        far.settimeout(5)
        near.sendall(b"one")
        assert far.recv(9) == b"one"
        far.sendall(b"two")
        assert near.recv(9) == b"two" and wire.connections == 1
        wire.hold()
        time.sleep(0.1)
        near.sendall(b"three")
        far.settimeout(0.3)
        with pytest.raises(TimeoutError):
            far.recv(9)
        wire.release()
        far.settimeout(5)
        assert far.recv(9) == b"three"
        wire.cut()
        with pytest.raises(ConnectionError):
            while near.recv(9):
                pass
            raise ConnectionResetError
        near.close()
        far.close()


RUN = ("--train.sample_tokens", "0", "--train.validation_batches", "1", "--checkpoint.every", "2")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        pytest.param(inject.not_a_number, "gradient", marks=pytest.mark.slow),
        (inject.flip(30), "gradient"),
        pytest.param(inject.spike(1e6), "gradient", marks=pytest.mark.slow),
    ],
    ids=["NaN", "bit", "spike"],
)
def test_what_is_planted_in_a_step_is_left_out(change, word: str, tmp_path: Path):
    health = [
        "--train.health.on_bad",
        "skip",
        "--train.health.gradient_spike",
        "5",
        "--train.health.window",
        "4",
        "--train.steps",
        "8",
    ]
    flags = [*small(tmp_path), *RUN, *health]
    with inject.planted_in_gradients((6,), change):
        ended = run_here(*flags)
    assert ended.code == 0, ended
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert word in events, events
    assert [line["step"] for line in records(tmp_path / "run")] == list(range(1, 9))


@pytest.mark.slow
def test_a_run_goes_on_whatever_its_clock_says(tmp_path: Path):
    """A clock that was set back by a year between two commands: newest is the highest step, not the latest time."""
    flags = [*small(tmp_path), *RUN]
    assert run_here(*flags, "--train.steps", "4").code == 0
    with inject.wrong_clock(-365 * 86400):
        ended = run_here(*flags, "--train.steps", "8")
    assert ended.code == 0 and "checkpoint of step 4 found: continuing" in ended.out
    assert [line["step"] for line in records(tmp_path / "run")] == list(range(1, 9))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000008")
    assert "checkpoint of step 6 found: continuing" in run_here(*flags, "--train.steps", "8").out


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hold", "cut"])
def test_processes_that_lose_their_connection_end_by_themselves(fault: str, tmp_path: Path):
    port = free_port()
    with inject.Wire(port) as wire:
        common = ["--devices", "1", "--mesh.data", "2", "--runtime.num_processes", "2"]
        common += ["--runtime.heartbeat_seconds", "10", "--train.steps", "100000", *RUN]
        processes = [
            start(
                *small(tmp_path), *common, "--runtime.process_id", str(number),
                "--runtime.coordinator_address", f"127.0.0.1:{(port, wire.port)[number]}", cache=tmp_path,
            )
            for number in range(2)
        ]  # fmt: skip
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert processes[0].poll() is None, end(processes[0])
            time.sleep(0.02)
        (wire.hold if fault == "hold" else wire.cut)()
        begun = time.monotonic()
        ended = [end(process) for process in processes]
    assert time.monotonic() - begun < 90
    assert [one.code for one in ended] == [TRY_AGAIN, TRY_AGAIN], ended
    assert all("process" in one.err and "the same command continues" in one.err for one in ended), ended
