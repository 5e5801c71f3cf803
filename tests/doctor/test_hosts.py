"""Machines asked together over loopback: all come, or the doctor says who did not, and in what they differ."""

import json
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from jaxtron.doctor import hosts
from jaxtron.doctor.__main__ import main
from jaxtron.doctor.facts import code_digest, facts_of
from jaxtron.doctor.finding import Finding, fault
from jaxtron.doctor.hosts import Coordinates, check_together, compare
from jaxtron.doctor.surroundings import Surroundings
from tests.support.command_runs import free_port
from tests.support.commands import run_main

FACTS = {"jax": "0.11.2", "settings": "abc"}
Outcome = tuple[list[Finding], int]


def around(process: int) -> Surroundings:
    return Surroundings(environment={}, host=f"n{process}", resolve=lambda name: "127.0.0.1")


def together(
    count: int = 3,
    *,
    absent: tuple[int, ...] = (),
    facts: Mapping[int, Mapping[str, str]] | None = None,
    own: Mapping[int, list[Finding]] | None = None,
    numbers: Mapping[int, int] | None = None,
    wait: float = 20,
) -> list[Outcome]:
    """What each process of a run says, process 0 first; those that are absent say nothing."""
    address = f"127.0.0.1:{free_port()}"
    found: dict[int, Outcome] = {}

    def ask(process: int) -> None:
        at = Coordinates(address, count, (numbers or {}).get(process, process), wait)
        told = FACTS | dict((facts or {}).get(process, {}))
        found[process] = check_together(at, around(process), told, (own or {}).get(process, []))

    threads = [threading.Thread(target=ask, args=(process,)) for process in range(count) if process not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[process] for process in sorted(found)]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "SENT_SECONDS", 0.02)
    # a busy machine is slow
    monkeypatch.setattr(hosts, "SLOW_RATE", 0.0)
    monkeypatch.setattr(hosts, "FAR_SECONDS", 60.0)


def bad(outcome: Outcome) -> list[str]:
    return [finding.line(0) for finding in outcome[0] if finding.level != "good"]


def test_all_well():
    outcomes = together()
    assert [code for _, code in outcomes] == [0, 0, 0] and bad(outcomes[0]) == []
    texts = {finding.check: finding.text for finding in outcomes[0][0]}
    assert "all 3 came to" in texts["hosts"] and "there and back" in texts["network"]
    assert texts["equal"] == "jax, settings: the same on 3 hosts"
    # the others leave the word to process 0
    assert outcomes[1][0] == outcomes[2][0] == []


def test_one_does_not_come():
    outcomes = together(absent=(2,), wait=2)
    assert [code for _, code in outcomes] == [1, 1]
    assert "1 of 3 did not come within 2 s: 2; see what they printed" in bad(outcomes[0])[0]


@pytest.mark.parametrize("name", ["jax", "settings", "XLA_FLAGS"])
def test_one_differs(name: str):
    outcomes = together(facts={1: {name: "other"}})
    assert [code for _, code in outcomes] == [1, 1, 1]
    usual = FACTS.get(name, "none")
    assert bad(outcomes[0]) == [
        f"fault  equal  {name} differs: other on n1, {usual} on n0, n2; make it the same on all"
    ]


def test_another_minor_python_is_a_doubt():
    found = list(compare({"a": {"Python": "3.12.1"}, "b": {"Python": "3.12.3"}}))
    assert [finding.level for finding in found] == ["doubt"]


def test_a_fault_of_one_machine_is_told_by_process_0():
    outcomes = together(own={2: [fault("gpus", "7 where 8 are expected", "drain the machine")]})
    assert bad(outcomes[0]) == ["fault  gpus  n2: 7 where 8 are expected; drain the machine"]
    assert [code for _, code in outcomes] == [1, 1, 1]


def test_a_clock_that_is_wrong(monkeypatch: pytest.MonkeyPatch):
    real = time.time

    def wrong() -> float:
        return real() + (90 if threading.current_thread().name == "visitor" else 0)

    monkeypatch.setattr("jaxtron.doctor.hosts.time.time", wrong)
    address = f"127.0.0.1:{free_port()}"
    visitor = threading.Thread(
        target=lambda: check_together(Coordinates(address, 2, 1, 20), around(1), FACTS, []), name="visitor"
    )
    visitor.start()
    outcome = check_together(Coordinates(address, 2, 0, 20), around(0), FACTS, [])
    visitor.join(30)
    assert outcome[1] == 1 and bad(outcome)[0].startswith(
        "fault  clock  that of n1 is 90 s ahead; start its time service"
    )


def test_a_slow_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hosts, "SLOW_RATE", 1e15)
    monkeypatch.setattr(hosts, "FAR_SECONDS", 0.0)
    outcome = together(2)[0]
    assert outcome[1] == 0 and ["answers after" in line or "over TCP" in line for line in bad(outcome)] == [True, True]


def test_two_of_one_number():
    outcomes = together(numbers={2: 1}, wait=2)
    assert any("says that it is process 1, of 3" in line for line in bad(outcomes[0])) and outcomes[0][1] == 1


def test_strangers_and_half_words_keep_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hosts, "PATIENCE", 0.5)
    port = free_port()
    found: list[Outcome] = []
    first = threading.Thread(
        target=lambda: found.append(check_together(Coordinates(f"127.0.0.1:{port}", 2, 0, 20), around(0), FACTS, []))
    )
    first.start()
    for words in (b"GET / HTTP/1.0\r\n\r\n", b"[]\n", b'{"process": 1}\n', b"", b'{"process": "x", "host": 1}\n'):
        while True:
            try:
                connection = socket.create_connection(("127.0.0.1", port), timeout=5)
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        connection.sendall(words)
        connection.close()
    assert check_together(Coordinates(f"127.0.0.1:{port}", 2, 1, 20), around(1), FACTS, []) == ([], 0)
    first.join(30)
    assert found[0][1] == 0 and sum("came and is no doctor" in line for line in bad(found[0])) == 5


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:{port}", "nobody listens there; start process 0 on that host"),
        ("no-such-host.invalid:{port}", "the name no-such-host.invalid means nothing here; name it in DNS"),
    ],
)
def test_no_way_to_process_0(address: str, words: str):
    at = Coordinates(address.format(port=free_port()), 2, 1, 0.3)
    found, code = check_together(at, around(1), FACTS, [])
    assert code == 1 and words in found[0].line(0)


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        at = Coordinates(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0, 1)
        found, code = check_together(at, around(0), FACTS, [])
    assert code == 1 and "process 0 cannot listen on port" in found[-1].line(0)


def test_a_name_that_leads_home():
    at = Coordinates("n0:1", 2, 0, 1)
    assert "n0 is 127.0.0.1 on itself" in next(hosts._check_name(at, around(0))).text


def test_facts(tmp_path: Path):
    (tmp_path / "a.py").write_text("1")
    first = code_digest(tmp_path)
    (tmp_path / "a.py").write_text("2")
    assert code_digest(tmp_path) != first
    facts = facts_of(Surroundings(root=tmp_path, environment={"NCCL_DEBUG": "WARN", "HOME": "/x"}), None)
    assert facts["NCCL_DEBUG"] == "WARN" and "HOME" not in facts and {"jax", "commit", "Python"} <= facts.keys()


def test_the_command(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("words " * 100)
    flags = ["--data.path", text, "--run.directory", tmp_path / "run", "--data.cache_directory", tmp_path, "--gpus", 0]
    ended = run_main(main, flags)
    assert ended.code == 0 and f"data there: {text}" in ended.out and not (tmp_path / "run").exists()
    told = json.loads(run_main(main, [*flags, "--json"]).out)
    assert told["ok"] is True and {finding["check"] for finding in told["findings"]} >= {"settings", "disk", "jax"}


def test_one_process_a_machine_of_slurm_does_not_know_the_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    flags = ["--devices", 1, "--mesh.data", 2, "--run.directory", tmp_path / "run", "--data.cache_directory", tmp_path]
    assert "mesh.data 2 needs 2 devices" in run_main(main, flags).out
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert run_main(main, flags).code == 0


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--data.path", "/nowhere/corpus", "--gpus", "0"], 1, "/nowhere/corpus"),
        (["/nowhere.yaml"], 2, "error: "),
        (["--gpu", "8"], 2, "did you mean --gpus?"),
        (["--gpus", "-1"], 2, "must be a whole number, 0 or above"),
        (["--gpus", "many"], 2, "must be a whole number"),
        (["--wait", "0"], 2, "must be a number above 0"),
        (["--wait", "nan"], 2, "must be a number above 0"),
        (["--json", "--json"], 2, "--json is given twice"),
        (["--mesh.tensor", "three"], 2, "error: "),
        (["--runtime.coordinator_address", "n1:1"], 2, "runtime.num_processes and runtime.process_id missing"),
        (
            ["--runtime.coordinator_address", "n1", "--runtime.num_processes", "1", "--runtime.process_id", "0"],
            2,
            "host:port",
        ),
        (
            "--gpus 0 --runtime.coordinator_address n1:0 --runtime.num_processes 1 --runtime.process_id 0".split(),
            1,
            "n1:0: ports go from 1 to 65535",
        ),
        (["--devices", "0"], 2, "error: "),
        (["--run.directory", "/proc/nowhere/run", "--gpus", "0"], 1, "--run.directory"),
        (["--train.global_batch", "7", "--train.microbatches", "2", "--gpus", "0"], 1, "train.global_batch 7"),
    ],
)
def test_bad_input(words: list[str], code: int, line: str):
    ended = run_main(main, words)
    assert ended.code == code and line in ended.out + ended.err, ended


def test_help():
    assert "--wait SECONDS" in run_main(main, ["--help"]).out
