"""Megatron's sample order: vectors made by its own helpers, and a plain loop that follows the rules word by word."""

import hashlib

import numpy as np
import pytest

import jaxtron.data.megatron.gpt_index as gpt_index
from jaxtron.config import UserError
from jaxtron.data.megatron.gpt_index import build_gpt_index, order_digest
from jaxtron.data.megatron.indexed import IndexedWriter
from jaxtron.data.megatron.mock import MockReader

SIZES = [7, 3, 11, 5, 2, 9]
# sizes, range, settings; document, sample and shuffle index
VECTORS = {
    "one epoch": (
        (SIZES, range(6), {"sequence_length": 4, "samples": None, "seed": 1234}),
        ("2,1,5,0,4,3", "(0,0)(0,4)(0,8)(1,1)(2,2)(2,6)(3,1)(3,5)(5,0)(5,4)", "6,4,0,5,3,2,8,7,1"),
    ),
    "separate final epoch": (
        (SIZES, range(6), {"sequence_length": 4, "samples": 12, "seed": 1234}),
        (
            "2,1,5,0,4,3,0,4,3,2,5,1",
            "(0,0)(0,4)(0,8)(1,1)(2,2)(2,6)(3,1)(3,5)(5,0)(5,4)(6,3)(7,0)(8,2)(9,1)(9,5)(9,9)(10,2)(10,6)(11,1)",
            "7,3,5,1,4,8,0,2,6,16,13,10,14,12,9,11,17,15",
        ),
    ),
    "epochs shuffled together": (
        (SIZES, range(6), {"sequence_length": 4, "samples": 17, "seed": 1234}),
        (
            "1,2,5,2,3,4,1,0,4,5,0,3",
            "(0,0)(1,1)(1,5)(1,9)(2,2)(2,6)(3,1)(3,5)(3,9)(4,2)(5,1)(7,0)(7,4)(8,1)(9,3)(9,7)(10,2)(10,6)(11,3)",
            "8,1,15,4,3,7,11,10,14,13,2,6,9,0,5,17,16,12",
        ),
    ),
    "no extra token, the last partial one kept": (
        (
            SIZES,
            range(6),
            {"sequence_length": 4, "samples": None, "seed": 1234, "extra_token": False, "drop_last_partial": False},
        ),
        ("2,1,5,0,4,3", "(0,0)(0,4)(0,8)(1,1)(2,2)(2,6)(3,1)(3,5)(4,2)(5,4)(5,5)", "8,5,6,0,4,3,2,9,7,1"),
    ),
    "a split": (
        (SIZES, range(1, 5), {"sequence_length": 5, "samples": 6, "seed": 42}),
        ("2,4,1,3,2,4,1,3", "(0,0)(0,5)(0,10)(2,2)(3,4)(4,4)(4,9)(6,1)(7,3)", "3,0,1,2,5,4,7,6"),
    ),
    "an empty document": (
        ([7, 3, 0, 11, 5], range(5), {"sequence_length": 4, "samples": None, "seed": 1234}),
        ("4,0,1,2,3", "(0,0)(0,4)(1,3)(2,0)(4,1)(4,5)(4,9)", "5,2,3,1,0,4"),
    ),
}


def numbers(text):
    return [int(word) for word in text.split(",")]


def pairs(text):
    return [numbers(pair) for pair in text.strip("()").split(")(")]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", VECTORS)
def test_indices_are_megatrons(name):
    (sizes, sequences, settings), (documents, samples, shuffle) = VECTORS[name]
    index = build_gpt_index(np.array(sizes, np.int32), sequences, **settings)
    assert index.documents.tolist() == numbers(documents) and index.documents.dtype == np.int32
    assert index.samples.tolist() == pairs(samples) and index.samples.dtype == np.int32
    assert index.shuffle.tolist() == numbers(shuffle) and index.shuffle.dtype == np.uint32
    assert len(index) == len(index.samples) - 1


def test_the_shuffle_is_numpys_old_one():
    values = np.arange(10, dtype=np.int32)
    np.random.RandomState(1234).shuffle(values)
    assert values.tolist() == [7, 2, 9, 1, 0, 8, 4, 5, 6, 3]


def slow_index(sizes, sequences, *, sequence_length, samples, seed, extra_token=True, drop_last_partial=True):
    """The rules, one token budget at a time."""
    extra, epochs, tokens = int(extra_token), 1, sum(sizes[number] for number in sequences)
    while samples is not None and epochs * tokens < samples * sequence_length + extra:
        epochs += 1
    separate, before = False, 0
    if epochs > 1:
        before = ((epochs - 1) * tokens - extra) // sequence_length
        separate = samples - before < int(0.80 * ((tokens - extra) // sequence_length))
    random = np.random.RandomState(seed)

    def shuffled(values, dtype):
        array = np.array(values, dtype)
        random.shuffle(array)
        return array.tolist()

    if separate:
        documents = shuffled([*sequences] * (epochs - 1), np.int32) + shuffled([*sequences], np.int32)
    else:
        documents = shuffled([*sequences] * epochs, np.int32)
    total = epochs * tokens - extra
    num_samples = total // sequence_length if drop_last_partial else int(np.ceil(np.float32(total) / sequence_length))
    rows, position, offset = [(0, 0)], 0, 0
    for _ in range(num_samples):
        need = sequence_length + extra
        while True:
            available = sizes[documents[position]] - offset
            if available >= need:
                offset += need - extra
                break
            if position == len(documents) - 1:
                offset = sizes[documents[position]] - extra
                break
            need -= available
            position, offset = position + 1, 0
        rows.append((position, offset))
    cut = before if separate else num_samples
    shuffle = shuffled(range(cut), np.uint32) + (shuffled(range(cut, num_samples), np.uint32) if separate else [])
    return documents, rows, shuffle


@pytest.mark.parametrize("chunk", [1, 3, 1 << 16])
def test_indices_are_those_of_a_plain_loop(monkeypatch, chunk):
    monkeypatch.setattr(gpt_index, "CHUNK", chunk)
    rng = np.random.default_rng(chunk)
    seen = {"separate": 0, "short": 0}
    for _ in range(300):
        longest = rng.choice([1, 3, 20, 200])
        sizes = rng.integers(0, longest, rng.integers(1, 30), endpoint=True).tolist()
        start, stop = sorted(rng.integers(0, len(sizes) + 1, 2).tolist())
        settings = {
            "sequence_length": int(rng.integers(1, 40)),
            "samples": None if rng.random() < 0.3 else int(rng.integers(0, 60)),
            "seed": int(rng.integers(2**32)),
            "extra_token": bool(rng.random() < 0.6),
            "drop_last_partial": bool(rng.random() < 0.6),
        }
        lengths = np.array(sizes, np.int32)
        if not sum(sizes[start:stop]):
            with pytest.raises(UserError, match="no tokens"):
                build_gpt_index(lengths, range(start, stop), **settings)
            continue
        documents, rows, shuffle = slow_index(sizes, range(start, stop), **settings)
        index = build_gpt_index(lengths, range(start, stop), **settings)
        assert index.documents.tolist() == documents
        assert [tuple(row) for row in index.samples.tolist()] == rows
        assert index.shuffle.tolist() == shuffle
        seen["separate"] += len(documents) > stop - start
        seen["short"] += not settings["drop_last_partial"]
    assert min(seen.values()) > 50


FLOAT32 = [(33_554_437, False, 16_777_218), (33_554_438, True, 16_777_218), (33_554_439, True, 16_777_220)]


@pytest.mark.parametrize(("tokens", "extra_token", "num_samples"), FLOAT32)
def test_partial_samples_are_counted_in_float32_as_megatron_does(tokens, extra_token, num_samples):
    count = gpt_index._num_samples(tokens - extra_token, sequence_length=2, drop_last_partial=False)
    assert count == num_samples


@pytest.mark.usefixtures("way")
@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "extra_token", "num_samples"), FLOAT32)
def test_partial_samples_beyond_float32(tokens, extra_token, num_samples):
    settings = {"sequence_length": 2, "samples": None, "seed": 0, "extra_token": extra_token}
    index = build_gpt_index(np.array([tokens], np.int32), range(1), drop_last_partial=False, **settings)
    assert len(index) == num_samples
    assert index.samples[-1].tolist() == [0, min(2 * num_samples, tokens - extra_token)]


@pytest.mark.usefixtures("way")
def test_wide_indices_where_numbers_need_them(monkeypatch):
    settings = {"sequence_length": 4, "samples": 17, "seed": 1234}
    narrow = build_gpt_index(np.array(SIZES, np.int32), range(6), **settings)
    monkeypatch.setattr(gpt_index, "INT32_MAX", 11)
    wide = build_gpt_index(np.array(SIZES, np.int32), range(6), **settings)
    assert wide.samples.dtype == np.int64
    np.testing.assert_array_equal(wide.samples, narrow.samples)
    monkeypatch.setattr(gpt_index, "INT32_MAX", 12)
    assert build_gpt_index(np.array(SIZES, np.int32), range(6), **settings).samples.dtype == np.int32


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 2**32}, {"sequence_length": 0}, {"samples": -1}])
def test_bad_settings_are_refused(wrong):
    settings = {"sequence_length": 4, "samples": 17, "seed": 1234} | wrong
    with pytest.raises(UserError, match=f"{next(iter(wrong)).replace('_', ' ')} {next(iter(wrong.values()))}"):
        build_gpt_index(np.array(SIZES, np.int32), range(6), **settings)


def test_the_digest_is_of_the_train_split(tmp_path):
    with IndexedWriter(str(tmp_path / "a"), np.uint16) as writer:
        for size in [*SIZES, 100, 100]:
            writer.add_item(np.zeros(size, np.uint16))
            writer.end_document()
    digest = order_digest(str(tmp_path / "a"), sequence_length=4, samples=0, seed=1234, split="6,1,1")
    _, (documents, samples, shuffle) = VECTORS["one epoch"]
    expected = {"document_index": numbers(documents), "sample_index": pairs(samples), "shuffle_index": numbers(shuffle)}
    assert digest == {
        name: {"length": len(values), "sha256": hashlib.sha256(np.array(values, "<i8").tobytes()).hexdigest()}
        for name, values in expected.items()
    }
    more = order_digest(str(tmp_path / "a"), sequence_length=4, samples=12, seed=1234, split="6,1,1")
    assert [part["length"] for part in more.values()] == [12, 19, 18]


def test_mock_documents_are_megatrons():
    reader = MockReader(vocab_size=50, end_of_document=49)
    assert len(reader) == 100_000
    assert reader.lengths[:8].tolist() == [3484, 2609, 2094, 1105, 1261, 168, 309, 68]
    document = reader.get(7)
    assert document.tolist() == [*((np.arange(67) + 1) % 50).tolist(), 49]
    assert reader.get(7, 60).tolist() == document[60:].tolist()
    assert reader.get(7, 2, 5).tolist() == [3, 4, 5, 6, 7] and reader.get(7, 68).tolist() == []
    for asked in [(100_000,), (7, 69), (7, 0, 69), (7, 5, -1), (7, -1, 2)]:
        with pytest.raises(IndexError, match="mock data"):
            reader.get(*asked)
