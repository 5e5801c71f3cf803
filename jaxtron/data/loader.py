"""The rows of each global batch that this process needs, read ahead of the step.

The global order of samples depends on the source, the seed and nothing else, and a position in it is one number: that
of the first sample which no process has consumed. So a run resumes exactly, on any number of hosts.
"""

import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Integer

from jaxtron import interrupts
from jaxtron.data.batch import BatchField, map_batch, stack_samples
from jaxtron.data.source import Source

BatchSize = Callable[[int], int]
"""From the number of the sample that begins a global batch to the size of that batch; a pure function."""

LocalRows = Callable[[int], Integer[np.ndarray, "R"]]
"""From a global batch size B to the sorted row numbers (0..B-1) that this process needs."""


@dataclass(frozen=True)
class LocalBatch:
    """This process's rows of the global batch of `size` samples from number `start` on, to before `end`.

    `arrays` is of the class that the source's samples are.
    """

    start: int
    end: int
    size: int
    rows: Integer[np.ndarray, "R"]
    arrays: Any


class Loader:
    """Endless batches in an order shuffled anew each epoch; a context manager, or `close()` it.

    `seed` None takes the samples in their own order instead. `position` is the number in the order of the next sample:
    give back the one of a saved loader to resume exactly. Numbers in `skip`, ranges from the first of a pair to before
    the second, are passed over. `processes` read instead of `workers` threads of this process; what reads must then
    pickle.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int | None,
        batch_size: BatchSize,
        local_rows: LocalRows,
        position: int = 0,
        skip: Sequence[tuple[int, int]] = (),
        workers: int = 1,
        processes: int = 0,
        prefetch: int = 4,
    ):
        self.position = position
        reader = _Reader(source, seed, batch_size, local_rows, position, tuple(skip))
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=prefetch)
        batches = grain.MapDataset.range(sys.maxsize).map(reader).to_iter_dataset(options)
        if processes:
            if not flags.FLAGS.is_parsed():
                # Grain asks for flags of its own, which no command line of ours has
                flags.FLAGS.mark_as_parsed()
            shared = grain.MultiprocessingOptions(num_workers=processes, per_worker_buffer_size=prefetch)
            batches = batches.mp_prefetch(shared)
        self._batches = iter(batches)
        with interrupts.spared():
            self._batches.start_prefetch()

    def __iter__(self) -> Iterator[LocalBatch]:
        return self

    def __next__(self) -> LocalBatch:
        batch = next(self._batches)
        self.position = batch.end
        return batch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead; `next` is an error afterwards."""
        self._batches.close()


class _Reader:
    """Batch number `step` from a position on, read by any thread, or any process that it was pickled to."""

    def __init__(
        self,
        source: Source,
        seed: int | None,
        batch_size: BatchSize,
        local_rows: LocalRows,
        position: int,
        skip: tuple[tuple[int, int], ...],
    ):
        self._settings = (source, seed, batch_size, local_rows, position, skip)
        self._source = source
        self._batch_size = batch_size
        self._local_rows = local_rows
        self._skip = skip
        order: Any = grain.MapDataset.range(len(source))
        self._order = (order if seed is None else order.seed(seed).shuffle()).repeat()
        # start of every batch so far; batches are asked for roughly in order, so only the end ever grows
        self._starts = array("q", [position])
        self._starts_lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return type(self), self._settings

    def __call__(self, step: int) -> LocalBatch:
        with self._starts_lock:
            while len(self._starts) <= step + 1:
                start = self._starts[-1]
                self._starts.append(self._after(start, self._batch_size(start)))
            start, end = self._starts[step], self._starts[step + 1]
        size = self._batch_size(start)
        rows = self._local_rows(size)
        samples = [int(self._order[self._after(start, row + 1) - 1]) for row in rows.tolist()]
        return _read_batch(self._source, samples, start=start, end=end, size=size, rows=rows)

    def _after(self, start: int, count: int) -> int:
        """The number that follows `count` samples from `start` on."""
        end = start + count
        for first, stop in self._skip:
            if stop > start and first < end:
                end += stop - max(first, start)
        return end


def validation_batches(
    source: Source, *, batch_size: int, local_rows: LocalRows, max_batches: int | None = None
) -> Iterator[LocalBatch]:
    """The same batches on every call: all samples once in order, or `max_batches` of samples spread evenly over them.

    Rows beyond the last sample have weight 0 throughout.
    """
    total = len(source)
    count = total if max_batches is None else min(total, max_batches * batch_size)
    rows = local_rows(batch_size)
    for start in range(0, count, batch_size):
        # spread in integers, so that every process picks the same samples
        samples = [i * total // count if i < count else None for i in (start + rows).tolist()]
        yield _read_batch(source, samples, start=start, end=start + batch_size, size=batch_size, rows=rows)


def _read_batch(
    source: Source, samples: Sequence[int | None], *, start: int, end: int, size: int, rows: Integer[np.ndarray, "R"]
) -> LocalBatch:
    """The numbered samples as rows; None is a row of padding, a sample's copy that weighs nothing."""
    found = stack_samples([source[0 if index is None else index] for index in samples])
    is_sample = np.array([index is not None for index in samples], np.float32)

    def weigh(field: BatchField, array: np.ndarray) -> np.ndarray:
        return array if field.normalizer is None else array * is_sample.reshape(-1, *(1,) * (array.ndim - 1))

    return LocalBatch(start=start, end=end, size=size, rows=rows, arrays=map_batch(weigh, found))
