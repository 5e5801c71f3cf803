"""Faults on purpose, one small tool each: of processes, disks, files, numbers, networks and clocks."""

import contextlib
import math
import os
import random
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxtron.run.step import Trainer
from jaxtron.typing import PyTree


def kill(process: int) -> None:
    """`kill -9`: the process has no last word."""
    os.kill(process, signal.SIGKILL)


@contextlib.contextmanager
def paused(process: int) -> Iterator[None]:
    """Stopped for the block, as a host that hangs: nothing is closed, and nothing answers."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)


@contextlib.contextmanager
def slowed(process: int, part: float, period: float = 0.05) -> Iterator[None]:
    """Stopped for this part of the time of the block, a bit of every period: a host that is slower than the others."""
    done = threading.Event()

    def alternate() -> None:
        with contextlib.suppress(ProcessLookupError):
            while not done.is_set():
                os.kill(process, signal.SIGSTOP)
                time.sleep(part * period)
                os.kill(process, signal.SIGCONT)
                done.wait((1 - part) * period)

    thread = threading.Thread(target=alternate)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)


@contextlib.contextmanager
def full_disk(most: int = 4096) -> Iterator[None]:
    """No file of this process, or of one that it starts, grows beyond so many bytes: a full disk, or a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # otherwise the signal ends the process
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def flip_in_file(path: Path, chance: random.Random, *, bits: int = 1) -> list[tuple[int, int]]:
    """Flips bits of a file where it lies; gives back the bytes and bits, and the same call with them mends it."""
    flipped = [(chance.randrange(path.stat().st_size), chance.randrange(8)) for _ in range(bits)]
    flip_back(path, flipped)
    return flipped


def flip_back(path: Path, flipped: Sequence[tuple[int, int]]) -> None:
    """Flips these bits of a file."""
    with path.open("r+b") as file:
        for place, bit in flipped:
            file.seek(place)
            (byte,) = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ 1 << bit]))


def flip_in_memory(tree: PyTree, chance: random.Random, *, bit: int | None = None) -> PyTree:
    """The same arrays with one bit of one float32 number of one of them flipped; `bit` 30 is of the exponent."""
    leaves, structure = jax.tree.flatten(tree)
    floats = [number for number, leaf in enumerate(leaves) if leaf.dtype == jnp.float32 and leaf.size]
    number = chance.choice(floats)
    place = chance.randrange(leaves[number].size)
    leaves[number] = _flipped(leaves[number], place, chance.randrange(32) if bit is None else bit)
    return jax.tree.unflatten(structure, leaves)


def _flipped(array: Any, place: int, bit: int, is_wanted: Any = True) -> Any:
    """An array of float32 with a bit of one number flipped, if it is wanted; the same shape and sharding."""
    words = jax.lax.bitcast_convert_type(array, jnp.uint32)
    # of a mask and no index: an array that is split stays where it is
    strides = [math.prod(array.shape[dim + 1 :]) for dim in range(array.ndim)]
    flat = sum(
        (jax.lax.broadcasted_iota(jnp.uint32, array.shape, dim) * stride for dim, stride in enumerate(strides)),
        jnp.zeros(array.shape, jnp.uint32),
    )
    mask = jnp.where((flat == place) & is_wanted, jnp.uint32(1) << bit, jnp.uint32(0))
    return jax.lax.bitcast_convert_type(words ^ mask, jnp.float32)


@contextlib.contextmanager
def planted_in_gradients(steps: Sequence[int], change: Callable[[Any, Any], Any], *, leaf: int = -1) -> Iterator[None]:
    """Steps compiled in the block change one leaf of their gradients at these steps (the first is 0): `change(gradient,
    is_wanted)`, where `is_wanted` is traced. `flip`, `not_a_number` and `spike` are some."""
    inner = Trainer.loss_and_gradients

    def loss_and_gradients(self: Trainer, params: PyTree, batch: PyTree, step: Any, scale: Any, *more: Any) -> Any:
        reported, gradients = inner(self, params, batch, step, scale, *more)
        leaves, structure = jax.tree.flatten(gradients)
        is_wanted = jnp.isin(step, jnp.array(steps))
        leaves[leaf] = change(leaves[leaf], is_wanted)
        return reported, jax.tree.unflatten(structure, leaves)

    Trainer.loss_and_gradients = loss_and_gradients
    try:
        yield
    finally:
        Trainer.loss_and_gradients = inner


def flip(bit: int, place: int = 0) -> Callable[[Any, Any], Any]:
    """Flips a bit of one number."""
    return lambda gradient, is_wanted: _flipped(gradient, place, bit, is_wanted)


def not_a_number(gradient: Any, is_wanted: Any) -> Any:
    """Makes all numbers NaN."""
    return jnp.where(is_wanted, jnp.nan, gradient)


def spike(factor: float) -> Callable[[Any, Any], Any]:
    """Multiplies all numbers."""
    return lambda gradient, is_wanted: jnp.where(is_wanted, factor, 1.0) * gradient


class Wire:
    """A port of this machine whose connections are passed on to another: cut, held or slowed while both ends live.

    A context manager; `port` is the one to connect to.
    """

    def __init__(self, to: int) -> None:
        self._to = to
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._is_held, self._is_closed = False, False
        self.delay = 0.0
        """Seconds that each piece waits."""
        self._thread = threading.Thread(target=self._pass_on, daemon=True)

    def __enter__(self) -> "Wire":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed = True
        self._thread.join()
        self.cut()
        self._listener.close()

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._pairs)

    def hold(self) -> None:
        """Nothing passes any more, and nobody is told: a network that drops what it is given."""
        self._is_held = True

    def release(self) -> None:
        """What was held passes."""
        self._is_held = False

    def cut(self) -> None:
        """Every connection ends at once, as when a machine is reset."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                # no farewell: what was under way is lost
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                end.close()

    def _pass_on(self) -> None:
        while not self._is_closed:
            ends = {} if self._is_held else {one: other for pair in self._pairs for one, other in (pair, pair[::-1])}
            try:
                ready, _, _ = select.select([self._listener, *ends], [], [], 0.05)
            except (OSError, ValueError):
                # cut meanwhile
                continue
            for end in ready:
                if end is self._listener:
                    self._accept()
                elif not self._is_held:
                    self._copy(end, ends[end])

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            self._pairs.append((near, socket.create_connection(("127.0.0.1", self._to))))
        except OSError:
            near.close()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        try:
            data = source.recv(1 << 16)
            if data:
                time.sleep(self.delay)
                target.sendall(data)
                return
        except OSError:
            pass
        for pair in [pair for pair in self._pairs if source in pair]:
            self._pairs.remove(pair)
            for end in pair:
                end.close()


@contextlib.contextmanager
def wrong_clock(seconds: float) -> Iterator[None]:
    """The time of day is off by so much in this process; clocks that only measure go on as they are."""
    now, nanoseconds = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: nanoseconds() + round(seconds * 1e9)
    try:
        yield
    finally:
        time.time, time.time_ns = now, nanoseconds
