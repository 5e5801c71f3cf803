"""The loader: one global order, whatever the hosts, the batch sizes and the interruptions."""

import itertools
import threading

import numpy as np
import pytest

from jaxtron.data.batch import TokenBatch
from jaxtron.data.loader import Loader, validation_batches

SAMPLES = 23


class NumberedSource:
    """Sample i is the token i over and over."""

    sequence_length = 3

    def __init__(self, length=SAMPLES):
        self._length = length

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        assert 0 <= index < self._length
        tokens = np.full(self.sequence_length, index, np.int32)
        return TokenBatch(tokens=tokens, targets=tokens + 1, weights=np.ones(self.sequence_length, np.float32))


def host_rows(host, num_hosts):
    """The rows of one host, when each has an equal share of the batch."""
    return lambda size: np.arange(host * size // num_hosts, (host + 1) * size // num_hosts)


def ramp(consumed):
    """4 samples a batch at first, then 8, then 12."""
    return 4 if consumed < 12 else 8 if consumed < 36 else 12


def make_loader(*, batch_size=ramp, rows=np.arange, **settings):
    return Loader(NumberedSource(), **({"seed": 7, "batch_size": batch_size, "local_rows": rows} | settings))


def global_batches(num_hosts, num_steps, *, position=0, **settings):
    """Samples of each global batch, put together from what every host reads; and the position after them."""
    loaders = [make_loader(rows=host_rows(host, num_hosts), position=position, **settings) for host in range(num_hosts)]
    batches = []
    for _ in range(num_steps):
        parts = [next(loader) for loader in loaders]
        assert len({(part.start, part.size) for part in parts}) == 1
        samples = np.full(parts[0].size, -1)
        for part in parts:
            samples[part.rows] = part.arrays.tokens[:, 0]
        batches.append(samples.tolist())
    (position,) = {loader.position for loader in loaders}
    for loader in loaders:
        loader.close()
    return batches, position


def test_each_sample_comes_exactly_once_an_epoch_in_a_new_order():
    batches, _ = global_batches(1, 23, batch_size=lambda consumed: 5)  # 115 samples: five epochs
    epochs = np.array(list(itertools.chain(*batches))).reshape(5, SAMPLES)
    for epoch in epochs:
        assert sorted(epoch) == list(range(SAMPLES))
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_the_order_is_a_function_of_the_seed():
    assert global_batches(1, 4) == global_batches(1, 4)
    assert global_batches(1, 4) != global_batches(1, 4, seed=8)


def test_a_larger_batch_takes_the_same_samples_in_the_same_order():
    small, _ = global_batches(1, 12, batch_size=lambda consumed: 2)
    large, _ = global_batches(1, 3, batch_size=lambda consumed: 8)
    assert list(itertools.chain(*small)) == list(itertools.chain(*large))


def test_a_batch_may_span_epochs():
    batches, _ = global_batches(1, 1, batch_size=lambda consumed: 2 * SAMPLES)
    assert sorted(batches[0]) == sorted([*range(SAMPLES)] * 2)


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_every_number_of_hosts_sees_the_same_global_batches(num_hosts):
    assert global_batches(num_hosts, 8) == global_batches(1, 8)


@pytest.mark.parametrize(("hosts_before", "hosts_after"), [(1, 1), (2, 2), (4, 4), (4, 1), (1, 2)])
def test_resuming_at_any_step_changes_nothing(hosts_before, hosts_after):
    whole, end = global_batches(1, 8)
    for step in range(1, 8):
        before, position = global_batches(hosts_before, step)
        after, end_after = global_batches(hosts_after, 8 - step, position=position)
        assert before + after == whole and end_after == end


def test_the_batch_size_ramps_by_samples_consumed():
    with make_loader() as loader:
        spans = [(batch.start, batch.size, loader.position) for batch in itertools.islice(loader, 8)]
    sizes = [4, 4, 4, 8, 8, 8, 12, 12]
    assert [size for _, size, _ in spans] == sizes
    assert [start for start, _, _ in spans] == [sum(sizes[:step]) for step in range(8)]
    assert all(start + size == position for start, size, position in spans)


def test_only_the_rows_asked_for_are_read_and_hosts_may_share_them():
    read = []

    class Recorder(NumberedSource):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    rows = np.array([1, 2, 6])
    with Loader(Recorder(), seed=7, batch_size=lambda n: 8, local_rows=lambda size: rows, prefetch=1) as loader:
        batch = next(loader).arrays
    whole, _ = global_batches(1, 1, batch_size=lambda n: 8)
    assert batch.tokens[:, 0].tolist() == [whole[0][row] for row in rows] == read[:3]
    assert batch.tokens.shape == batch.targets.shape == batch.weights.shape == (3, 3)
    assert (batch.tokens.dtype, batch.targets.dtype, batch.weights.dtype) == (np.int32, np.int32, np.float32)
    np.testing.assert_array_equal(batch.targets, batch.tokens + 1)


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (1, 8), (4, 4), (3, 16)])
def test_workers_and_prefetch_leave_the_batches_alone(workers, prefetch):
    assert global_batches(1, 12, workers=workers, prefetch=prefetch) == global_batches(1, 12)


def test_prefetch_reads_ahead_by_as_many_batches_and_no_more():
    asked, enough = [], threading.Event()

    def rows(size):
        asked.append(size)
        if len(asked) == 5:
            enough.set()
        return np.arange(size)

    with make_loader(rows=rows, prefetch=5) as loader:
        assert enough.wait(10)
        assert loader.position == 0
    assert len(asked) == 5


def test_an_error_while_reading_ahead_reaches_the_caller():
    class Broken(NumberedSource):
        def __getitem__(self, index):
            raise OSError("the disk went away")

    with Loader(Broken(), seed=0, batch_size=ramp, local_rows=np.arange) as loader:
        with pytest.raises(OSError, match="the disk went away"):
            next(loader)


def test_a_closed_loader_stops_its_threads():
    before = set(threading.enumerate())
    loader = make_loader(workers=2)
    next(loader)
    started = set(threading.enumerate()) - before
    assert started
    loader.close()
    loader.close()
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)
    with pytest.raises(ValueError):
        next(loader)


def validation(num_hosts, **settings):
    """Per batch, the sample of each global row (None where it weighs nothing)."""
    hosts = [
        list(validation_batches(NumberedSource(), local_rows=host_rows(h, num_hosts), **settings))
        for h in range(num_hosts)
    ]
    result = []
    for parts in zip(*hosts, strict=True):
        rows = [None] * parts[0].size
        for part in parts:
            for row, tokens, weights in zip(part.rows, part.arrays.tokens, part.arrays.weights, strict=True):
                rows[row] = int(tokens[0]) if weights.all() else None
        result.append(rows)
    return result


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_validation_takes_each_sample_once_and_pads_the_last_batch(num_hosts):
    batches = validation(num_hosts, batch_size=8)
    assert batches == [[*range(8)], [*range(8, 16)], [*range(16, 23), None]]


def test_padding_rows_weigh_nothing():
    *_, last = validation_batches(NumberedSource(), batch_size=8, local_rows=np.arange)
    assert last.arrays.weights[:7].all() and not last.arrays.weights[7].any()


def test_limited_validation_is_spread_evenly():
    (batch,) = validation(2, batch_size=4, max_batches=1)
    assert batch == [0, 5, 11, 17]
    assert validation(1, batch_size=8, max_batches=100) == validation(1, batch_size=8)


def test_no_validation_samples_give_no_batches():
    assert list(validation_batches(NumberedSource(0), batch_size=4, local_rows=np.arange)) == []
