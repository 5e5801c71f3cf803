"""First fit: the same rows as trying one after the other, whole sequences that do not overlap, few rows."""

from time import process_time

import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.data.packing import PackedSequence, PackedSource, pack_first_fit, pack_row
from jaxtron.data.source import Source


def plain_first_fit(lengths, capacity):
    rows, room = [], []
    for item, length in enumerate(lengths):
        row = next((number for number, left in enumerate(room) if left >= length), len(room))
        if row == len(room):
            rows.append([])
            room.append(capacity)
        rows[row].append(item)
        room[row] -= length
    return rows


def random_lengths(seed):
    random = np.random.RandomState(seed)
    capacity = int(random.choice([1, 7, 64, 1000]))
    lengths = random.randint(0, capacity + 1, random.randint(1, 400))
    return (lengths if seed % 2 else np.minimum(lengths, random.randint(0, capacity + 1, len(lengths)))), capacity


@pytest.mark.parametrize("seed", range(40))
def test_rows_are_those_of_trying_one_after_the_other(seed):
    lengths, capacity = random_lengths(seed)
    packing = pack_first_fit(lengths, capacity, decreasing=False)
    assert [packing.row(row).tolist() for row in range(len(packing))] == plain_first_fit(lengths.tolist(), capacity)
    order = sorted(range(len(lengths)), key=lambda item: -lengths[item])
    expected = [[order[k] for k in row] for row in plain_first_fit(lengths[order].tolist(), capacity)]
    packing = pack_first_fit(lengths, capacity)
    assert [packing.row(row).tolist() for row in range(len(packing))] == expected
    assert sorted(packing.items.tolist()) == list(range(len(lengths)))


def test_decreasing_needs_no_more_rows_than_plain_first_fit_on_usual_lengths():
    for seed in range(5):
        lengths = np.minimum(np.random.RandomState(seed).geometric(1 / 300, 5000), 1024)
        plain, decreasing = (len(pack_first_fit(lengths, 1024, decreasing=value)) for value in (False, True))
        assert -(-lengths.sum() // 1024) <= decreasing <= plain
        assert lengths.sum() / (1024 * decreasing) > 0.99


def test_the_time_to_pack_grows_with_the_number_of_sequences_not_its_square():
    def seconds(count):
        lengths = np.random.RandomState(0).randint(1, 2049, count)
        times = []
        for _ in range(3):
            start = process_time()
            pack_first_fit(lengths, 2048)
            times.append(process_time() - start)
        return min(times)

    # 8 times as many: 8 times the work and a level or three more of the tree; 64 times if each row were tried
    assert seconds(40_000) < 24 * seconds(5_000)


def test_edge_cases():
    assert len(pack_first_fit(np.empty(0, np.int64), 8)) == 0
    assert pack_first_fit(np.zeros(3, np.int64), 8).row(0).tolist() == [0, 1, 2]
    assert len(pack_first_fit(np.full(5, 8), 8)) == 5
    with pytest.raises(ValueError, match="sequences of 3 to 9 tokens do not go into rows of 8"):
        pack_first_fit(np.array([3, 9]), 8)


def sequence(ids, answers):
    return PackedSequence(np.array(ids, np.int32), np.array(answers, bool))


def test_a_row_by_hand():
    row = pack_row([sequence([5, 6, 7, 8], [0, 0, 1, 1]), sequence([9, 10], [1, 1])], 6, pad=99)
    assert row.tokens.tolist() == [5, 6, 7, 9, 99, 99]
    assert row.targets.tolist() == [6, 7, 8, 10, 99, 99]
    assert row.weights.tolist() == [0, 1, 1, 1, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert row.segments.tolist() == [0, 0, 0, 1, 2, 2]


class Store:
    def __init__(self, sequences):
        self._sequences = sequences
        self.lengths = np.array([len(sequence.ids) for sequence in sequences], np.int64)

    def __getitem__(self, index):
        return self._sequences[index]


@pytest.mark.parametrize("decreasing", [False, True])
def test_every_sequence_is_whole_in_one_row_and_weighs_on_its_answers_only(decreasing):
    random = np.random.RandomState(2)
    sequences = []
    for number in range(300):
        length = random.randint(2, 66)
        # ids that say whose they are
        sequences.append(sequence(number * 100 + np.arange(length), random.rand(length) < 0.4))
    source = PackedSource(Store(sequences), sequence_length=64, decreasing=decreasing)
    assert isinstance(source, Source)
    seen, used = [], 0
    for index in range(len(source)):
        row = source[index]
        assert row.segments is not None and row.positions is not None
        # every target is the id after a first, so only padding's is 0
        real = row.targets > 0
        used += int(real.sum())
        for segment in np.unique(row.segments[real]):
            inside = row.segments == segment
            number = int(row.tokens[inside][0]) // 100
            whole = sequences[number]
            np.testing.assert_array_equal(row.tokens[inside], whole.ids[:-1])
            np.testing.assert_array_equal(row.targets[inside], whole.ids[1:])
            np.testing.assert_array_equal(row.weights[inside], whole.is_answer[1:])
            np.testing.assert_array_equal(row.positions[inside], np.arange(inside.sum()))
            seen.append(number)
        assert not row.weights[~real].any()
    assert sorted(seen) == list(range(300))
    assert source.density == used / (64 * len(source))
    plain = plain_first_fit((Store(sequences).lengths - 1).tolist(), 64)
    assert len(source) <= len(plain)


def test_a_sequence_longer_than_a_row_is_an_error():
    store = Store([sequence(range(10), [1] * 10)])
    assert len(PackedSource(store, sequence_length=9)) == 1
    with pytest.raises(UserError, match="a sequence of 10 tokens does not go into rows of 8"):
        PackedSource(store, sequence_length=8)


def test_answers_of_any_length_weigh_the_same_where_that_is_asked_for():
    """Each run of answer by itself, also where two are in one sequence; what is cut off counts no more."""
    long, short = sequence(range(12), [0, 0, *[1] * 8, 0, 1]), sequence([7, 8, 9], [0, 0, 1])
    row = pack_row([long, short], 16, normalize="answers")
    np.testing.assert_allclose(row.weights, [0, *[1 / 8] * 8, 0, 1, 0, 1, 0, 0, 0], rtol=1e-6)
    assert row.weights.sum() == pytest.approx(3) and row.weights.dtype == np.float32
    plain = pack_row([long, short], 16)
    np.testing.assert_array_equal(plain.weights != 0, row.weights != 0)
    nothing = pack_row([sequence([1, 2], [0, 0])], 4, normalize="answers")
    assert not nothing.weights.any()
