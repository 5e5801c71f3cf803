"""JAX's coordination service as supervisors use it: keys and values for whoever comes, and news when it is lost."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from jaxtron.config import UserError
from jaxtron.launch import rendezvous
from jaxtron.launch.children import Children
from jaxtron.launch.rendezvous import Rendezvous, RendezvousLost, is_here, serving
from tests.support.command_runs import free_port


@pytest.fixture
def port() -> Iterator[int]:
    found = free_port()
    with serving("127.0.0.1", found, is_alone=True) as is_leader:
        assert is_leader
        yield found


@pytest.mark.slow
def test_any_number_meet_and_nobody_is_missed(port: int, monkeypatch: pytest.MonkeyPatch):
    with ExitStack() as stack:

        def meet() -> Rendezvous:
            made = Rendezvous(f"127.0.0.1:{port}")
            stack.callback(made.close)
            return made

        _meet_and_miss(port, meet, monkeypatch)


def _meet_and_miss(port: int, meet: Callable[[], Rendezvous], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = meet(), meet()
    assert first.exchange({"signs/a": "1"}, ["signs/", "line/"]) == {"signs/": {"signs/a": "1"}, "line/": {}}
    assert second.exchange({"signs/b": "x y\n"}, ["signs/"]) == {"signs/": {"signs/a": "1", "signs/b": "x y\n"}}
    # one goes without a word, and another comes
    second._process.send_signal(signal.SIGKILL)
    third = meet()
    assert first.exchange({"signs/a": "2"}, ["signs/"])["signs/"]["signs/a"] == "2"
    with pytest.raises(RendezvousLost):
        second.exchange({}, [])
    # a second supervisor of this machine does not serve the same port, nor does one take a program's
    with serving("127.0.0.1", port, is_alone=True) as is_leader:
        assert not is_leader
    # one that is silent, as behind a network that is gone, is as one that has ended
    monkeypatch.setattr(rendezvous, "ANSWER_SECONDS", 1.0)
    server = next(pid for pid in _children() if b"serve" in _line(pid))
    os.kill(server, signal.SIGSTOP)
    while _state(server) != "T":
        time.sleep(0.01)
    with pytest.raises(RendezvousLost):
        third.exchange({}, ["signs/"])
    os.kill(server, signal.SIGCONT)


def test_a_port_that_another_program_has_is_told():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on port {port}"), serving("127.0.0.1", port, is_alone=True):
            pass


def test_which_hosts_are_this_one():
    assert is_here("localhost") and is_here("127.0.0.1") and is_here(socket.gethostname())
    # addresses for documentation, RFC 5737, and a name that is nobody's, RFC 6761
    assert not is_here("192.0.2.1") and not is_here("name.invalid")


SLEEPS = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); print('up', flush=True)"


def test_processes_are_asked_killed_and_do_not_outlive_their_supervisor():
    children = Children([sys.executable, "-c", f"{SLEEPS}; time.sleep(60)"], [])
    assert children.code() == 0
    children.start([["a"], ["b"]])
    assert children.code() is None
    children.kill()
    assert children.code() == 0

    held = (
        "import sys, time; from jaxtron.launch.children import Children; "
        f"children = Children([sys.executable, '-c', {SLEEPS + '; time.sleep(60)'!r}], []); "
        "children.start([['a']]); print(children._running[0].pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        pid, up = int(supervisor.stdout.readline()), supervisor.stdout.readline()
        assert up == "up\n" and os.path.exists(f"/proc/{pid}")
        supervisor.kill()
    deadline = time.monotonic() + 10
    while _state(pid) not in ("", "Z"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return list(map(int, file.read().split()))


def _line(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()


def _state(pid: int) -> str:
    """The letter of a process's state; empty where there is none any more."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""
