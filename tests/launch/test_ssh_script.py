"""What the SSH script starts where, and how it ends, with an ssh that stays here and a Python that only waits."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# as ssh does: the words after the host are one line for a shell there
SSH = """#!/bin/bash
while [[ "$1" == -* ]]; do [ "$1" = -o ] && shift; shift; done
echo "$1" >> "$RECORD/hosts"
if [ "$1" = "${UNREACHED:-}" ]; then echo "ssh: connect to host $1 port 22: No route to host" >&2; exit 255; fi
shift
exec bash -c "$*"
"""
# a training: says its words, ends with CODE_<number>, or when it is told to
PYTHON = """#!/bin/bash
number=${@: -1}
printf '%s\\n' "$@" > "$RECORD/$2.$number"
env > "$RECORD/environment.$number"
[ "$2" = jaxtron.doctor ] && exit "${DOCTOR_CODE:-0}"
echo "step of $number"
name=CODE_$number
[ -n "${!name:-}" ] && exit "${!name}"
trap 'echo saved $number; exit 130' TERM
touch "$RECORD/waits.$number"
for _ in $(seq 600); do sleep 0.05; done
exit 99
"""


class Cluster:
    """Two hosts that are this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, folder / "record"
        self.record.mkdir()
        for name, text in {"ssh": SSH, "python": PYTHON}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def start(self, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "SSH": str(self.folder / "ssh"),
            "PYTHON": str(self.folder / "python"),
            "RECORD": str(self.record),
            "JAXTRON_RECORD": "passed on",
            "DOCTOR": "0",
            **settings,
        }
        return subprocess.Popen(
            ["bash", ROOT / "launch" / "ssh.sh", *arguments],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **settings: str) -> tuple[int, str]:
        return end(self.start(*arguments, **settings))

    def words(self, number: int, module: str = "jaxtron.train") -> list[str]:
        return (self.record / f"{module}.{number}").read_text().splitlines()

    def wait_for(self, *numbers: int) -> None:
        deadline = time.monotonic() + 30
        while not all((self.record / f"waits.{number}").exists() for number in numbers):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=20)
    return process.returncode, out


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_every_host_has_its_process(cluster: Cluster):
    code, out = cluster.run("a@n1,n2", "x y.yaml", "--data.path", "it's $HOME", CODE_0="0", CODE_1="0", PORT="29401")
    assert code == 0 and "a@n1: step of 0" in out and "n2: step of 1" in out
    assert sorted((cluster.record / "hosts").read_text().split()) == ["a@n1", "n2"]
    common = ["-m", "jaxtron.train", "x y.yaml", "--data.path", "it's $HOME"]
    where = ["--runtime.coordinator_address", "n1:29401", "--runtime.num_processes", "2", "--runtime.process_id"]
    for number in range(2):
        assert cluster.words(number) == [*common, *where, str(number)]
    environment = (cluster.record / "environment.1").read_text()
    assert "NCCL_DEBUG=WARN\n" in environment and "JAXTRON_RECORD=passed on\n" in environment


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_lets_all_save(cluster: Cluster, number: signal.Signals):
    process = cluster.start("n1,n2", "a.yaml")
    cluster.wait_for(0, 1)
    # what a terminal does reaches the script's group, and no ssh in it
    os.killpg(process.pid, number)
    code, out = end(process)
    assert code == 130 and "saved 0" in out and "saved 1" in out
    assert "exit code 130 (saved): the same command continues from the last checkpoint" in out


def test_the_end_of_the_script_does_too(cluster: Cluster):
    process = cluster.start("n1,n2", "a.yaml")
    cluster.wait_for(0, 1)
    process.kill()
    _, out = end(process)
    assert "saved 0" in out and "saved 1" in out


@pytest.mark.parametrize(
    ("codes", "expected"), [("0 75", 75), ("75 137", 75), ("2 75", 2), ("2 1", 1), ("130 143", 143)]
)
def test_exit_codes(cluster: Cluster, codes: str, expected: int):
    first, second = codes.split()
    assert cluster.run("n1,n2", "a.yaml", CODE_0=first, CODE_1=second)[0] == expected


def test_a_host_that_is_not_reached_stops_the_others(cluster: Cluster):
    code, out = cluster.run("n1,n2", "a.yaml", UNREACHED="n2")
    assert code == 255 and "ssh to n2 failed, or its connection was lost: stopping the others" in out
    assert "saved 0" in out or "step of 0" not in out


def test_the_doctor_comes_first_and_may_refuse(cluster: Cluster):
    code, _ = cluster.run("n1,n2", "a.yaml", DOCTOR="1", DOCTOR_CODE="1")
    assert code == 1 and not list(cluster.record.glob("jaxtron.train*"))
    assert cluster.words(1, "jaxtron.doctor")[2] == "a.yaml"
    assert cluster.run("n1,n2", "a.yaml", DOCTOR="1", CODE_0="0", CODE_1="0")[0] == 0
    assert cluster.words(0)[1] == "jaxtron.train"


def test_hosts_of_a_file(cluster: Cluster):
    file = cluster.folder / "hosts.txt"
    file.write_text("# the rack\nn1 slots=8\n\n  n2   # slow\n")
    assert cluster.run(str(file), "a.yaml", CODE_0="0", CODE_1="0")[0] == 0
    assert sorted((cluster.record / "hosts").read_text().split()) == ["n1", "n2"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "usage: launch/ssh.sh HOSTS CONFIG.yaml"),
        (("n1",), "usage:"),
        (("n1,n2,n1", "a.yaml"), "a host is named twice, and each has one process: n1"),
        (("", "a.yaml"), "these are no names of hosts"),
        (("n1,,n2", "a.yaml"), "these are no names of hosts"),
        (("n1;reboot", "a.yaml"), "these are no names of hosts: n1;reboot"),
        (("-oProxyCommand=x,n2", "a.yaml"), "these are no names of hosts"),
        (("/dev/null", "a.yaml"), "these are no names of hosts"),
    ],
)
def test_bad_input_is_one_line(cluster: Cluster, arguments: tuple[str, ...], line: str):
    code, out = cluster.run(*arguments)
    assert code == 2 and line in out and out.count("\n") == 1
