"""The rendezvous as a supervisor sees it: keys and values, or the news that it is lost."""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from jaxtron.config import UserError
from jaxtron.launch.children import alone

MODULE = "jaxtron.launch.coordination"
# of one answer, and of a process that imports JAX and joins, on a machine that is busy
ANSWER_SECONDS, BEGIN_SECONDS = 10.0, 60.0


class RendezvousLost(Exception):
    """The service gives no answer."""


class Rendezvous:
    """Keys and values at an address; made where it can be joined, else `RendezvousLost`."""

    def __init__(self, address: str) -> None:
        self._process = _start("join", address)
        self._rest = b""
        self._await("joined", BEGIN_SECONDS)

    def exchange(self, values: Mapping[str, str], prefixes: Sequence[str]) -> dict[str, dict[str, str]]:
        """Writes values by key, and reads all below each prefix, by key."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"set": dict(values), "list": list(prefixes)}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise RendezvousLost from None
        return json.loads(self._line(ANSWER_SECONDS))

    def close(self) -> None:
        """Ends the process that asks."""
        _end(self._process)

    def _await(self, word: str, seconds: float) -> None:
        try:
            if self._line(seconds).strip() != word:
                raise RendezvousLost
        except RendezvousLost:
            self.close()
            raise

    def _line(self, seconds: float) -> str:
        assert self._process.stdout is not None
        number, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._rest:
            ready, _, _ = select.select([number], [], [], max(0.0, deadline - time.monotonic()))
            more = os.read(number, 2**16) if ready else b""
            if not more:
                raise RendezvousLost
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()


@contextlib.contextmanager
def serving(host: str, port: int, *, is_alone: bool) -> Iterator[bool]:
    """Serves the rendezvous in the block, if its host is this one and no other supervisor here does: whether so.

    Where the run is alone nobody else reaches it. A `UserError` where another program has the port.
    """
    with contextlib.ExitStack() as stack:
        if not is_here(host) or not (claim := _claim(port)):
            yield False
            return
        stack.callback(claim.close)
        _check_free(port)
        process = _start("serve", str(port), *(["127.0.0.1"] if is_alone else []))
        stack.callback(_end, process)
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], BEGIN_SECONDS)
        if not ready or not process.stdout.readline():
            raise UserError(f"JAX's coordination service does not start on port {port}: choose another --rendezvous")
        yield True


def is_here(host: str) -> bool:
    """Whether a host's name or address is one of this machine's."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
    return False


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("", 0)) as probe:
        return probe.getsockname()[1]


def _claim(port: int) -> socket.socket | None:
    """Held by the one supervisor of this machine that serves a port: two of JAX's services would share it silently."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # of Linux's names that no file has, and that go with their process
        claim.bind(f"\0jaxtron-launch-{port}")
    except OSError:
        claim.close()
        return None
    return claim


def _check_free(port: int) -> None:
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(
            f"--rendezvous: this host cannot listen on port {port} ({error.strerror}): choose another"
        ) from None


def _start(*words: str) -> subprocess.Popen[bytes]:
    # what JAX's C++ says of a lost service is no news
    return subprocess.Popen(
        alone([sys.executable, "-m", MODULE, *words]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
