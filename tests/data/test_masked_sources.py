"""BERT's and T5's samples: Megatron's own, draw for draw, and what holds for all of them."""

import hashlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.data.masked.bert import BertSource, BertVocabulary, make_bert_sample
from jaxtron.data.masked.mapping import build_mapping
from jaxtron.data.masked.ngrams import Masking, NgramChooser, word_positions
from jaxtron.data.masked.spans import SpanVocabulary
from jaxtron.data.masked.t5 import T5_MASKING, T5Source
from jaxtron.data.masked.words import Spelling, continuations
from jaxtron.data.megatron.indexed import IndexedReader, IndexedWriter
from tests.support.spans_put_back import put_back

SIZE = 1000
CLS, SEP, MASK, PAD, BEGIN, END = 1, 2, 3, 0, 4, 5
CONTINUES = np.arange(SIZE) % 5 < 2
CONTINUES[:10] = False
BERT = BertVocabulary(classify=CLS, separate=SEP, mask=MASK, pad=PAD, size=SIZE, continues=CONTINUES)
T5 = SpanVocabulary(begin=BEGIN, end=END, pad=PAD, sentinels=tuple(range(SIZE, SIZE + 100)), continues=CONTINUES)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    random = np.random.RandomState(0)
    prefix = str(tmp_path_factory.mktemp("sentences") / "text")
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(60):
            for _ in range(random.randint(1, 12)):
                writer.add_item(random.randint(10, SIZE, random.randint(1, 60)))
            writer.end_document()
    return IndexedReader(prefix)


def rows_of(reader, *, max_length, min_sentences=2):
    return build_mapping(
        reader.documents,
        reader.lengths,
        max_length=max_length,
        min_sentences=min_sentences,
        short_probability=0.1,
        seed=1234,
    )


def bert_source(reader, *, sequence_length=128, vocabulary=BERT, pairs=True, **masking):
    rows = rows_of(reader, max_length=sequence_length - 3, min_sentences=1 + pairs)
    return BertSource(
        reader,
        rows,
        sequence_length=sequence_length,
        vocabulary=vocabulary,
        seed=1234,
        masking=Masking(**masking),
        pairs=pairs,
    )


def t5_source(reader, *, encoder_length=128, decoder_length=64, vocabulary=T5, masking=T5_MASKING):
    rows = rows_of(reader, max_length=encoder_length - 2, min_sentences=1)
    return T5Source(
        reader,
        rows,
        encoder_length=encoder_length,
        decoder_length=decoder_length,
        vocabulary=vocabulary,
        seed=1234,
        masking=masking,
    )


def samples_of(source):
    return [source[i] for i in range(len(source))]


# digests of samples made from the same file by Megatron's own functions; with `permute` its n-grams' lengths were drawn
# from the sample's generator, as here
@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        ({}, "231cbdf6234cf698c60d53cf65b283e43c8904be5e00ac0f102df4f185431680"),
        (
            {"sequence_length": 32, "max_ngram": 5, "longer_ngrams": True},
            "4910388729dee58a57b02e43105e84c1759f05220631fd67f767ca84543175a0",
        ),
        (
            {"pairs": False, "vocabulary": BertVocabulary(CLS, SEP, MASK, PAD, SIZE)},
            "9a22dee2c34d7896c7db946385cd02b87b2ffa89c929ec28330c586f4cf253bd",
        ),
        ({"permute": True}, "5cc9c3e38bc2096888f2ceccdf5c9a95c79d093c7e9eee35f360f6c22484a410"),
    ],
)
def test_bert_samples_are_megatrons(reader, settings, digest):
    hashed = hashlib.sha256()
    for sample in samples_of(bert_source(reader, **settings)):
        labels = np.where(sample.weights > 0, sample.targets, -1)
        fields = (sample.tokens, sample.token_types, labels, sample.weights, [sample.is_swapped], ~sample.padding)
        for field in fields:
            hashed.update(np.asarray(field, "<i4").tobytes())
    assert hashed.hexdigest() == digest


def test_t5_samples_are_megatrons(reader):
    hashed = hashlib.sha256()
    for sample in samples_of(t5_source(reader)):
        decoder = sample.weights > 0
        for field in (sample.encoder_tokens[~sample.encoder_padding], sample.decoder_tokens[decoder]):
            hashed.update(field.astype("<i4").tobytes())
        hashed.update(sample.targets[decoder].astype("<i4").tobytes())
    assert hashed.hexdigest() == "232e80b1d768074bc239625848b1b73ce149aa0719c176fae0e812c707be98e5"


def test_a_bert_sample_is_its_sentences_in_order_or_swapped(reader):
    source = bert_source(reader, sequence_length=4096)
    swapped = 0
    rows = rows_of(reader, max_length=4093)
    for sample, (first, end, _) in zip(samples_of(source), rows.tolist(), strict=True):
        original = np.where(sample.weights > 0, sample.targets, sample.tokens)[~sample.padding]
        np.testing.assert_array_equal(original, sample.targets[~sample.padding])
        types = sample.token_types[~sample.padding]
        a, b = original[types == 0][1:-1], original[types == 1][:-1]
        assert original[0] == CLS and original[types == 0][-1] == SEP and original[-1] == SEP
        text = np.concatenate([b, a] if sample.is_swapped else [a, b])
        wanted = np.concatenate([reader.get(i) for i in range(first, end)])
        if len(wanted) <= 4093:
            np.testing.assert_array_equal(text, wanted)
        swapped += sample.is_swapped
    assert 0 < swapped < len(source)


def test_padding_has_no_weight_and_special_tokens_are_never_masked(reader):
    for sample in samples_of(bert_source(reader)):
        masked = sample.weights > 0
        assert not (masked & sample.padding).any()
        assert not np.isin(sample.targets[masked], [CLS, SEP]).any()
        assert (sample.tokens[sample.padding] == PAD).all() and not sample.token_types[sample.padding].any()
        assert sample.tokens.dtype == sample.targets.dtype == np.int32 and sample.weights.dtype == np.float32


def test_as_many_tokens_are_masked_as_the_formula_says(reader):
    # single tokens can always fill the quota
    vocabulary = BertVocabulary(CLS, SEP, MASK, PAD, SIZE)
    source = bert_source(reader, vocabulary=vocabulary)
    for sample, target in zip(samples_of(source), rows_of(reader, max_length=125)[:, 2].tolist(), strict=True):
        length = int((~sample.padding).sum())
        assert sample.weights.sum() == int(min(0.15 * target, max(1, round(0.15 * length))))


def test_whole_words_are_masked_or_none_of_them(reader):
    for sample in samples_of(bert_source(reader)):
        text = np.flatnonzero(~sample.padding & ~np.isin(sample.targets, [CLS, SEP]))
        for word in word_positions(text, CONTINUES[sample.targets[text]]):
            assert len(set(sample.weights[word].tolist())) == 1


def within(count, total, probability):
    """A count that a binomial would miss by this much once in 16,000 times at most (4 standard deviations)."""
    return abs(count - total * probability) <= 4 * (total * probability * (1 - probability)) ** 0.5


def test_masked_tokens_become_the_mask_a_random_one_or_stay():
    text = np.full(1000, 500, np.int32)
    vocabulary = BertVocabulary(CLS, SEP, MASK, PAD, SIZE)
    rng = np.random.RandomState(5)
    tokens = np.concatenate(
        [
            sample.tokens[sample.weights > 0]
            for sample in (
                make_bert_sample(
                    text,
                    None,
                    is_swapped=False,
                    sequence_length=1002,
                    target_length=1002,
                    vocabulary=vocabulary,
                    masking=Masking(probability=0.5),
                    rng=rng,
                )
                for _ in range(40)
            )
        ]
    )
    total = len(tokens)
    assert total == 40 * 501
    # a random token is the mask, or the same, once in SIZE times
    assert within((tokens == MASK).sum(), total, 0.8 + 0.1 / SIZE)
    assert within((tokens == 500).sum(), total, 0.1 + 0.1 / SIZE)
    assert tokens.min() < 100 and tokens.max() > SIZE - 100


@pytest.mark.parametrize(
    ("masking", "shares"),
    [
        (Masking(max_ngram=3), [6 / 11, 3 / 11, 2 / 11]),
        (Masking(max_ngram=3, longer_ngrams=True), [2 / 11, 3 / 11, 6 / 11]),
        (Masking(max_ngram=10, geometric=True), [*(0.2 * 0.8**n for n in range(9)), 0.8**9]),
    ],
)
def test_lengths_of_ngrams_have_their_distribution(masking, shares):
    # the first n-gram of each sequence: no other is in its way; only those at the end are cut
    words = word_positions(np.arange(2000), None)
    lengths = Counter()
    for seed in range(4000):
        ngram = next(NgramChooser(words, masking, np.random.RandomState(seed)).choose(100, taken=set()))
        assert all(after == before + 1 for before, after in pairwise(ngram))
        lengths[len(ngram)] += 1
    assert all(within(lengths[n + 1], 4000, share) for n, share in enumerate(shares))


def test_permuted_tokens_are_the_same_tokens_and_are_predicted(reader):
    plain, permuted = bert_source(reader), bert_source(reader, permute=True)
    moved = 0
    for before, after in zip(samples_of(plain), samples_of(permuted), strict=True):
        extra = (after.weights > 0) & (before.weights == 0)
        assert not ((before.weights > 0) & (after.weights == 0)).any()
        assert sorted(after.tokens[extra]) == sorted(after.targets[extra])
        moved += int((after.tokens[extra] != after.targets[extra]).sum())
    assert moved > 100


def test_t5_gives_the_text_back(reader):
    source = t5_source(reader)
    for sample, (first, end, length) in zip(
        samples_of(source), rows_of(reader, max_length=126, min_sentences=1).tolist(), strict=True
    ):
        text = np.concatenate([reader.get(i) for i in range(first, end)])[:length]
        np.testing.assert_array_equal(put_back(sample, T5), text)
        used = sample.weights > 0
        np.testing.assert_array_equal(used, ~sample.decoder_padding)
        # the decoder's input is its output one later
        np.testing.assert_array_equal(sample.decoder_tokens[used][1:], sample.targets[used][:-1])
        assert sample.decoder_tokens[0] == BEGIN and sample.targets[used][-1] == END
        taken = int((sample.targets[used] < SIZE).sum()) - 1
        assert taken <= min(0.15 * length, max(1, round(0.15 * len(text))))


def test_spans_that_outgrow_the_decoder_or_the_sentinels_stay_in_the_text(reader):
    few = SpanVocabulary(begin=BEGIN, end=END, pad=PAD, sentinels=(SIZE, SIZE + 1), continues=CONTINUES)
    for settings in ({"decoder_length": 9}, {"vocabulary": few}):
        whole, cut = t5_source(reader), t5_source(reader, **settings)
        fewer = 0
        for full, short in zip(samples_of(whole), samples_of(cut), strict=True):
            np.testing.assert_array_equal(put_back(short, T5), put_back(full, T5))
            fewer += short.weights.sum() < full.weights.sum()
        assert fewer > 10


def test_samples_do_not_depend_on_the_order_they_are_read_in(reader):
    first, second = bert_source(reader), bert_source(reader)
    last = len(first) - 1
    np.random.seed(1)
    alone = second[last].tokens
    assert samples_of(first)[last].tokens.tolist() == alone.tolist()
    with pytest.raises(IndexError):
        first[len(first)]


@pytest.mark.parametrize(
    ("pieces", "special", "expected"),
    [
        (["[CLS]", "un", "##aff", "##able", "."], (), [0, 0, 1, 1, 0]),
        (["<s>", "\u2581un", "aff", "able", "\u2581."], (0,), [0, 0, 1, 1, 0]),
        (["<|end|>", "\u0120un", "aff", "\u010a", ""], (0,), [0, 0, 1, 0, 0]),
    ],
)
def test_words_are_found_by_how_pieces_are_spelled(pieces, special, expected):
    assert continuations(pieces, special=special).tolist() == [bool(value) for value in expected]


def test_a_vocabulary_that_shows_no_words_is_an_error_unless_its_spelling_is_given():
    with pytest.raises(UserError, match="none of the 2 pieces"):
        continuations(["a", "b"])
    assert continuations(["a", "b"], spelling=Spelling.WORDPIECE).tolist() == [False, False]


def test_settings_that_cannot_be_are_errors(reader):
    with pytest.raises(UserError, match="probability 1.5"):
        Masking(probability=1.5)
    with pytest.raises(UserError, match="geometric n-grams go with neither"):
        Masking(geometric=True, permute=True)
    with pytest.raises(UserError, match="geometric n-grams are for T5"):
        bert_source(reader, geometric=True)
    with pytest.raises(UserError, match="permuted tokens are for BERT"):
        t5_source(reader, masking=Masking(permute=True))
    with pytest.raises(UserError, match="0 sentinels"):
        t5_source(reader, vocabulary=SpanVocabulary(begin=BEGIN, end=END, pad=PAD, sentinels=()))
    rows = rows_of(reader, max_length=200)
    with pytest.raises(UserError, match="room for 61 tokens of text, but the mapping goes to .* 200 tokens"):
        BertSource(reader, rows, sequence_length=64, vocabulary=BERT, seed=1)
    with pytest.raises(UserError, match="room for 62 tokens of text"):
        T5Source(reader, rows, encoder_length=64, decoder_length=64, vocabulary=T5, seed=1)
    with pytest.raises(UserError, match="a sample of one sentence is no pair"):
        BertSource(reader, rows_of(reader, max_length=61, min_sentences=1), sequence_length=64, vocabulary=BERT, seed=1)
