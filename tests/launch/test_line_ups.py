"""Who trains as hosts come, die, hang and leave: a leader and supervisors on their own clock, without processes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from jaxtron.launch.codes import exit_code, worst
from jaxtron.launch.leader import (
    FIRST_PAUSE,
    GRACE_SECONDS,
    REGATHER_SECONDS,
    SILENCE_SECONDS,
    STEADY_SECONDS,
    Leader,
)
from jaxtron.launch.member import LifeSign, Lineup
from jaxtron.launch.request import LaunchRequest
from jaxtron.launch.supervisor import Supervisor

REQUEST = LaunchRequest(2, 4, ("train",), (), settle_seconds=30, grow_seconds=100, wait_seconds=200)
# a supervisor's own rhythm is finer
TICK = 1.0


class Fits:
    """Numbers of hosts that fit."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def flags(self, hosts: int) -> tuple[str, ...]:
        assert hosts in self.numbers
        return ("--train.microbatches", str(4 // hosts))

    def largest(self, available: int, fewest: int) -> int | None:
        return max((number for number in self.numbers if fewest <= number <= available), default=None)


@dataclass
class FakeProcesses:
    """A host's processes: their flags while they run, and what was done to them."""

    running: list[Sequence[str]] = field(default_factory=list)
    ended: int | None = None
    told: list[str] = field(default_factory=list)

    def start(self, flags: Sequence[Sequence[str]]) -> None:
        assert not self.running, "two line-ups at once"
        self.running, self.ended = list(flags), None
        self.told.append("start")

    def code(self) -> int | None:
        return self.ended

    def terminate(self) -> None:
        self.told.append("terminate")

    def kill(self, *, stacks: bool = False) -> None:
        self.running = []
        self.told.append("stacks" if stacks else "kill")

    def end(self, code: int) -> None:
        self.running, self.ended = [], code


@dataclass
class FakeHost:
    """A supervisor, whether it lives, whether it is asked to leave, and its exit code."""

    supervisor: Supervisor
    processes: FakeProcesses
    lives: bool = True
    leaves: bool = False
    code: int | None = None


class Cluster:
    """Hosts by name, the first of which leads, and what is stored."""

    def __init__(self, *names: str, request: LaunchRequest = REQUEST, fits: Fits | None = None) -> None:
        self.said: list[str] = []
        self.now = 1000.0
        self.signs: dict[str, LifeSign] = {}
        self.hosts: dict[str, FakeHost] = {}
        self.lineup: Lineup | None = None
        ports = iter(range(1, 100))
        self.leader = Leader(
            request,
            fits or Fits(2, 3, 4),
            names[0],
            service="one",
            coordinator=lambda: f"a:{next(ports)}",
            say=self.said.append,
        )
        for name in names:
            self.join(name)

    def join(self, name: str) -> None:
        processes = FakeProcesses()
        self.hosts[name] = FakeHost(Supervisor(name, name, processes, count=2, say=self.said.append), processes)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += TICK
            for index, (name, host) in enumerate(self.hosts.items()):
                if not host.lives or host.code is not None:
                    continue
                self.signs[name] = host.supervisor.sign(leaving=host.leaves)
                if index == 0:
                    self.lineup = self.leader.decide(self.now, self.signs.values())
                if self.lineup is not None:
                    host.code = host.supervisor.follow(self.lineup)

    def trains(self) -> list[str]:
        return [name for name, host in self.hosts.items() if host.processes.running and host.lives]

    def end(self, code: int, *names: str) -> None:
        for name in names:
            self.hosts[name].processes.end(code)

    def codes(self) -> list[int | None]:
        return [host.code for host in self.hosts.values()]


def flag(line: Sequence[str], name: str) -> str:
    return line[line.index(f"--runtime.{name}") + 1]


def test_all_that_there_may_be_begin_at_once_and_fewer_after_a_while():
    full = Cluster("a", "b", "c", "d")
    full.run(3)
    assert full.trains() == ["a", "b", "c", "d"]
    lines = [line for host in full.hosts.values() for line in host.processes.running]
    assert [flag(line, "process_id") for line in lines] == [str(number) for number in range(8)]
    assert {flag(line, "num_processes") for line in lines} == {"8"}
    assert {flag(line, "coordinator_address") for line in lines} == {"a:1"}
    assert all(line[:2] == ["--train.microbatches", "1"] for line in lines)

    part = Cluster("a", "b")
    part.run(REQUEST.settle_seconds - 1)
    assert part.trains() == []
    # one more, and the wait for others begins anew
    part.join("c")
    part.run(REQUEST.settle_seconds - 1)
    assert part.trains() == []
    part.run(3)
    assert part.trains() == ["a", "b", "c"]


def test_too_few_wait_and_then_end_with_try_again():
    alone = Cluster("a")
    alone.run(REQUEST.wait_seconds - 2)
    assert alone.codes() == [None]
    alone.run(5)
    assert alone.codes() == [75] and alone.lineup is not None and "1 host of 2 or more came" in alone.lineup.note


def test_a_dead_host_is_noticed_and_the_others_go_on():
    cluster = Cluster("a", "b", "c", "d")
    cluster.run(3)
    cluster.hosts["c"].lives = False
    cluster.run(SILENCE_SECONDS - 1)
    assert cluster.trains() == ["a", "b", "d"]
    cluster.run(REGATHER_SECONDS + FIRST_PAUSE + 3)
    assert cluster.trains() == ["a", "b", "d"] and any(
        "c gave no sign of life for 15 s" in line for line in cluster.said
    )
    assert cluster.hosts["a"].processes.told == ["start", "kill", "start"]
    ids = [flag(line, "process_id") for name in "abd" for line in cluster.hosts[name].processes.running]
    assert ids == list("012345") and flag(cluster.hosts["d"].processes.running[0], "coordinator_address") == "a:2"


def test_one_that_comes_back_is_taken_in_after_a_save():
    cluster = Cluster("a", "b", "c", "d")
    cluster.run(3)
    cluster.hosts["c"].lives = False
    cluster.run(SILENCE_SECONDS + REGATHER_SECONDS + FIRST_PAUSE + 3)
    cluster.join("e")
    cluster.run(REQUEST.grow_seconds - 20)
    assert cluster.trains() == ["a", "b", "d"] and "terminate" not in cluster.hosts["a"].processes.told
    cluster.run(25)
    # one process is asked, and the run ends by itself
    assert [host.processes.told.count("terminate") for host in cluster.hosts.values()] == [1, 0, 0, 0, 0]
    cluster.end(130, "a", "b", "d")
    cluster.run(REGATHER_SECONDS + 3)
    assert cluster.trains() == ["a", "b", "d", "e"] and cluster.codes() == [None] * 5


def test_a_spare_host_waits_and_takes_the_place_of_a_lost_one():
    cluster = Cluster("a", "b", "c", "d", "e")
    cluster.run(3)
    assert cluster.trains() == ["a", "b", "c", "d"] and "1 spare host waiting" in cluster.said[0]
    cluster.hosts["b"].lives = False
    cluster.run(SILENCE_SECONDS + FIRST_PAUSE + 3)
    assert cluster.trains() == ["a", "c", "d", "e"]


def test_what_does_not_fit_waits():
    cluster = Cluster("a", "b", "c", fits=Fits(2, 4))
    cluster.run(REQUEST.settle_seconds + 2)
    assert cluster.trains() == ["a", "b"] and "1 spare host waiting" in cluster.said[0]


@pytest.mark.parametrize(("code", "over"), [(0, 0), (130, 130), (2, 2), (1, 1)])
def test_an_end_by_itself_is_the_end_of_all(code: int, over: int):
    cluster = Cluster("a", "b", "c", "d")
    cluster.run(3)
    cluster.end(code, "a", "b", "c", "d")
    cluster.run(3)
    assert cluster.codes() == [over] * 4


def test_lost_processes_are_started_again_so_often():
    cluster = Cluster("a", "b", "c", "d")
    for attempt in range(REQUEST.restarts + 1):
        cluster.run(60)
        assert cluster.trains() == ["a", "b", "c", "d"], attempt
        cluster.end(137, "b")
        cluster.end(75, "a", "c", "d")
    cluster.run(3)
    assert cluster.codes() == [75] * 4
    assert any("exit code 137 on b" in line for line in cluster.said)
    assert cluster.lineup is not None and "4 times in a row" in cluster.lineup.note


def test_a_run_that_went_on_for_a_while_has_all_its_attempts_again():
    cluster = Cluster("a", "b", "c", "d")
    for _ in range(3 * REQUEST.restarts):
        cluster.run(STEADY_SECONDS + 60)
        assert cluster.trains() == ["a", "b", "c", "d"]
        cluster.end(75, "a", "b", "c", "d")
    assert cluster.codes() == [None] * 4


def test_what_hangs_is_ended_after_it_has_shown_its_stacks():
    cluster = Cluster("a", "b", "c", "d")
    cluster.run(3)
    cluster.end(75, "a", "b", "d")
    cluster.run(GRACE_SECONDS - 2)
    assert cluster.hosts["c"].processes.told == ["start"]
    cluster.run(FIRST_PAUSE + 6)
    assert cluster.hosts["c"].processes.told == ["start", "stacks", "start"]
    assert "kill" not in cluster.hosts["a"].processes.told and len(cluster.trains()) == 4


def test_a_host_that_is_asked_to_leave_saves_and_the_others_go_on():
    cluster = Cluster("a", "b", "c", "d")
    cluster.run(3)
    cluster.hosts["c"].leaves = True
    cluster.run(2)
    assert cluster.hosts["c"].processes.told == ["start", "terminate"]
    cluster.end(130, "a", "b", "c", "d")
    cluster.run(REGATHER_SECONDS + 3)
    assert cluster.codes() == [None, None, 130, None] and cluster.trains() == ["a", "b", "d"]


@pytest.mark.parametrize("leaving", [["a"], ["a", "b", "c", "d"], ["b", "c", "d"]])
def test_where_the_leader_or_too_many_leave_all_end(leaving: list[str]):
    cluster = Cluster("a", "b", "c", "d")
    cluster.run(3)
    for name in leaving:
        cluster.hosts[name].leaves = True
    cluster.run(2)
    cluster.end(130, "a", "b", "c", "d")
    cluster.run(3)
    assert cluster.codes() == [130] * 4


def test_another_leader_counts_anew():
    cluster = Cluster("a", "b", "c", "d")
    cluster.run(3)
    host = cluster.hosts["b"]
    host.supervisor.lost()
    assert host.processes.told == ["start", "kill"]
    assert host.supervisor.follow(Lineup("two", 1)) is None
    sign = host.supervisor.sign()
    assert (sign.state, sign.number) == ("ready", 1)
    assert host.supervisor.follow(Lineup("two", 1, ("x", "b"), "x:1")) is None
    assert flag(host.processes.running[0], "process_id") == "2"


def test_records_travel_as_text():
    sign = LifeSign("a-1", "a", 3, "ended", 2, 137, leaving=True)
    lineup = Lineup("one", 2, ("a", "b"), "a:1", ("--mesh.data", "-1"), "save", 75, "why")
    assert LifeSign.of(sign.text()) == sign and Lineup.of(lineup.text()) == lineup
    assert LifeSign.of(replace(sign, code=None).text()).code is None


@pytest.mark.parametrize(
    ("codes", "found"),
    [([0, 0], 0), ([0, 130], 130), ([75, -9], 137), ([75, 2, 137], 2), ([75, 130], 75), ([-11, 0], 139), ([], 0)],
)
def test_the_worst_of_several_codes(codes: list[int], found: int):
    assert worst(map(exit_code, codes)) == found
