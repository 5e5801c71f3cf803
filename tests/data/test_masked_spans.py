"""Random spans and UL2's mixture: the text comes back, the counts and shares are those asked for."""

from collections import Counter

import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.data.masked.spans import SpanVocabulary, fitting_spans, random_spans, take_out
from jaxtron.data.masked.ul2 import Denoiser, Ul2Source, ul2_denoisers
from jaxtron.data.window_source import WindowSource
from tests.support.spans_put_back import put_back

VOCABULARY = SpanVocabulary(begin=1, end=2, pad=0, sentinels=tuple(range(500, 600)))
REGULAR, EXTREME, SEQUENTIAL = 3, 4, 5
DENOISERS = ul2_denoisers(regular=REGULAR, extreme=EXTREME, sequential=SEQUENTIAL)


def ul2_source(*, denoisers=DENOISERS, length=128, samples=700, vocabulary=VOCABULARY, **settings):
    tokens = np.random.RandomState(0).randint(10, 500, length * samples - 20)
    source = WindowSource(tokens, sequence_length=length, pad_last=True)
    settings = {"encoder_length": length + 1, "decoder_length": length, "seed": 7} | settings
    return Ul2Source(source, denoisers, vocabulary=vocabulary, **settings), tokens


@pytest.mark.parametrize(("length", "rate", "mean"), [(2, 0.5, 3), (512, 0.15, 3), (512, 0.5, 64), (63, 0.9, 2)])
def test_spans_hold_the_tokens_asked_for_and_are_apart(length, rate, mean):
    for seed in range(50):
        spans = random_spans(length, rate=rate, mean_length=mean, rng=np.random.RandomState(seed))
        bounds = np.concatenate([[0], spans.ravel()])
        assert (np.diff(bounds) > 0).all() and bounds[-1] == length
        taken = min(max(round(length * rate), 1), length - 1)
        assert (spans[:, 1] - spans[:, 0]).sum() == taken
        assert len(spans) == min(max(round(taken / mean), 1), length - taken)


def test_every_division_is_equally_likely():
    # 4 tokens in 2 spans: 1+3, 2+2, 3+1; the gaps likewise
    seen = Counter()
    for seed in range(9000):
        spans = random_spans(8, rate=0.5, mean_length=2, rng=np.random.RandomState(seed))
        seen[tuple(spans.ravel().tolist())] += 1
    assert len(seen) == 9
    # 1000 each, standard deviation 30
    assert all(abs(count - 1000) < 4 * 30 for count in seen.values())


def test_an_example_by_hand():
    text = np.array([10, 11, 12, 13, 14, 15])
    spans = np.array([[1, 3], [3, 4]])
    sample = take_out(text, spans, vocabulary=VOCABULARY, encoder_length=7, decoder_length=8, prefix=(9,))
    assert sample.encoder_tokens.tolist() == [9, 10, 500, 501, 14, 15, 0]
    assert sample.encoder_padding.tolist() == [False] * 6 + [True]
    assert sample.decoder_tokens.tolist() == [1, 500, 11, 12, 501, 13, 0, 0]
    assert sample.targets.tolist() == [500, 11, 12, 501, 13, 2, 0, 0]
    assert sample.weights.tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert put_back(sample, VOCABULARY).tolist() == [9, *text]


def test_spans_are_kept_as_long_as_they_fit():
    spans = np.array([[0, 2], [3, 4], [6, 9]])
    for decoder_length, kept in ((3, 0), (4, 1), (5, 1), (6, 2), (9, 2), (10, 3)):
        assert len(fitting_spans(spans, num_sentinels=9, decoder_length=decoder_length)) == kept
    assert len(fitting_spans(spans, num_sentinels=2, decoder_length=99)) == 2


def test_ul2_gives_the_text_back_after_its_mode_token():
    source, tokens = ul2_source()
    texts = []
    for sample in (source[i] for i in range(len(source))):
        text = put_back(sample, VOCABULARY)
        assert text[0] in (REGULAR, EXTREME, SEQUENTIAL)
        texts.append(text[1:])
    # a stream's last token is only ever a target
    np.testing.assert_array_equal(np.concatenate(texts), tokens[:-1])


def test_modes_come_as_often_as_their_weights_say_and_corrupt_as_they_should():
    denoisers = ul2_denoisers(regular=REGULAR, extreme=EXTREME, sequential=SEQUENTIAL, weights=(0.25, 0.25, 0.5))
    source, _ = ul2_source(denoisers=denoisers, length=64)
    modes, suffixes = Counter(), []
    for sample in (source[i] for i in range(len(source) - 1)):
        mode = int(sample.encoder_tokens[0])
        modes[mode] += 1
        targets = sample.targets[sample.weights > 0]
        spans = int((targets >= 500).sum())
        taken = len(targets) - spans - 1
        if mode == REGULAR:
            assert taken == 10 and spans in (3, 1)
        elif mode == EXTREME:
            assert taken in (32, 10)
        else:
            # one span, at the end
            assert spans == 1 and sample.encoder_tokens[~sample.encoder_padding][-1] == 500
            suffixes.append(taken)
    for mode, share in ((REGULAR, 0.25), (EXTREME, 0.25), (SEQUENTIAL, 0.5)):
        assert abs(modes[mode] - 699 * share) < 4 * (699 * share * (1 - share)) ** 0.5
    # uniform over 1 to 31: mean 16, standard deviation 8.9
    assert min(suffixes) >= 1 and max(suffixes) <= 31
    assert abs(np.mean(suffixes) - 16) < 4 * 8.9 / len(suffixes) ** 0.5


def test_whatever_is_drawn_fits_the_lengths_that_pass():
    for length in (2, 3, 17, 64, 200):
        need = max(denoiser.decoder_length(length) for denoiser in DENOISERS)
        source, _ = ul2_source(length=length, samples=60, decoder_length=need)
        used = max(int(source[i].weights.sum()) for i in range(len(source)))
        assert used <= need
        with pytest.raises(UserError, match=f"decoder_length {need - 1} is too small .* at least {need}"):
            ul2_source(length=length, samples=60, decoder_length=need - 1)


def test_settings_that_cannot_be_are_errors():
    with pytest.raises(UserError, match="encoder_length 128 is too small for texts of 128 tokens; give at least 129"):
        ul2_source(encoder_length=128)
    with pytest.raises(UserError, match="sentinels 1 is too small"):
        ul2_source(vocabulary=SpanVocabulary(begin=1, end=2, pad=0, sentinels=(500,)))
    with pytest.raises(UserError, match="0 denoisers"):
        ul2_source(denoisers=())
    with pytest.raises(UserError, match="takes out 1.5 of the tokens"):
        Denoiser(rate=1.5, mean_length=3)
