"""Token files, conversations and mock data as the settings name them, through the loader of any number of hosts."""

import functools
import itertools
import json

import numpy as np
import pytest
from pydantic import ValidationError

from jaxtron.config import UserError
from jaxtron.data.config import DataConfig
from jaxtron.data.dataset import open_data
from jaxtron.data.megatron.boundaries import Boundaries
from jaxtron.data.megatron.gpt_source import GPTSource
from jaxtron.data.megatron.indexed import IndexedReader, IndexedWriter
from jaxtron.data.megatron.splits import split_ranges

LENGTH, END, SEED = 8, 256, 7


def write_tokens(prefix, num_documents, seed=0):
    random = np.random.default_rng(seed)
    with IndexedWriter(str(prefix), np.dtype(np.uint16)) as writer:
        for _ in range(num_documents):
            writer.add_item(np.append(random.integers(0, 256, random.integers(1, 30)), END).astype(np.uint16))
            writer.end_document()
    return str(prefix)


@pytest.fixture
def prefix(tmp_path):
    return write_tokens(tmp_path / "tokens", 200)


@pytest.fixture
def make(tmp_path):
    def make(train_samples=None, **settings):
        settings = {"sequence_length": LENGTH, "cache_directory": str(tmp_path / "cache")} | settings
        return open_data(DataConfig.model_validate(settings), seed=SEED, train_samples=train_samples)

    return make


def expected_source(prefix, part=0, split="969,30,1", samples=None, **boundaries):
    reader = IndexedReader(prefix)
    settings = {"sequence_length": LENGTH, "samples": samples, "seed": SEED}
    found = Boundaries(END, **boundaries) if boundaries else Boundaries()
    return GPTSource(reader, split_ranges(split, len(reader))[part], boundaries=found, **settings)


def assert_same_samples(one, two, count=40):
    for index in range(min(count, len(two))):
        for name in ("tokens", "targets", "weights", "positions", "segments"):
            np.testing.assert_array_equal(getattr(one[index], name), getattr(two[index], name), err_msg=name)


def host_rows(host, num_hosts):
    return functools.partial(_share, host, num_hosts)


def _share(host, num_hosts, size):
    return np.arange(host * size // num_hosts, (host + 1) * size // num_hosts)


def _size(start):
    return 4 if start < 20 else 8


def global_tokens(data, num_hosts, steps, position=0):
    """Tokens of each global batch put together from all hosts, and the position after them."""
    loaders = [
        data.train_loader(batch_size=_size, local_rows=host_rows(host, num_hosts), position=position)
        for host in range(num_hosts)
    ]
    batches = []
    for _ in range(steps):
        parts = [next(loader) for loader in loaders]
        batches.append(np.concatenate([part.arrays.tokens for part in parts]))
    (position,) = {loader.position for loader in loaders}
    for loader in loaders:
        loader.close()
    return batches, position


def test_a_prefix_is_trained_on_in_megatrons_order(make, prefix):
    # more than one epoch, the last one shuffled for itself
    data = make(train_samples=700, path=prefix)
    assert data.is_ordered
    expected = expected_source(prefix, samples=700)
    assert_same_samples(data.train, expected, 700)
    assert_same_samples(data.validation, expected_source(prefix, part=1))
    batches, _ = global_tokens(data, 1, 20)
    for index, tokens in enumerate(itertools.chain(*batches)):
        np.testing.assert_array_equal(tokens, expected[index].tokens)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_file_of_the_pair_names_it(make, prefix, ending):
    assert make(path=prefix + ending).fingerprint == make(path=prefix).fingerprint


def test_what_an_end_of_document_changes(make, prefix, tmp_path):
    data = make(path=prefix, mask_end_of_document=True, reset_positions=True, reset_attention=True)
    every = {"mask_loss": True, "reset_positions": True, "reset_attention": True}
    assert_same_samples(data.train, expected_source(prefix, **every))
    assert data.fingerprint != make(path=prefix).fingerprint
    with pytest.raises(UserError, match="no end of document"):
        (tmp_path / "text.txt").write_text("some text" * 20)
        make(path=str(tmp_path / "text.txt"), tokenizer="characters", reset_attention=True)


def test_text_is_packed_documents_too(make, tmp_path):
    (tmp_path / "text").mkdir()
    for name in "abcd":
        (tmp_path / "text" / name).write_text(name * 11)
    data = make(path=str(tmp_path / "text"), reset_attention=True, reset_positions=True, validation_fraction=0.3)
    sample = data.train[1]
    # 11 bytes and the end: four of the first document are left
    assert sample.segments.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert sample.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("interrupted", [3, 9])
def test_a_position_holds_for_any_number_of_hosts(make, prefix, interrupted):
    data = make(train_samples=300, path=prefix)
    whole, _ = global_tokens(data, 1, 14)
    for before, after in ((1, 2), (2, 4), (4, 1)):
        first, position = global_tokens(data, before, interrupted)
        second, _ = global_tokens(data, after, 14 - interrupted, position)
        np.testing.assert_array_equal(np.concatenate(first + second), np.concatenate(whole))


def test_processes_read_the_same(make, prefix):
    threads, _ = global_tokens(make(train_samples=300, path=prefix), 1, 8)
    processes, position = global_tokens(make(train_samples=300, path=prefix, processes=2), 1, 8)
    np.testing.assert_array_equal(np.concatenate(processes), np.concatenate(threads))
    assert position == 5 * 4 + 3 * 8


def test_skipped_samples_keep_their_number(make, prefix):
    plain = make(train_samples=300, path=prefix)
    order, _ = global_tokens(plain, 1, 14)
    order = np.concatenate(order)
    left = [number for number in range(len(order)) if not (2 <= number < 7 or 30 <= number < 33)]
    data = make(train_samples=300, path=prefix, skip=((2, 7), (30, 33)))
    assert data.fingerprint == plain.fingerprint
    found, position = global_tokens(data, 2, 8)
    found = np.concatenate(found)
    np.testing.assert_array_equal(found, order[left[: len(found)]])
    assert position == left[len(found) - 1] + 1
    # ranges behind the position change nothing
    again, _ = global_tokens(make(train_samples=300, path=prefix, skip=((2, 7),)), 1, 1, position)
    np.testing.assert_array_equal(again[0], order[position : position + 8])


def test_blends(make, tmp_path):
    one, two = write_tokens(tmp_path / "one", 90), write_tokens(tmp_path / "two", 70, seed=1)
    pairs = make(train_samples=100, path=((0.7, one), (0.3, two)))
    flat = make(train_samples=100, path=("0.7", one, "0.3", two))
    listed = tmp_path / "data.blend"
    listed.write_text(f"0.7 {one}\n0.3 {two}\n")
    file = make(train_samples=100, path=str(listed))
    assert pairs.fingerprint == flat.fingerprint == file.fingerprint
    sources = [expected_source(path, samples=count) for path, count in ((one, 71), (two, 31))]
    # the first that lags most: 0.7 - 0 before 0.3 - 0, then 1.4 - 1, ...
    for place, (source, index) in enumerate([(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3)]):
        np.testing.assert_array_equal(pairs.train[place].tokens, sources[source][index].tokens)
    assert len(pairs.validation) > 0


def test_a_blend_for_each_split(make, tmp_path):
    train, validation = write_tokens(tmp_path / "train", 60), write_tokens(tmp_path / "validation", 20, seed=1)
    data = make(train_samples=50, train=train, validation=((1.0, validation),))
    assert_same_samples(data.train, expected_source(train, samples=50, split="1,0,0"))
    assert_same_samples(data.validation, expected_source(validation, part=1, split="0,1,0"))
    assert len(data.test) == 0


def test_mock_data(make):
    data = make(train_samples=10, format="mock", split="9,1,0")
    assert data.is_ordered and len(data.validation) > 0
    steps = np.diff(data.train[0].tokens)
    assert (steps[data.train[0].tokens[:-1] < 250] == 1).all()


def test_conversations(make, tmp_path):
    path = tmp_path / "chat.jsonl"
    talks = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "b"}] for n in range(40)]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in talks))
    data = make(path=str(path), format="chat", sequence_length=128, validation_fraction=0.25)
    sample = data.train[0]
    assert not data.is_ordered and len(data.train) > len(data.validation) > 0
    answer = sample.targets[sample.weights == 1].astype(np.uint8).tobytes().decode()
    assert answer.startswith("b<|im_end|>") and set(sample.segments) > {0, 1}
    assert DataConfig(format="chat").optional_fields == {"positions", "segments"}


def test_the_middle_is_filled_in(make, prefix):
    asked = {"prefix": 300, "middle": 301, "suffix": 302, "rate": 1.0, "characters": False}
    with pytest.raises(ValidationError, match="fill_in_middle.prefix 300 has no effect with data.format chat"):
        make(path=prefix, format="chat", fill_in_middle=asked)
    asked |= {"rate": 1.0}
    data = make(path=prefix, fill_in_middle=asked, reset_attention=True)
    tokens = np.concatenate([data.train[index].tokens for index in range(30)])
    assert {300, 301, 302} <= set(tokens.tolist()) and data.train[0].segments is not None
    assert data.fingerprint != make(path=prefix, reset_attention=True).fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"path": "{prefix}", "validation_fraction": 0.2},
            "validation_fraction 0.2 has no effect with data.format tokens",
        ),
        ({"path": "{prefix}", "tokenizer": "characters"}, "makes its vocabulary from text"),
        ({"path": "{prefix}", "split": "0,1,0"}, "no share to train on"),
        ({"path": "{prefix}", "sequence_length": 100_000}, "too few for one sample of 100000"),
        ({"path": "{prefix}", "train": "x"}, "both given"),
        ({"validation": "x"}, "need data.train"),
        ({"train": "/nowhere/at/all"}, "/nowhere/at/all.idx"),
        ({"skip": ((5, 3),)}, "pairs of sample numbers that rise"),
        ({"samples": 5}, "samples 5 has no effect with data.format text"),
    ],
    ids=str,
)
def test_bad_settings_are_told_in_a_line(make, prefix, settings, message):
    settings = {
        name: value.format(prefix=prefix) if isinstance(value, str) else value for name, value in settings.items()
    }
    # what settings say by themselves is an error of their validation, which the command line tells in a line
    with pytest.raises((UserError, ValidationError), match=message) as error:
        make(**settings)
    assert isinstance(error.value, ValidationError) or "\n" not in str(error.value)


def test_a_part_too_small_for_a_sample_is_none_and_said(make, prefix, caplog):
    data = make(path=prefix)
    # with the default split nobody asked for it
    assert len(data.validation) > 0 and len(data.test) == 0 and caplog.text == ""
    assert len(make(path=prefix, split="968,30,2").test) == 0
    assert "0 tokens for test, too few for a sample" in caplog.text
