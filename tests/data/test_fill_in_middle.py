"""Fill-in-the-middle: every cut document can be put together again, at the rates asked for."""

import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.data.megatron.boundaries import Boundaries
from jaxtron.data.megatron.fill_in_middle import FillInMiddle, FillInMiddleSource, fill_in_middle
from jaxtron.data.source import Source
from jaxtron.data.tokenizers import ByteTokenizer
from jaxtron.data.window_source import WindowSource

PREFIX, MIDDLE, SUFFIX, FILE, END = 301, 302, 303, 304, 256


def settings(**changes):
    return FillInMiddle(**{"prefix": PREFIX, "middle": MIDDLE, "suffix": SUFFIX, "end_of_document": END} | changes)


def cut(text, seed=0, tokenizer=None, **changes):
    given = np.array(text, np.int32)
    return fill_in_middle(given, settings(**changes), rng=np.random.RandomState(seed), tokenizer=tokenizer).tolist()


def uncut(document):
    """What a document was before it was cut, and how that was done."""
    if PREFIX not in document:
        return document, "whole"
    assert document[0] == PREFIX and sorted(document).count(PREFIX) == 1
    suffix_at, middle_at = document.index(SUFFIX), document.index(MIDDLE)
    before, suffix, after = document[1:suffix_at], document[suffix_at + 1 : middle_at], document[middle_at + 1 :]
    # SPM has prefix and middle together at the end
    return [*before, *after, *suffix], "SPM" if suffix_at == 1 else "PSM"


def split(tokens, end):
    parts = [[]]
    for token in tokens:
        if token == end:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def test_both_forms_by_hand():
    outcomes = {tuple(cut([10, 11, 12, 13, 14], seed, rate=1)) for seed in range(1000)}
    assert (PREFIX, 10, SUFFIX, 14, MIDDLE, 11, 12, 13) in outcomes
    assert (PREFIX, SUFFIX, 14, MIDDLE, 10, 11, 12, 13) in outcomes
    # 21 pairs of cuts as PSM; SPM shows the second cut only, and PSM with nothing before the first looks the same
    assert len(outcomes) == 21 and sum(outcome[1] == SUFFIX for outcome in outcomes) == 6


def test_every_document_is_put_together_again_and_ends_stay():
    random = np.random.RandomState(1)
    for seed in range(200):
        text = random.randint(0, 256, 60)
        text[random.rand(60) < 0.1] = END
        result = cut(text, seed, rate=0.7)
        before, after = split(text.tolist(), END), split(result, END)
        assert [uncut(document)[0] for document in after] == before
        num_cut = sum(PREFIX in document for document in after)
        assert len(result) == 60 + 3 * num_cut


def test_documents_are_cut_at_the_rates_asked_for():
    text = ([7, 8, 9, 10] * 10 + [END]) * 4000
    forms = [uncut(document)[1] for document in split(cut(text, rate=0.3, spm_rate=0.8), END)[:-1]]
    # PSM with an empty prefix, 81 of 41 * 41 cuts, looks like SPM
    for form, share in (("whole", 0.7), ("SPM", 0.3 * (0.8 + 0.2 * 81 / 1681)), ("PSM", 0.3 * 0.2 * (1 - 81 / 1681))):
        assert abs(forms.count(form) - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5


def test_rates_of_nothing_and_everything():
    text = [1, 2, 3, END, 4, 5, END]
    assert cut(text, rate=0) == text
    assert all(uncut(document)[1] != "whole" for document in split(cut(text, rate=1), END)[:-1])
    # an empty document has nothing to cut
    assert cut([END, END], rate=1) == [END, END]


def test_fragments_are_cut_one_by_one():
    text = [1, 2, 3, FILE, 4, 5, 6, FILE, FILE, 7, 8, END, 9, 9, 9]
    seen = set()
    for seed in range(200):
        result = cut(text, seed, rate=0.5, fragment=FILE, fragment_rate=0.5)
        first, last = split(result, END)
        fragments = [uncut(fragment) for fragment in split(first, FILE)]
        assert [fragment for fragment, _ in fragments] == [[1, 2, 3], [4, 5, 6], [], [7, 8]]
        assert uncut(last)[0] == [9, 9, 9]
        seen.add(sum(form != "whole" for _, form in fragments))
    assert seen == {0, 1, 2, 3}


def test_what_starts_as_told_is_left_alone():
    for seed in range(20):
        result = cut([1, 2, 3, 4, END, 1, 3, 4, 5], seed, rate=1, untouched=(1, 2))
        assert result[:5] == [1, 2, 3, 4, END] and PREFIX in result[5:]


class PairTokenizer(ByteTokenizer):
    """Two characters a token, as long as there are two: cutting elsewhere gives other tokens."""

    def encode(self, text):
        codes = [ord(character) for character in text]
        pairs = [1000 + 256 * codes[i] + codes[i + 1] for i in range(0, len(codes) - 1, 2)]
        return np.array([*pairs, *codes[len(codes) - len(codes) % 2 :]], np.int64)

    def decode(self, ids):
        return "".join(
            chr((token - 1000) // 256) + chr((token - 1000) % 256) if token >= 1000 else chr(token)
            for token in np.asarray(ids).tolist()
        )


class SpacingTokenizer(ByteTokenizer):
    """Puts a space before all that it encodes, and takes only the first away again."""

    def encode(self, text):
        return super().encode(" " + text) if text else super().encode(text)

    def decode(self, ids):
        return super().decode(ids).removeprefix(" ")


def test_with_a_tokenizer_cuts_fall_between_characters():
    tokenizer = PairTokenizer()
    odd = 0
    for seed in range(100):
        result = cut(tokenizer.encode("the quick brown fox"), seed, tokenizer=tokenizer, rate=1)
        restored, _ = uncut(result)
        assert tokenizer.decode(restored) == "the quick brown fox"
        odd += len(result) > 3 + 10
    assert odd > 20


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        # begins inside a character of three bytes
        (ByteTokenizer(), [*"€uro".encode()[1:]]),
        (SpacingTokenizer(), [*b" some words"]),
    ],
)
def test_where_characters_cannot_be_kept_the_cut_is_between_tokens(tokenizer, text):
    for seed in range(50):
        assert uncut(cut(text, seed, tokenizer=tokenizer, rate=1))[0] == text


def source(*, tokens=None, boundaries=None, pad_last=True, **changes):
    if tokens is None:
        tokens = np.random.RandomState(0).randint(0, 256, 1000)
        tokens[::37] = END
    inner = WindowSource(tokens, sequence_length=64, pad_last=pad_last)
    return FillInMiddleSource(inner, settings(**changes), seed=3, boundaries=boundaries), inner


def test_samples_keep_their_length_and_their_targets_are_one_ahead():
    wrapped, inner = source(rate=1)
    assert isinstance(wrapped, Source)
    assert len(wrapped) == len(inner) and wrapped.sequence_length == 64
    for index in range(len(wrapped)):
        sample, before = wrapped[index], inner[index]
        assert sample.tokens.shape == (64,) and sample.tokens.dtype == np.int32
        np.testing.assert_array_equal(sample.tokens[1:], sample.targets[:-1])
        np.testing.assert_array_equal(sample.weights, before.weights)
        assert (sample.tokens != before.tokens).any()
        np.testing.assert_array_equal(sample.tokens, wrapped[index].tokens)


def test_boundaries_are_those_of_the_new_text():
    boundaries = Boundaries(END, mask_loss=True, reset_positions=True, reset_attention=True)
    wrapped, _ = source(rate=1, boundaries=boundaries)
    sample = wrapped[0]
    ends = sample.tokens == END
    np.testing.assert_array_equal(sample.weights == 0, ends)
    np.testing.assert_array_equal(sample.segments, np.cumsum(ends) - ends)
    assert sample.positions[0] == 0 and (sample.positions[np.flatnonzero(ends)[:-1] + 1] == 0).all()


def test_a_rate_of_nothing_leaves_the_samples_as_they_were():
    wrapped, inner = source(rate=0, pad_last=True)
    for index in range(len(inner)):
        for name in ("tokens", "targets", "weights"):
            np.testing.assert_array_equal(getattr(wrapped[index], name), getattr(inner[index], name))


def test_settings_that_cannot_be_are_errors():
    with pytest.raises(UserError, match="spm_rate 2"):
        settings(spm_rate=2)
    with pytest.raises(UserError, match="give both or none"):
        settings(fragment_rate=0.5)
    with pytest.raises(UserError, match="give a different one for each"):
        settings(suffix=MIDDLE)
    wrapped, _ = source(boundaries=Boundaries(END, reset_positions=True))
    twice = FillInMiddleSource(wrapped, settings(), seed=1)
    with pytest.raises(UserError, match="give them to it, not to the source it wraps"):
        twice[0]
