"""What the batch file for Slurm does with each exit code and setting, with a srun and a scontrol that only say it."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SRUN = """#!/bin/bash
echo "$*" >> "$RECORD/srun"
case "$*" in
  *jaxtron.doctor*) exit "${DOCTOR_CODE:-0}" ;;
  *stage.sh*) exit "${STAGE_CODE:-0}" ;;
  *) env > "$RECORD/environment"; exit "${TRAIN_CODE:-0}" ;;
esac
"""
# as Slurm does: a job that is queued again ends with its script
SCONTROL = """#!/bin/bash
echo "$*" >> "$RECORD/scontrol"
[ -z "${REFUSES:-}" ] || exit 1
kill -KILL $PPID
"""


@dataclass(frozen=True)
class Job:
    """How a job ended: what it asked Slurm for, a line a call."""

    code: int
    text: str
    steps: list[str]
    requeues: list[str]


@pytest.fixture
def submit(tmp_path: Path):
    tools, record = tmp_path / "bin", tmp_path / "record"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(*arguments: str, **settings: str) -> Job:
        record.mkdir(exist_ok=True)
        for file in record.iterdir():
            file.unlink()
        # Slurm runs a copy
        script = tmp_path / "slurm_script"
        script.write_text((ROOT / "launch" / "slurm.sbatch").read_text())
        result = subprocess.run(
            ["bash", script, *arguments],
            env={
                "PATH": f"{tools}:{os.environ['PATH']}",
                "RECORD": str(record),
                "LAUNCH": str(ROOT / "launch"),
                "SLURM_SUBMIT_DIR": str(tmp_path),
                "SLURM_JOB_ID": "7",
                "SLURM_NNODES": "2",
                "PYTHON": "python",
                **settings,
            },
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        lines = {
            name: (record / name).read_text().splitlines() if (record / name).exists() else []
            for name in ("srun", "scontrol")
        }
        return Job(result.returncode, result.stdout + result.stderr, lines["srun"], lines["scontrol"])

    return run


@pytest.mark.parametrize("code", [130, 138, 143])
def test_a_saved_run_is_queued_again_however_often(submit, code: int):
    for _ in range(6):
        job = submit("a.yaml", "--train.steps", "5", TRAIN_CODE=str(code))
        assert job.requeues == ["requeue 7"] and f"exit code {code}, stopped by a signal" in job.text


@pytest.mark.parametrize("code", [75, 134, 137, 139])
def test_lost_processes_are_worth_three_tries(submit, code: int):
    assert [bool(submit("a.yaml", TRAIN_CODE=str(code)).requeues) for _ in range(3)] == [True, True, False]
    # a new job of that number begins to count anew, and so does one that was saved in between
    assert submit("a.yaml", TRAIN_CODE=str(code)).requeues
    assert submit("a.yaml", TRAIN_CODE="130").requeues
    assert [bool(submit("a.yaml", TRAIN_CODE=str(code)).requeues) for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_what_is_done_or_would_fail_again_is_not(submit, code: int, tmp_path: Path):
    job = submit("a.yaml", TRAIN_CODE=str(code))
    assert job.code == code and job.requeues == [] and not list(tmp_path.glob(".jaxtron*"))


def test_a_job_that_may_not_be_queued_again_says_how_to_go_on(submit):
    job = submit("a.yaml", TRAIN_CODE="130", REFUSES="1")
    assert job.code == 130 and "the same sbatch line continues from the checkpoint" in job.text


def test_the_doctor_and_the_copies_come_first_and_may_refuse(submit):
    job = submit("a.yaml", "--mesh.data", "16", STAGE="/shared/a /local/a", SLURM_CPUS_PER_TASK="8")
    stage, doctor, train = job.steps
    assert stage.endswith("stage.sh /shared/a /local/a") and "--ntasks=2 --ntasks-per-node=1" in stage
    assert doctor.endswith("-m jaxtron.doctor a.yaml --mesh.data 16") and "--ntasks=2 --ntasks-per-node=1" in doctor
    assert train.endswith("--label --wait=120 python -m jaxtron.train a.yaml --mesh.data 16")
    assert "--ntasks" not in train
    assert submit("a.yaml", STAGE="a b", STAGE_CODE="2").code == 2
    refused = submit("a.yaml", DOCTOR_CODE="1")
    assert (refused.code, len(refused.steps), refused.requeues) == (1, 1, [])
    assert len(submit("a.yaml", DOCTOR="0", DOCTOR_CODE="1").steps) == 1


def test_containers(submit, tmp_path: Path):
    pyxis = submit("a.yaml", IMAGE="/images/j.sqsh", MOUNTS="/data:/data").steps[-1]
    assert f"--container-image=/images/j.sqsh --container-mounts={tmp_path}:{tmp_path},/data:/data" in pyxis
    assert pyxis.endswith("python -m jaxtron.train a.yaml")
    apptainer = submit("a.yaml", IMAGE="/images/j.sif").steps
    inside = f"apptainer exec --nv --bind {tmp_path}:{tmp_path} --pwd {tmp_path} /images/j.sif python -m jaxtron"
    assert f"{inside}.doctor a.yaml" in apptainer[0] and f"{inside}.train a.yaml" in apptainer[1]


def environment_of(tmp_path: Path) -> dict[str, str]:
    """What the training's processes had."""
    lines = (tmp_path / "record" / "environment").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_the_environment(submit, tmp_path: Path):
    site = tmp_path / "site.sh"
    site.write_text("export NCCL_SOCKET_IFNAME=ib0\n")
    submit("a.yaml", JAXTRON_SITE=str(site), SLURM_CPUS_PER_TASK="8", http_proxy="http://proxy:3128")
    found = environment_of(tmp_path)
    assert found["NCCL_DEBUG"] == "WARN" and found["NCCL_SOCKET_IFNAME"] == "ib0" and found["SRUN_CPUS_PER_TASK"] == "8"
    assert found["no_proxy"] == "127.0.0.1,localhost"
    submit("a.yaml", NCCL_DEBUG="INFO", http_proxy="http://proxy:3128", no_proxy="10.0.0.0/8")
    found = environment_of(tmp_path)
    assert found["NCCL_DEBUG"] == "INFO" and found["no_proxy"] == "127.0.0.1,localhost,10.0.0.0/8"
    submit("a.yaml")
    # JAX would warn of it
    assert "no_proxy" not in environment_of(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "settings", "line"),
    [
        ((), {}, "error: nothing to train"),
        (("a.yaml",), {"LAUNCH": "/nowhere"}, "error: there is no /nowhere/environment.sh: submit from"),
        (("a.yaml",), {"JAXTRON_SITE": "/nowhere/site.sh"}, "/nowhere/site.sh: No such file"),
    ],
)
def test_what_is_not_there_is_one_line(submit, arguments: tuple[str, ...], settings: dict[str, str], line: str):
    job = submit(*arguments, **settings)
    assert job.code == 2 and line in job.text and job.steps == []


def stage(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "launch" / "stage.sh", *arguments], capture_output=True, text=True, timeout=60
    )


def test_copies_are_made_once_and_whole(tmp_path: Path):
    source, target = tmp_path / "corpus", tmp_path / "local" / "corpus"
    source.mkdir()
    (source / "a b.bin").write_bytes(b"1" * 5000)
    ended = [
        subprocess.Popen(["bash", ROOT / "launch" / "stage.sh", source, target], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=60)[0] for process in ended]
    assert [process.returncode for process in ended] == [0, 0, 0] and sum("staged" in text for text in said) == 1
    assert (target / "a b.bin").read_bytes() == b"1" * 5000
    assert stage(source, target).stdout == ""
    # half a copy of an earlier call, and a source that changed
    part = target.with_name("corpus.part")
    part.mkdir()
    (part / "a b.bin").write_bytes(b"2")
    (source / "a b.bin").write_bytes(b"3" * 6000)
    assert "staged" in stage(source, target).stdout and (target / "a b.bin").read_bytes() == b"3" * 6000
    assert not part.exists()
    # a single file
    assert stage(source / "a b.bin", tmp_path / "one.bin").returncode == 0
    assert (tmp_path / "one.bin").read_bytes() == b"3" * 6000


def test_copies_that_cannot_be_made_are_one_line(tmp_path: Path):
    source, foreign = tmp_path / "a", tmp_path / "foreign"
    source.write_text("x")
    foreign.write_text("mine")
    for arguments, line in {
        (): "usage:",
        (source,): "usage:",
        (tmp_path / "no", tmp_path / "b"): "/no to copy; is the shared file system mounted",
        (source, "/proc/1/x/b"): "cannot make /proc/1/x; choose a TARGET",
        (source, foreign): "is there and no copy of ours",
    }.items():
        ended = stage(*arguments)
        assert ended.returncode == 2 and line in ended.stderr, (arguments, ended)
    assert foreign.read_text() == "mine"
