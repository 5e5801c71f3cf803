"""A real Slurm of this machine: two processes train by the batch file, are stopped, queued again, and go on."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.command_runs import free_port, records, small
from tests.support.compiling import QUICK

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol")
lacking = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(lacking), reason=f"no {', '.join(lacking)}: apt-get install slurmctld slurmd slurm-client"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a Slurm for a test is started by root"),
]
ENDLESS = 1_000_000
PATIENCE = 240


def wait_until(condition: Callable[[], object], what: str, *, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


class Slurm:
    """Slurm's commands, and jobs that train in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | {
            "SLURM_CONF": str(folder / "slurm" / "slurm.conf"),
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "LAUNCH": str(ROOT / "launch"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XLA_FLAGS": QUICK,
            "DOCTOR": "0",
        }

    def __call__(self, *words: object) -> str:
        """What a command of Slurm's says."""
        command = [str(word) for word in words]
        result = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, (command, result)
        return result.stdout

    def submit(self, *arguments: str, options: tuple[str, ...] = (), doctor: bool = False) -> str:
        """A job of two tasks that trains; its number."""
        self.environment["DOCTOR"] = str(int(doctor))
        size = ("--nodes=1", "--ntasks-per-node=2")
        line = ("sbatch", "--parsable", *size, *options, ROOT / "launch" / "slurm.sbatch", *arguments)
        return self(*line).strip()

    def log(self, job: str) -> str:
        """What the job wrote, in all of its attempts."""
        file = self.folder / f"jaxtron-{job}.log"
        return file.read_text() if file.exists() else ""

    def state(self, job: str) -> str:
        """Such as PENDING, RUNNING or COMPLETED."""
        found = re.search(r"JobState=(\w+)", self("scontrol", "show", "job", job))
        return found[1] if found else "?"

    def continue_now(self, job: str) -> None:
        """Lets a job that waits in the queue again begin: Slurm itself holds it for two minutes."""
        wait_until(lambda: self.state(job) == "PENDING", f"job {job} waits: {self.log(job)}")
        # it is complete before it may begin
        wait_until(lambda: "COMPLETING" not in self("squeue", "-h", "-j", job, "-o", "%T"), "the job's end")
        self("scontrol", "update", f"JobId={job}", "StartTime=now")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    cluster = Slurm(folder)
    start = ["bash", Path(__file__).parent / "slurm.sh", folder / "slurm", str(free_port())]
    result = subprocess.run(start, capture_output=True, text=True, timeout=120)
    try:
        assert result.returncode == 0, result
        yield cluster
    finally:
        end_of(cluster)


def end_of(cluster: Slurm) -> None:
    """Ends all jobs, and Slurm once none of them has a process any more."""

    def ask(command: str) -> str:
        return subprocess.run(command.split(), env=cluster.environment, capture_output=True, text=True).stdout

    ask("scancel --signal=KILL --full --user=root")
    ask("scancel --user=root")
    deadline = time.monotonic() + 60
    while ask("squeue -h").strip() and time.monotonic() < deadline:
        time.sleep(0.5)
    ask("scontrol shutdown")


def flags(folder: Path, run: str, *, steps: int = ENDLESS) -> list[str]:
    return [
        str(ROOT / "configs" / "gpt_tiny.yaml"),
        *small(folder, run=run),
        *("--devices", "1", "--mesh.data", "2", "--optimizer.schedule", "constant", "--train.steps", str(steps)),
        *("--train.sample_tokens", "0", "--train.validate_every", "0", "--checkpoint.every", "20"),
    ]


def has_steps(folder: Path, run: str, count: int) -> bool:
    file = folder / run / "metrics.jsonl"
    return file.exists() and file.read_text().count("\n") >= count


def saved(log: str) -> list[int]:
    return [int(step) for step in re.findall(r"stopped after step (\d+); the same command continues", log)]


def test_a_signal_saves_and_queues_again_until_the_run_is_done(slurm: Slurm):
    folder = slurm.folder
    job = slurm.submit(*flags(folder, "stopped"))
    wait_until(lambda: has_steps(folder, "stopped", 3), f"three steps: {slurm.log(job)}")
    # as #SBATCH --signal does, and a preemption
    slurm("scancel", "--signal=TERM", job)
    slurm.continue_now(job)
    first = saved(slurm.log(job))
    assert len(first) == 1 and f"exit code 130, stopped by a signal; queueing job {job} again" in slurm.log(job)

    # the next comes before the first step of the second attempt, or just after it: nothing is lost
    wait_until(lambda: f"checkpoint of step {first[0]} found: continuing" in slurm.log(job), "the second attempt")
    slurm("scontrol", "update", f"JobId={job}", "Requeue=0")
    slurm("scancel", "--signal=TERM", job)
    wait_until(lambda: slurm.state(job) == "FAILED", f"the end without a requeue: {slurm.log(job)[-2000:]}")
    log = slurm.log(job)
    assert "the same sbatch line continues from the checkpoint" in log and re.search(
        r"exit code 1(30|43), stopped", log
    )
    last = saved(log)[-1]

    # another job of the same line continues; the doctor sees both tasks' node first
    job = slurm.submit(*flags(folder, "stopped", steps=last + 5), "--runtime.connect_seconds", "200", doctor=True)
    wait_until(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), f"the last steps: {slurm.log(job)}")
    log = slurm.log(job)
    assert f"checkpoint of step {last} found: continuing" in log and "settings    read" in log, log
    assert [line["step"] for line in records(folder / "stopped")] == list(range(1, last + 6))


def test_a_process_that_is_killed_ends_the_other_and_both_go_on(slurm: Slurm):
    folder = slurm.folder
    job = slurm.submit(*flags(folder, "killed"))
    wait_until(lambda: has_steps(folder, "killed", 25), f"a checkpoint: {slurm.log(job)}")
    wait_until(lambda: (folder / "killed" / "checkpoints" / "step_00000020").exists(), "a checkpoint")
    tasks = slurm("scontrol", "listpids", job).splitlines()
    pid = next(line.split()[0] for line in tasks if line.split()[3] == "1" and line.split()[2] == "0")
    os.kill(int(pid), 9)
    slurm.continue_now(job)
    log = slurm.log(job)
    assert "error: process 1 is gone: it was killed" in log and "exit code 137, a process was lost" in log
    wait_until(lambda: re.search(r"checkpoint of step \d+ found: continuing", slurm.log(job)), slurm.log(job)[-2000:])
    slurm("scancel", job)


def test_a_more_urgent_job_takes_its_place_and_it_goes_on_afterwards(slurm: Slurm):
    folder = slurm.folder
    job = slurm.submit(*flags(folder, "preempted"))
    wait_until(lambda: has_steps(folder, "preempted", 3), f"three steps: {slurm.log(job)}")
    urgent = slurm("sbatch", "--parsable", "--partition=urgent", "--exclusive", "--wrap", "true").strip()
    slurm.continue_now(job)
    assert saved(slurm.log(job)), slurm.log(job)
    wait_until(lambda: slurm.state(urgent) == "COMPLETED", "the urgent job")
    wait_until(lambda: re.search(r"checkpoint of step \d+ found: continuing", slurm.log(job)), slurm.log(job)[-2000:])
    slurm("scancel", job)
