"""Several machines asked together: who comes, how far and how fast they are, whose clock, versions and settings differ.

Process 0 listens on the coordinator's port, where a run's process 0 would; the others come, say what they are and
answer its questions one after the other. All lines are JSON.
"""

import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from typing import Any

from jaxtron.doctor.finding import Finding, doubt, exit_code, fault, good
from jaxtron.doctor.surroundings import Surroundings
from jaxtron.words import plural, readable_bytes, readable_seconds

# of any one answer
PATIENCE = 10.0
PINGS = 16
BLOCK = b"\0" * 2**20
# measured for so long with each, and with all together
SENT_SECONDS, ALL_SECONDS = 0.3, 20.0
FAR_SECONDS, SLOW_RATE, WRONG_SECONDS = 5e-3, 100e6, 2.0
LONGEST_LINE = 2**22
RETRY_SECONDS = 0.2
# what may differ without harm
MILD = ("Python",)
NAMED = 4


@dataclass(frozen=True)
class Coordinates:
    """Where process 0 is, how many there are and which this is; how long they wait for each other, in seconds."""

    address: str
    num_processes: int
    process: int
    wait: float

    @property
    def place(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)


class _Line:
    """A connection of JSON lines, none of which is waited for longer than `PATIENCE`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self._file = connection.makefile("rb")

    def close(self) -> None:
        self._file.close()
        self.connection.close()

    def say(self, **what: Any) -> None:
        self.connection.sendall(json.dumps(what).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        line = self._file.readline(LONGEST_LINE)
        if not line:
            raise ConnectionError("closed")
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found

    def skip(self, count: int) -> None:
        while count:
            read = len(self._file.read(min(count, len(BLOCK))))
            if not read:
                raise ConnectionError("closed")
            count -= read


def check_together(
    at: Coordinates, around: Surroundings, facts: Mapping[str, str], own: Sequence[Finding]
) -> tuple[list[Finding], int]:
    """What this process has to say, and the exit code that all end with; `facts` have to be equal on all machines."""
    if at.process:
        return _visit(at, around, facts, own)
    return _receive(at, around, facts, own)


def _visit(
    at: Coordinates, around: Surroundings, facts: Mapping[str, str], own: Sequence[Finding]
) -> tuple[list[Finding], int]:
    deadline = time.monotonic() + at.wait
    why: OSError | None = None
    while True:
        try:
            line = _Line(socket.create_connection(at.place, timeout=min(PATIENCE, at.wait)))
            break
        except OSError as error:
            why = error
            if time.monotonic() > deadline:
                return [*own, _unreachable(at, why)], 1
            time.sleep(RETRY_SECONDS)
    # the measurements of all others may come first, and process 0 waits for those that do not come
    line.connection.settimeout(at.wait + ALL_SECONDS + PATIENCE)
    try:
        with closing(line):
            line.say(process=at.process, host=around.host, facts=dict(facts), own=[asdict(one) for one in own])
            while True:
                asked = line.hear()
                if "code" in asked:
                    return [], int(asked["code"])
                if "bytes" in asked:
                    line.skip(int(asked["bytes"]))
                line.say(time=time.time())
    except (OSError, ValueError) as error:
        lost = fault("hosts", f"process 0 at {at.address} went away: {_reason(error)}", "see what it printed")
        return [*own, lost], 1


def _unreachable(at: Coordinates, error: OSError) -> Finding:
    if isinstance(error, socket.gaierror):
        text, mend = f"the name {at.place[0]} means nothing here", "name it in DNS or /etc/hosts, or give an address"
    elif isinstance(error, ConnectionRefusedError):
        text, mend = "nobody listens there", "start process 0 on that host, with the same port"
    else:
        text, mend = _reason(error), "open that port between the hosts (firewall, security group)"
    return fault("hosts", f"no way to process 0 at {at.address} within {at.wait:g} s: {text}", mend)


def _receive(
    at: Coordinates, around: Surroundings, facts: Mapping[str, str], own: Sequence[Finding]
) -> tuple[list[Finding], int]:
    found = [*own, *_check_name(at, around)]
    everybody = {around.host: dict(facts)}
    lines: dict[int, _Line] = {}
    hosts = {0: around.host}
    try:
        listener = socket.create_server(("", at.place[1]), backlog=1024)
    except OSError as error:
        taken = fault(
            "hosts",
            f"process 0 cannot listen on port {at.place[1]}: {_reason(error)}",
            "end what has it, or choose another",
        )
        return [*found, taken], 1
    with closing(listener):
        deadline = time.monotonic() + at.wait
        while len(lines) < at.num_processes - 1 and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                connection, (address, *_) = listener.accept()
            except TimeoutError:
                break
            line = _Line(connection)
            try:
                said = line.hear()
                process, host = int(said["process"]), str(said["host"])
                others = [Finding(**{**one, "host": host}) for one in said["own"]]
                told = {str(name): str(value) for name, value in said["facts"].items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                found.append(doubt("hosts", f"{address} came and is no doctor", "keep others from this port"))
                line.close()
                continue
            if process in lines or not 0 < process < at.num_processes:
                text = f"{host} says that it is process {process}, of {at.num_processes}"
                found.append(fault("hosts", text, "give each process its own runtime.process_id"))
                with suppress(OSError), closing(line):
                    line.say(code=1)
                continue
            lines[process], hosts[process] = line, host
            found += [one for one in others if one.level != "good"]
            everybody[host if host not in everybody else f"{host} (process {process})"] = told
    found += _missing(at, lines)
    found += _measure(lines, hosts)
    found += compare(everybody)
    code = exit_code(found)
    for line in lines.values():
        with suppress(OSError), closing(line):
            line.say(code=code)
    return found, code


def _check_name(at: Coordinates, around: Surroundings) -> Iterator[Finding]:
    host = at.place[0]
    if at.num_processes == 1:
        return
    try:
        address = around.resolve(host)
    except OSError:
        yield fault("hosts", f"the name {host} means nothing on {around.host}", "name it in DNS or /etc/hosts")
        return
    if address.startswith("127.") and not host.startswith("127.") and host != "localhost":
        yield doubt(
            "hosts",
            f"{host} is {address} on itself: others that read the same file would look for it on themselves",
            "give it its network address in /etc/hosts",
        )


def _missing(at: Coordinates, lines: Mapping[int, _Line]) -> Iterator[Finding]:
    missing = [number for number in range(1, at.num_processes) if number not in lines]
    if missing:
        names = ", ".join(map(str, missing[:NAMED])) + (" ..." if len(missing) > NAMED else "")
        yield fault(
            "hosts",
            f"{len(missing)} of {at.num_processes} did not come within {at.wait:g} s: {names}",
            "see what they printed; start every one, and open the port",
        )
    elif at.num_processes > 1:
        yield good("hosts", f"all {at.num_processes} came to {at.address}")


def _measure(lines: Mapping[int, _Line], hosts: Mapping[int, str]) -> Iterator[Finding]:
    """Latency, bandwidth and clock of each, by process 0."""
    end = time.monotonic() + ALL_SECONDS
    seconds: list[float] = []
    rates: list[float] = []
    for process, line in sorted(lines.items()):
        host = hosts[process]
        try:
            trips = [_ping(line) for _ in range(PINGS)]
            latency, offset = min(trips)
            seconds.append(latency)
            if latency > FAR_SECONDS:
                yield doubt(
                    "network",
                    f"{host} answers after {readable_seconds(latency)}",
                    "take machines that are near each other, on a network of their own",
                )
            if abs(offset) - latency > WRONG_SECONDS:
                yield fault(
                    "clock",
                    f"that of {host} is {readable_seconds(abs(offset))} {'ahead' if offset > 0 else 'behind'}",
                    "start its time service (chronyd, systemd-timesyncd)",
                )
            if time.monotonic() < end:
                rates.append(_send(line))
                if rates[-1] < SLOW_RATE:
                    yield doubt(
                        "network",
                        f"{host} takes {readable_bytes(rates[-1])}/s over TCP",
                        "name the fast interface: NCCL_SOCKET_IFNAME, and the coordinator's address on it",
                    )
        except (OSError, ValueError, KeyError) as error:
            yield fault("network", f"{host} stopped answering: {_reason(error)}", "see what it printed")
    if seconds and rates:
        text = (
            f"at most {readable_seconds(max(seconds))} there and back, at least {readable_bytes(min(rates))}/s over TCP"
        )
        short = f" (of {plural(len(rates), 'host')} in {ALL_SECONDS:g} s)" if len(rates) < len(seconds) else ""
        yield good("network", text + short)


def _ping(line: _Line) -> tuple[float, float]:
    """Seconds there and back, and how far the other clock is ahead."""
    start, clock = time.monotonic(), time.time()
    line.say(ping=True)
    there = float(line.hear()["time"])
    taken = time.monotonic() - start
    return taken, there - (clock + taken / 2)


def _send(line: _Line) -> float:
    """Bytes a second to the other side."""
    start, sent, blocks = time.monotonic(), 0, 1
    while (taken := time.monotonic() - start) < SENT_SECONDS:
        line.say(bytes=blocks * len(BLOCK))
        for _ in range(blocks):
            line.connection.sendall(BLOCK)
        line.hear()
        sent += blocks * len(BLOCK)
        blocks = min(2 * blocks, 64)
    return sent / taken


def compare(everybody: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """A finding for each fact in which machines differ; `everybody` are the facts by host."""
    names = list(dict.fromkeys(name for facts in everybody.values() for name in facts))
    differ = False
    for name in names:
        by_value: dict[str, list[str]] = {}
        for host, facts in everybody.items():
            by_value.setdefault(facts.get(name, "none"), []).append(host)
        if len(by_value) == 1:
            continue
        differ = True
        # the most common last: the odd ones are those to look at
        groups = sorted(by_value.items(), key=lambda item: len(item[1]))
        text = ", ".join(f"{value} on {_names(hosts)}" for value, hosts in groups)
        mend = "make it the same on all"
        yield (doubt if name in MILD else fault)("equal", f"{name} differs: {text}", mend)
    if not differ and len(everybody) > 1:
        yield good("equal", f"{', '.join(names)}: the same on {plural(len(everybody), 'host')}")


def _names(hosts: Sequence[str]) -> str:
    more = f" and {len(hosts) - NAMED} more" if len(hosts) > NAMED else ""
    return ", ".join(hosts[:NAMED]) + more


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
