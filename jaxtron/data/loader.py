"""The rows of each global batch that this process needs, read ahead of the step.

The global order of samples depends on the source, the seed and nothing else, and a position in it is one number: how
many samples all processes together have consumed. So a run resumes exactly, on any number of hosts.
"""

import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import Float32, Int32, Integer

from jaxtron.data.source import Source

LocalRows = Callable[[int], Integer[np.ndarray, "R"]]
"""From a global batch size B to the sorted row numbers (0..B-1) that this process needs."""


@dataclass(frozen=True)
class LocalBatch:
    """This process's rows of the global batch whose samples are number `start` to `start + size - 1`."""

    start: int
    size: int
    rows: Integer[np.ndarray, "R"]
    tokens: Int32[np.ndarray, "R S"]
    targets: Int32[np.ndarray, "R S"]
    weights: Float32[np.ndarray, "R S"]
    positions: Int32[np.ndarray, "R S"] | None = None
    segments: Int32[np.ndarray, "R S"] | None = None


class Loader:
    """Endless batches in an order shuffled anew each epoch; a context manager, or `close()` it.

    `batch_size` maps the number of samples consumed to the size of the next global batch; it must be a pure function.
    `position` is that number: give back the one of a saved loader to resume exactly.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        batch_size: Callable[[int], int],
        local_rows: LocalRows,
        position: int = 0,
        workers: int = 1,
        prefetch: int = 4,
    ):
        self.position = position
        self._source = source
        self._batch_size = batch_size
        self._local_rows = local_rows
        self._order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
        # start of every batch so far; grain's threads ask for batches roughly in order, so only the end ever grows
        self._starts = array("q", [position])
        self._starts_lock = threading.Lock()
        batches = grain.MapDataset.range(sys.maxsize).map(self._read)
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=prefetch)
        self._batches = iter(batches.to_iter_dataset(options))
        self._batches.start_prefetch()

    def __iter__(self) -> Iterator[LocalBatch]:
        return self

    def __next__(self) -> LocalBatch:
        batch = next(self._batches)
        self.position = batch.start + batch.size
        return batch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead; `next` is an error afterwards."""
        self._batches.close()

    def _read(self, step: int) -> LocalBatch:
        with self._starts_lock:
            while len(self._starts) <= step + 1:
                self._starts.append(self._starts[-1] + self._batch_size(self._starts[-1]))
            start, end = self._starts[step], self._starts[step + 1]
        rows = self._local_rows(end - start)
        samples = [int(self._order[start + row]) for row in rows.tolist()]
        return _read_batch(self._source, samples, start=start, size=end - start, rows=rows)


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
        yield _read_batch(source, samples, start=start, size=batch_size, rows=rows)


def _read_batch(
    source: Source, samples: Sequence[int | None], *, start: int, size: int, rows: Integer[np.ndarray, "R"]
) -> LocalBatch:
    """The numbered samples as rows; None is a row of padding, a sample's copy that weighs nothing."""
    found = [source[0 if index is None else index] for index in samples]
    is_sample = np.array([index is not None for index in samples], np.float32)
    return LocalBatch(
        start=start,
        size=size,
        rows=rows,
        tokens=np.stack([sample.tokens for sample in found]),
        targets=np.stack([sample.targets for sample in found]),
        weights=np.stack([sample.weights for sample in found]) * is_sample[:, None],
        positions=_stack_given([sample.positions for sample in found]),
        segments=_stack_given([sample.segments for sample in found]),
    )


def _stack_given(arrays: Sequence[Int32[np.ndarray, "S"] | None]) -> Int32[np.ndarray, "R S"] | None:
    given = [array for array in arrays if array is not None]
    assert len(given) in (0, len(arrays)), "a source gives this of all its samples or of none"
    return np.stack(given) if given else None
