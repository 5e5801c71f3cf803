"""How tasks are run: one after another here, in processes of this machine, or by a cluster's engine.

A task is a function of one small argument that leaves its result in files all tasks can read, so an engine has
nothing to move, and a task that is run twice does no harm.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, runtime_checkable

from jaxtron import interrupts
from jaxtron.config import UserError


@runtime_checkable
class Engine(Protocol):
    """Runs tasks."""

    def run(self, task: Callable[[Any], None], items: Sequence[Any]) -> Iterator[None]:
        """Runs the task for every item, in any order, yielding once for each that is done; raises what a task does."""
        ...

    def close(self) -> None:
        """Ends what was started."""
        ...


class LocalEngine:
    """Tasks in this process, or in several new ones."""

    def __init__(self, workers: int):
        self._pool = None
        if workers > 1:
            # spawned: a fork would take JAX's threads' locks along
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)

    def run(self, task: Callable[[Any], None], items: Sequence[Any]) -> Iterator[None]:
        if self._pool is None:
            for item in items:
                yield task(item)
            return
        with interrupts.spared():
            futures = [self._pool.submit(task, item) for item in items]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker was killed, perhaps for want of memory; start the same command again to go on, "
                "with fewer --workers"
            ) from error
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
