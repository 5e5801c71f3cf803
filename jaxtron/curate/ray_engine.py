"""Tasks on a Ray cluster whose machines see the same files."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxtron.config import UserError

try:
    import ray
    from ray import exceptions
except ImportError:
    ray = exceptions = None


class RayEngine:
    """Tasks of Ray, one CPU each, `workers` of them at a time; a task whose machine is lost is run elsewhere."""

    def __init__(self, workers: int, address: str | None):
        if ray is None:
            raise UserError('--engine ray needs Ray; pip install "jaxtron[ray]"')
        self._workers = workers
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"no Ray cluster at --ray_address {address or 'auto'}: {reason}") from error

    def run(self, task: Callable[[Any], None], items: Sequence[Any]) -> Iterator[None]:
        assert ray is not None and exceptions is not None
        remote = ray.remote(task_of(task)).options(num_cpus=1)
        waiting, running = list(reversed(items)), []
        while waiting or running:
            while waiting and len(running) < self._workers:
                running.append(remote.remote(waiting.pop()))
            done, running = ray.wait(running)
            try:
                yield from ray.get(done)
            except exceptions.RayTaskError as error:
                # Ray's own error holds the whole traceback; the line for the user is its cause
                raise (error.cause if isinstance(error.cause, UserError) else error) from None

    def close(self) -> None:
        if self._started and ray is not None:
            ray.shutdown()


def task_of(task: Callable[[Any], None]) -> Callable[[Any], None]:
    """The task as a plain function: Ray takes no `partial`."""

    def run(item: Any) -> None:
        task(item)

    return run
