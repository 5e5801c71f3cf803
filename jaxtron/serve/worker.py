"""The thread that owns the engine, and how others hand it work: what comes between two steps joins the next."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from jaxtron.generate.batch import Batch, GrowingSequence
from jaxtron.generate.protocol import TokenEngine
from jaxtron.serve.errors import ApiError

logger = logging.getLogger(__name__)

Scores = Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]
# how long an idle worker sleeps before it looks at the clock
IDLE_SECONDS = 0.5


@dataclass(eq=False)
class RequestedWork:
    """What one request wants: scores of its prompts perhaps, then sequences that grow.

    `fail` is called once if it cannot be done; all calls are from the engine's thread.
    """

    sequences: list[GrowingSequence]
    fail: Callable[[ApiError], None]
    deadline: float
    """By `time.monotonic`."""
    prompts: list[np.ndarray] = field(default_factory=list)
    top: int = 1
    scored: Callable[[Scores], None] | None = None


class Worker:
    """Runs an engine in the thread that calls `run`, until it is told to drain and all is done."""

    def __init__(self, engine: TokenEngine, *, most_waiting: int):
        self._batch = Batch(engine)
        self._most_waiting = most_waiting
        self._inbox: SimpleQueue[tuple[str, RequestedWork] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._works: list[RequestedWork] = []
        self._num_open = 0
        self._is_draining = False

    @property
    def is_draining(self) -> bool:
        """Whether nothing new is taken any more."""
        return self._is_draining

    def submit(self, work: RequestedWork) -> None:
        """Takes work from any thread; an `ApiError` where there is too much of it, or no more is taken."""
        with self._lock:
            if self._is_draining:
                raise ApiError(503, "the server is stopping: ask another", code="stopping")
            if self._num_open and self._num_open + len(work.sequences) > self._most_waiting + self._batch.engine.rows:
                raise ApiError(429, "too many requests wait already: ask again later", code="busy")
            self._num_open += len(work.sequences)
        self._inbox.put(("add", work))

    def cancel(self, work: RequestedWork) -> None:
        """Forgets work from any thread; of what is done it makes nothing."""
        self._inbox.put(("drop", work))

    def drain(self) -> None:
        """Takes no more, from any thread; `run` returns once all is done."""
        self._is_draining = True
        self._inbox.put(None)

    def run(self) -> None:
        """Steps while there is work, waits while there is none."""
        while True:
            self._read_inbox()
            with self._lock:
                if self._is_draining and not self._works and self._inbox.empty():
                    return
            self._check_time()
            if self._batch.is_busy:
                self._guarded(self._batch.step, self._works)
            self._retire()

    def _read_inbox(self) -> None:
        is_idle = not self._batch.is_busy
        while True:
            try:
                found = self._inbox.get(timeout=IDLE_SECONDS) if is_idle else self._inbox.get_nowait()
            except Empty:
                return
            is_idle = False
            if found is None:
                continue
            kind, work = found
            if kind == "drop":
                self._close(work)
            else:
                self._add(work)

    def _add(self, work: RequestedWork) -> None:
        self._works.append(work)
        if work.scored is not None:
            scored = work.scored
            self._guarded(lambda: scored(self._batch.engine.score(work.prompts, work.top)), [work])
        if work in self._works:
            for sequence in work.sequences:
                self._batch.add(sequence)

    def _guarded(self, run: Callable[[], Any], works: list[RequestedWork]) -> None:
        """Runs what may fail; those whose work it was are told, and the others live on."""
        try:
            run()
        except FloatingPointError as error:
            self._fail(works, ApiError(500, f"the model has diverged: {error}", code="not_finite"))
        except Exception as error:
            logger.warning("a step failed: %r", error)
            self._fail(works, ApiError(500, "the engine failed at this request", code="engine"))

    def _fail(self, works: list[RequestedWork], error: ApiError) -> None:
        for work in list(works):
            work.fail(error)
            self._close(work)

    def _check_time(self) -> None:
        now = time.monotonic()
        late = [work for work in self._works if work.deadline < now]
        self._fail(late, ApiError(504, "the request took longer than the server allows", code="timeout"))

    def _retire(self) -> None:
        """RequestedWork whose sequences are all done."""
        for work in list(self._works):
            if all(sequence.stream.finish_reason is not None for sequence in work.sequences):
                self._close(work)

    def _close(self, work: RequestedWork) -> None:
        if work not in self._works:
            return
        self._works.remove(work)
        for sequence in work.sequences:
            self._batch.drop(sequence)
        with self._lock:
            self._num_open -= len(work.sequences)
