"""Samples of token files: Megatron's rules for one sample, blends, ids that do not belong, several threads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.data.megatron.blend import build_blend, build_exhaustive_blend, component_samples
from jaxtron.data.megatron.boundaries import Boundaries
from jaxtron.data.megatron.gpt_index import build_gpt_index
from jaxtron.data.megatron.gpt_source import BlendedSource, GPTSource, open_blend
from jaxtron.data.megatron.indexed import IndexedReader, IndexedWriter
from jaxtron.data.megatron.mock import MockReader
from jaxtron.data.source import Source


def write(prefix, sizes, *, first=1, dtype=np.int32):
    """Documents whose tokens count on from one to the next."""
    with IndexedWriter(str(prefix), dtype) as writer:
        for size in sizes:
            writer.add_item(np.arange(first, first + size))
            writer.end_document()
            first += size
    return IndexedReader(str(prefix))


def slow_text(reader, index, row, extra):
    """Tokens of a sample by walking its sequences."""
    (first, start), (last, stop) = index.samples[row].tolist(), index.samples[row + 1].tolist()
    text = []
    for position in range(first, last + 1):
        document = reader.get(int(index.documents[position])).tolist()
        begin = start if position == first else 0
        end = stop + extra if position == last else len(document)
        text += document[begin:end]
    return text


@pytest.mark.parametrize("extra_token", [True, False])
@pytest.mark.parametrize("drop_last_partial", [True, False])
def test_samples_are_megatrons(tmp_path, extra_token, drop_last_partial):
    rng = np.random.default_rng(0)
    for number in range(20):
        sizes = rng.integers(0, 12, 15).tolist()
        reader = write(tmp_path / str(number), [*sizes, 20])
        settings = {"sequence_length": 5, "samples": 40, "seed": number, "extra_token": extra_token}
        settings["drop_last_partial"] = drop_last_partial
        source = GPTSource(reader, range(2, 16), **settings)
        index = build_gpt_index(reader.lengths, range(2, 16), **settings)
        assert len(source) == len(index) and isinstance(source, Source)
        short = 0
        for place in range(len(source)):
            text = slow_text(reader, index, int(index.shuffle[place]), int(extra_token))
            assert source.text(place).tolist() == text
            sample = source[place]
            short += len(text) < 5 + extra_token
            padded = text + [0] * (6 - len(text))
            assert sample.tokens.tolist() == padded[:5] and sample.targets.tolist() == padded[1:]
            assert sample.weights.tolist() == [float(place + 1 < len(text)) for place in range(5)]
        assert short <= (not drop_last_partial)


def test_one_epoch_has_every_token_once(tmp_path):
    reader = write(tmp_path / "a", [7, 3, 0, 11, 5, 2, 9])
    source = GPTSource(
        reader,
        range(7),
        sequence_length=4,
        samples=None,
        seed=3,
        extra_token=False,
        drop_last_partial=False,
    )
    texts = [source.text(place) for place in range(len(source))]
    assert sorted(np.concatenate(texts).tolist()) == list(range(1, 38))


def test_ends_of_documents_come_through(tmp_path):
    reader = write(tmp_path / "a", [7, 3, 11])
    boundaries = Boundaries(end_of_document=7, mask_loss=True, reset_positions=True, reset_attention=True)
    source = GPTSource(reader, range(3), sequence_length=20, samples=1, seed=1, boundaries=boundaries)
    sample = source[0]
    (place,) = np.flatnonzero(sample.tokens == 7)
    assert sample.weights[place] == 0 and sample.weights.sum() == 19
    assert sample.positions[place + 1] == 0 and sample.segments[place] + 1 == sample.segments[place + 1]


def test_mock_data_reads_like_a_file():
    source = GPTSource(
        MockReader(vocab_size=50, end_of_document=49), range(100), sequence_length=64, samples=None, seed=0
    )
    assert source[0].tokens.max() <= 49 and len(source) > 1000


@pytest.mark.parametrize(("dtype", "wrong"), [(np.int32, 1000), (np.int32, -1), (np.int64, 2**31), (np.int64, -5)])
def test_ids_that_do_not_belong_are_refused_by_file_and_place(tmp_path, dtype, wrong):
    with IndexedWriter(str(tmp_path / "a"), dtype) as writer:
        for tokens in ([1, 2, 3], [4, wrong, 6], [7, 8, 9]):
            writer.add_item(tokens)
            writer.end_document()
    reader = IndexedReader(str(tmp_path / "a"))
    vocab_size = 1000 if dtype == np.int32 else None
    source = GPTSource(reader, range(3), sequence_length=8, samples=1, seed=0, vocab_size=vocab_size)
    with pytest.raises(UserError, match=rf"a\.bin has the id {wrong} at token 1 of sequence 1, but ids here are 0 to"):
        source[0]


def test_files_that_give_no_sample_are_refused(tmp_path):
    reader = write(tmp_path / "a", [3, 0])
    settings = {"samples": None, "seed": 0}
    with pytest.raises(UserError, match=r"a has 3 tokens in this split, too few for one sample of 3 \+ 1"):
        GPTSource(reader, range(2), sequence_length=3, **settings)
    with pytest.raises(UserError, match="a has no tokens"):
        GPTSource(reader, range(1, 2), sequence_length=3, **settings)
    with pytest.raises(UserError, match=r"a\.bin has float32"):
        GPTSource(write(tmp_path / "a", [9], dtype=np.float32), range(1), sequence_length=3, **settings)
    with pytest.raises(IndexError, match="sample 3 of 3"):
        GPTSource(reader, range(2), sequence_length=1, samples=3, seed=0, extra_token=False)[3]


@pytest.fixture
def prefixes(tmp_path):
    write(tmp_path / "a", [7, 3, 11, 5] * 5, first=1000)
    write(tmp_path / "b", [9, 40] * 5, first=5000)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_a_weighted_blend(prefixes, tmp_path):
    settings = {"sequence_length": 4, "seed": 5}
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        source = open_blend(
            prefixes,
            [3, 7],
            split="9,1",
            part="train",
            samples=50,
            cache_directory=cache,
            **settings,
        )
        blend, needed = build_blend([3, 7], 50), component_samples([3, 7], 50)
        parts = [
            GPTSource(IndexedReader(prefix), range(count), samples=samples, **settings)
            for prefix, count, samples in zip(prefixes, (18, 9), needed, strict=True)
        ]
        assert len(source) == 50 and isinstance(source, Source)
        for place, (number, sample) in enumerate(zip(blend.datasets.tolist(), blend.samples.tolist(), strict=True)):
            assert source[place].tokens.tolist() == parts[number][sample].tokens.tolist()
    with pytest.raises(IndexError, match="sample 50 of 50"):
        source[50]


def test_blends_without_weights(prefixes):
    settings = {"split": "1", "part": "train", "sequence_length": 4, "seed": 5}
    sizes = [len(open_blend([prefix], samples=None, **settings)) for prefix in prefixes]
    assert sizes == [32, 61]
    whole = open_blend(prefixes, samples=None, **settings)
    assert isinstance(whole, BlendedSource)
    np.testing.assert_array_equal(whole.blend.datasets, build_exhaustive_blend(sizes).datasets)
    some = open_blend(prefixes, samples=20, **settings)
    assert isinstance(some, BlendedSource)
    np.testing.assert_array_equal(some.blend.datasets, build_blend(sizes, 20).datasets)
    assert len(open_blend(prefixes, samples=10**6, **settings)) == 93
    one = open_blend(prefixes[:1], samples=100, **settings)
    assert isinstance(one, GPTSource) and len(one) >= 100


def test_every_part_of_a_split_has_its_own_sequences(prefixes):
    tokens = {}
    for part in ("train", "validation", "test"):
        source = open_blend(
            prefixes, split="2,1,1", part=part, sequence_length=4, samples=None, seed=1, drop_last_partial=False
        )
        tokens[part] = {token for place in range(len(source)) for token in source[place].tokens.tolist()} - {0}
    assert all(tokens.values())
    assert not (tokens["train"] & tokens["validation"] or tokens["train"] & tokens["test"])
    assert not tokens["validation"] & tokens["test"]


def test_bad_blends_are_refused(prefixes):
    settings = {"split": "1", "part": "train", "sequence_length": 4, "seed": 5}
    with pytest.raises(UserError, match="give the number of samples"):
        open_blend(prefixes[:1], [1], samples=None, **settings)
    sources = [open_blend([prefix], samples=None, **settings) for prefix in prefixes]
    with pytest.raises(UserError, match="data path 0 for 50 samples, but it has 32"):
        BlendedSource(sources, weights=[1, 1], samples=100)
    with pytest.raises(UserError, match="3 weights for 2"):
        BlendedSource(sources, weights=[1, 1, 1], samples=100)
    with pytest.raises(UserError, match="give the number of samples"):
        BlendedSource(sources, weights=[1, 1], samples=None)


def test_fingerprints_tell_orders_apart(prefixes):
    def fingerprint(prefixes, weights=None, **changed):
        settings = {"split": "1", "part": "train", "sequence_length": 4, "seed": 5, "samples": 20} | changed
        return open_blend(prefixes, weights, **settings).fingerprint

    one = prefixes[:1]
    assert fingerprint(one) == fingerprint(one) and fingerprint(prefixes, [1, 1]) == fingerprint(prefixes, [1, 1])
    found = [fingerprint(one), fingerprint(prefixes, [1, 1]), fingerprint(prefixes), fingerprint(prefixes, [1, 2])]
    found += [fingerprint(one, **change) for change in ({"seed": 6}, {"samples": 2000}, {"split": "1,1"})]
    assert len(set(found)) == len(found)


def test_as_many_epochs_are_the_same_order(prefixes):
    """A run that is prolonged within its epochs goes on; one that needs another order is other data."""
    reader = write(Path(prefixes[0]).parent / "epochs", [3, 7, 5, 9, 11, 2])
    orders: dict[str, set[tuple]] = {}
    for samples in range(1, 40):
        source = GPTSource(reader, range(6), sequence_length=4, samples=samples, seed=5)
        arrays = source.index.documents, source.index.samples, source.index.shuffle
        orders.setdefault(source.fingerprint, set()).add(tuple(str(values.tolist()) for values in arrays))
    assert all(len(found) == 1 for found in orders.values())
    assert len(orders) == len(set.union(*orders.values())) < 12
    for names, weights, pairs in ((prefixes[:1], None, (1, 10)), (prefixes, [1, 3], (7, 12))):
        few, many = (
            open_blend(names, weights, split="1", part="train", sequence_length=4, seed=5, samples=samples)
            for samples in pairs
        )
        assert few.fingerprint == many.fingerprint
        for place in range(pairs[0]):
            np.testing.assert_array_equal(few[place].tokens, many[place].tokens)


def test_threads_read_the_same(prefixes):
    source = open_blend(prefixes, [1, 1], split="1", part="train", sequence_length=4, samples=200, seed=5)
    expected = [source[place].tokens.tolist() for place in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda place: source[place].tokens.tolist(), [*range(200)] * 5)) == expected * 5
