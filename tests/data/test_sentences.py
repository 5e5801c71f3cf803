"""Samples of sentences as the data settings name them: Megatron's files, text whose lines are sentences, blends."""

from dataclasses import dataclass

import numpy as np
import pytest

from jaxtron.config import NoEffect, UserError
from jaxtron.data.config import DataConfig
from jaxtron.data.masked.bert import BertSource, BertVocabulary
from jaxtron.data.masked.mapping import LONGEST_SENTENCE, build_mapping
from jaxtron.data.masked.next_sentence import NextSentenceSource
from jaxtron.data.masked.ngrams import Masking
from jaxtron.data.masked.sentences import SentenceRows, SentenceSamples, open_sentences
from jaxtron.data.megatron.indexed import IndexedReader, IndexedWriter
from jaxtron.data.megatron.splits import split_ranges

LENGTH, SEED = 32, 7


@dataclass
class Sentences:
    """What each row of a mapping has: its sentences, one after the other."""

    found: SentenceRows
    sequence_length: int = LENGTH

    def __len__(self) -> int:
        return len(self.found.rows)

    def __getitem__(self, index: int) -> list[int]:
        first, end, _ = self.found.rows[index].tolist()
        return np.concatenate([self.found.reader.get(number) for number in range(first, end)]).tolist()


HOW = SentenceSamples("bert", LENGTH - 3, 2, 0.1, lambda found, _: Sentences(found))


@pytest.fixture
def make(tmp_path):
    def make(train_samples=None, how=HOW, **settings):
        settings = {"sequence_length": LENGTH, "cache_directory": str(tmp_path / "cache")} | settings
        return open_sentences(DataConfig.model_validate(settings), how, seed=SEED, train_samples=train_samples)

    return make


def write_sentences(prefix, num_documents, seed=0):
    random = np.random.default_rng(seed)
    with IndexedWriter(str(prefix), np.dtype(np.uint16)) as writer:
        for _ in range(num_documents):
            for _ in range(random.integers(1, 7)):
                writer.add_item(random.integers(0, 256, random.integers(1, 20)).astype(np.uint16))
            writer.end_document()
    return str(prefix)


def test_files_of_sentences_are_megatrons_mapping_of_their_share_of_documents(make, tmp_path):
    prefix = write_sentences(tmp_path / "text", 100)
    data, reader = make(train_samples=150, path=prefix, split="80,20,0"), IndexedReader(prefix)
    for part, samples, found in ((0, 150, data.train), (1, None, data.validation)):
        share = split_ranges("80,20,0", 100)[part]
        rows = build_mapping(
            reader.documents[share.start : share.stop + 1],
            reader.lengths,
            max_length=LENGTH - 3,
            min_sentences=2,
            short_probability=0.1,
            seed=SEED,
            num_samples=samples,
            num_epochs=None if samples else 1,
        )
        expected = Sentences(SentenceRows(reader, rows, reader.documents))
        assert len(found) == len(rows)
        assert all(found[number] == expected[number] for number in range(len(rows)))
    assert len(data.train) >= 150 and len(data.test) == 0 and data.is_ordered


def test_lines_of_text_are_sentences_and_its_end_is_for_validation(make, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [[f"{name} line {number}" for number in range(40)] for name in "ab"]
    for name, own in zip("ab", lines, strict=True):
        (folder / f"{name}.txt").write_text("\n\n".join(own) + "\n   \n")
    data = make(path=str(folder), validation_fraction=0.25)
    texts = [
        "".join(map(chr, source[index])) for source in (data.train, data.validation) for index in range(len(source))
    ]
    assert "".join(sorted("".join(texts))) == "".join(sorted("".join(line for own in lines for line in own)))
    # a document of two files is never one sample, and the last quarter is of the second
    assert not any("a line" in text and "b line" in text for text in texts)
    later = {data.validation[index][0] for index in range(len(data.validation))}
    assert later == {ord("b")} and len(data.validation) < len(data.train) / 2


def test_a_line_too_long_for_megatron_is_several_sentences(make, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("x" * (2 * LONGEST_SENTENCE + 5) + "\nshort\nshort\n")
    source = make(path=str(path), validation_fraction=0).train
    assert sum(len(source[index]) for index in range(len(source))) == 2 * LONGEST_SENTENCE + 15


def test_a_blend_takes_from_each_by_its_weight(make, tmp_path):
    prefixes = [write_sentences(tmp_path / name, 60, seed) for seed, name in enumerate("ab")]
    source = make(train_samples=100, path=["0.8", prefixes[0], "0.2", prefixes[1]], split="1,0,0").train
    assert source.blend.datasets[:100].tolist().count(0) == 80
    assert len(source) == 100 and all(source[index] for index in range(100))


def test_a_fingerprint_is_of_samples_and_their_order(make, tmp_path):
    prefix = write_sentences(tmp_path / "text", 60)
    one = make(train_samples=50, path=prefix)
    again = make(train_samples=50, path=prefix)
    others = [
        make(train_samples=5000, path=prefix),
        make(train_samples=50, path=prefix, split="90,10,0"),
        make(train_samples=50, path=prefix, how=SentenceSamples("bert", 20, 2, 0.1, HOW.make)),
        make(train_samples=50, path=prefix, how=SentenceSamples("bert", LENGTH - 3, 2, 0.1, HOW.make, "other masks")),
        make(train_samples=50, path=write_sentences(tmp_path / "other", 60, 1)),
    ]
    assert one.fingerprint == again.fingerprint
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "chat"}, "data.format chat has no sentences, which model.family bert reads"),
        ({"tokenizer": "characters"}, "data.tokenizer characters makes its vocabulary from text"),
        ({"reset_attention": True}, "data.reset_attention true has no effect"),
        ({"path": "nowhere.txt"}, "no such file or folder nowhere.txt"),
    ],
)
def test_what_has_no_sentences_is_refused(make, settings, message):
    with pytest.raises((UserError, NoEffect), match=message):
        make(**settings)


def test_text_without_pairs_is_refused(make, tmp_path):
    (tmp_path / "one.txt").write_text("a single line\n")
    with pytest.raises(UserError, match="none of 1 documents has 2 sentences"):
        make(path=str(tmp_path / "one.txt"), validation_fraction=0)
    (tmp_path / "blank.txt").write_text("\n  \n")
    with pytest.raises(UserError, match="no line of text in"):
        make(path=str(tmp_path / "blank.txt"))


VOCABULARY = BertVocabulary(classify=300, separate=301, mask=302, pad=303, size=256)


def next_sentences(prefix, masking=None):
    reader = IndexedReader(prefix)
    rows = build_mapping(
        reader.documents, reader.lengths, max_length=61, min_sentences=2, short_probability=0.1, seed=SEED
    )
    masking = masking or Masking()
    given = {"sequence_length": 64, "vocabulary": VOCABULARY, "seed": SEED, "masking": masking}
    return NextSentenceSource(reader, rows, reader.documents, **given), BertSource(reader, rows, **given), reader, rows


def test_half_of_the_second_parts_are_of_another_document(tmp_path):
    prefix = str(tmp_path / "text")
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for document in range(200):
            for _ in range(4):
                writer.add_item(np.full(10, document, np.uint16))
            writer.end_document()
    source, *_ = next_sentences(prefix)
    samples = [source[index] for index in range(len(source))]
    for sample in samples:
        first, second = (
            set(sample.targets[(sample.token_types == kind) & ~sample.padding].tolist()) - {300, 301} for kind in (0, 1)
        )
        assert len(first) == len(second) == 1 and (first != second) == sample.is_swapped
    share = np.mean([sample.is_swapped for sample in samples])
    assert 0.4 < share < 0.6
    again, *_ = next_sentences(prefix)
    assert all(np.array_equal(again[index].tokens, sample.tokens) for index, sample in enumerate(samples[:20]))


def test_where_there_is_one_document_alone_the_second_part_follows(tmp_path):
    prefix = str(tmp_path / "text")
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for number in range(60):
            writer.add_item(np.arange(number, number + 10, dtype=np.uint16))
        writer.end_document()
    source, *_ = next_sentences(prefix)
    assert not any(source[index].is_swapped for index in range(len(source)))
