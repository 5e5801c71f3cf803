"""Processes of one run that notice when one of them is gone, and then end with a line that names it.

By itself JAX ends the others with a C++ stack trace: at once where process 0 is gone, whose service they use, and after
its own heartbeats otherwise. So they reach that service by a relay in their own process, which keeps JAX waiting when
process 0 is gone, and send each other heartbeats beside it, all over the coordinator's one port. Everybody beats to
process 0; what it finds, or is told, it tells all.
"""

import asyncio
import atexit
import socket
import sys
import threading
import time
import traceback
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import jax

from jaxtron import interrupts
from jaxtron.config import UserError
from jaxtron.runtime.common_stop import CommonStop

GREETING = b"jaxtron "
BEAT, LEFT, GONE, NOTE = b"beat\n", b"left\n", b"gone ", b"note "
FAILED = "ended with an error"
# parts of `heartbeat_seconds`: between two beats, and without one until a process counts as gone
BEAT_PART, SILENCE_PART = 0.1, 0.8
# how long an error waits for the loss of another process that may have caused it, and a word to be on its way
CAUSE_SECONDS, SEND_SECONDS = 1.0, 0.3
RETRY_SECONDS = 0.05
ADVICE = "see its own output; the same command continues from the last checkpoint"


class Together:
    """This process among the others; `address` is where JAX's client finds the service, `stop` where they agree to end.

    Process 0 listens on the coordinator's port, for its service on the machine's inside, `service`; the others connect.
    """

    def __init__(
        self, coordinator: str, process: int, num_processes: int, *, heartbeat_seconds: float, connect_seconds: float
    ) -> None:
        host, _, port = coordinator.rpartition(":")
        self.process = process
        self.stop = CommonStop(process, num_processes, self._send)
        self.seconds = heartbeat_seconds
        self._patience = connect_seconds
        self._coordinator = host.strip("[]"), int(port)
        if not 0 < int(port) < 2**16:
            raise UserError(f"runtime.coordinator_address {coordinator}: ports go from 1 to 65535, and {port} is none")
        self._writers: dict[int, StreamWriter] = {}
        self._has_left: set[int] = set()
        self._tasks: set[asyncio.Task] = set()
        self._is_leaving = False
        self._is_told = threading.Lock()
        self._hearers: dict[str, Callable[[int, str], None]] = {}
        # sockets are made here, so that their errors are raised here
        if process == 0:
            self.service = self.address = f"127.0.0.1:{_free_port()}"
            listener = _listen(coordinator)
        else:
            listener = socket.create_server(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._spawn(self._serve(listener))
        if process:
            self._spawn(self._join())
        threading.Thread(target=self._loop.run_forever, name="heartbeats", daemon=True).start()

    def leave(self) -> None:
        """This process has done its part; from here on nobody misses it."""
        self._is_leaving = True
        self._send(LEFT)

    def note(self, topic: str, text: str) -> None:
        """A line of text on a topic to process 0, or from it to all others; from any thread, and without an answer."""
        self._send(NOTE + f"{topic} {' '.join(text.split())}\n".encode())

    def on_note(self, topic: str, hear: Callable[[int, str], None]) -> None:
        """Calls `hear` with the process and the text of each note on a topic, in a thread that must not wait."""
        self._hearers[topic] = hear

    def tell(self, what: str) -> None:
        """The others end, for this process does: `what` became of it. That they do is no news to it then."""
        self._is_told.acquire(blocking=False)
        self._send(GONE + f"process {self.process} {' '.join(what.split())}\n".encode())
        time.sleep(SEND_SECONDS)

    def fail(self, error: BaseException) -> None:
        """Ends the process by an error, and with it the others; unless the loss of one of them was its cause."""
        # the thread ends this process, if it hears of such a loss
        time.sleep(self.seconds if isinstance(error, jax.errors.JaxRuntimeError) else CAUSE_SECONDS)
        with self._is_told:
            if isinstance(error, UserError):
                print("error:", " ".join(str(error).split()), file=sys.stderr)
            else:
                traceback.print_exception(error)
            first = str(error).strip().splitlines()[:1]
            self.tell(f"{FAILED}: {first[0] if first else type(error).__name__}")
            sys.stderr.flush()
            interrupts.leave(2 if isinstance(error, UserError) else 1)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _send(self, line: bytes) -> None:
        def send() -> None:
            for writer in self._writers.values():
                writer.write(line)

        self._loop.call_soon_threadsafe(send)

    async def _serve(self, listener: socket.socket) -> None:
        server = await asyncio.start_server(self._relay if self.process else self._greet, sock=listener)
        await server.serve_forever()

    async def _greet(self, reader: StreamReader, writer: StreamWriter) -> None:
        """In process 0: a connection is another process, or its JAX."""
        first = await reader.readline()
        if first.startswith(GREETING):
            await self._listen_to(int(first.removeprefix(GREETING)), reader, writer)
            return
        found = await _connect(*self.service.rsplit(":", 1), patience=self._patience)
        if found is not None:
            found[1].write(first)
            await _pump_both((reader, writer), found)

    async def _relay(self, reader: StreamReader, writer: StreamWriter) -> None:
        """In the others: JAX's connection to process 0, kept open for a while when process 0 is gone."""
        found = await _connect(*self._coordinator, patience=0)
        if found is None:
            writer.close()
            return
        await _pump_both((reader, writer), found, keep=0 if self._is_leaving else self.seconds)

    async def _join(self) -> None:
        found = await _connect(*self._coordinator, patience=self._patience)
        if found is not None:
            found[1].write(GREETING + f"{self.process}\n".encode())
            await self._listen_to(0, *found)

    async def _listen_to(self, other: int, reader: StreamReader, writer: StreamWriter) -> None:
        self._writers[other] = writer
        beats = asyncio.create_task(self._beat(writer))
        why = "is gone: it was killed, or its machine failed"
        try:
            while line := await asyncio.wait_for(reader.readline(), SILENCE_PART * self.seconds):
                if line == LEFT:
                    self._has_left.add(other)
                elif self.stop.hear(other, line):
                    continue
                elif line.startswith(NOTE):
                    topic, _, text = line.removeprefix(NOTE).decode().strip().partition(" ")
                    if topic in self._hearers:
                        self._hearers[topic](other, text)
                elif line.startswith(GONE):
                    await self._end(line.removeprefix(GONE).decode().strip())
        except TimeoutError:
            why = f"gave no sign of life within runtime.heartbeat_seconds {self.seconds:g}"
        except OSError:
            pass
        finally:
            beats.cancel()
            del self._writers[other]
        if not (other in self._has_left or (self._is_leaving and other == 0)):
            await self._end(f"process {other} {why}")

    async def _beat(self, writer: StreamWriter) -> None:
        while True:
            writer.write(BEAT)
            await asyncio.sleep(BEAT_PART * self.seconds)

    async def _end(self, what: str) -> None:
        """Says what happened, tells the others where this is process 0, and ends this process."""
        for writer in self._writers.values() if self.process == 0 else ():
            writer.write(GONE + what.encode() + b"\n")
        await asyncio.sleep(SEND_SECONDS)
        if self._is_told.acquire(blocking=False):
            interrupts.say(f"error: {what}; {ADVICE}")
            # an error of another process would come again, a loss need not
            interrupts.leave(2 if FAILED in what else interrupts.TRY_AGAIN)


_together: list[Together] = []


def join(
    coordinator: str, process: int, num_processes: int, *, heartbeat_seconds: float, connect_seconds: float
) -> Together:
    """Begins to watch and be watched; a `UserError` where process 0 cannot have the port."""
    _together.append(
        Together(
            coordinator, process, num_processes, heartbeat_seconds=heartbeat_seconds, connect_seconds=connect_seconds
        )
    )
    # before JAX's own, which waits for the others
    atexit.register(_together[0].leave)
    return _together[0]


def common_stop() -> CommonStop | None:
    """Where the processes agree on the last step; None where this one is alone."""
    return _together[0].stop if _together else None


def channel() -> Together | None:
    """This process among the others; None where it is alone."""
    return _together[0] if _together else None


@contextmanager
def leaving_together() -> Iterator[None]:
    """An error or a signal in the block ends the other processes too."""
    with ExitStack() as stack:
        for together in _together:
            stack.enter_context(interrupts.at_the_end(lambda word, told=together: told.tell(f"was {word}")))
        try:
            yield
        except Exception as error:
            for together in _together:
                together.fail(error)
            raise


def _listen(address: str) -> socket.socket:
    port = int(address.rpartition(":")[2])
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=family is socket.AF_INET6, backlog=1024)
    except OSError as error:
        raise UserError(
            f"runtime.coordinator_address {address}: process 0 cannot listen on port {port} ({error.strerror}): choose "
            "another"
        ) from None


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


async def _connect(host: str, port: int | str, *, patience: float) -> tuple[StreamReader, StreamWriter] | None:
    """A connection, tried for as long as the patience lasts."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return await asyncio.open_connection(host, int(port))
        except OSError:
            if time.monotonic() >= deadline:
                return None
        await asyncio.sleep(RETRY_SECONDS)


Ends = tuple[StreamReader, StreamWriter]


async def _pump_both(near: Ends, far: Ends, *, keep: float = 0) -> None:
    """What comes from either end goes to the other; `keep` seconds after the far one ended, so does the near one."""

    async def pump(reader: StreamReader, writer: StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(2**18):
                writer.write(data)
                await writer.drain()

    out = asyncio.create_task(pump(near[0], far[1]))
    back = asyncio.create_task(pump(far[0], near[1]))
    await asyncio.wait((out, back), return_when=asyncio.FIRST_COMPLETED)
    if back.done() and not out.done():
        await asyncio.sleep(keep)
    for task in (out, back):
        task.cancel()
    for _, writer in (near, far):
        writer.close()
