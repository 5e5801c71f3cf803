"""Windows, and the figures that follow from a sum of log-likelihoods."""

import math

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxtron.data.source import Source
from jaxtron.data.tokenizers import ByteTokenizer, CharacterTokenizer, HuggingFaceTokenizer
from jaxtron.evaluate.perplexity import OverlappingWindows, Score, num_words, unknown_characters


def plainly(num_tokens: int, length: int, stride: int) -> dict[int, tuple[int, ...]]:
    """By the place of every scored token those of its context: the definition, a token at a time."""
    found, scored, start = {}, 1, 0
    while scored < num_tokens:
        for place in range(scored, min(start + length, num_tokens - 1) + 1):
            found[place] = tuple(range(start, place))
            scored = place + 1
        start += stride
    return found


@pytest.mark.parametrize("num_tokens", [2, 3, 8, 9, 10, 16, 17, 18, 41])
@pytest.mark.parametrize("stride", [1, 3, 5, 8])
def test_every_token_but_the_first_is_scored_once(num_tokens: int, stride: int):
    """Tokens are their own places here, so that a window shows which it has; 8 to a sequence."""
    windows = OverlappingWindows(np.arange(num_tokens), sequence_length=8, stride=stride)
    assert isinstance(windows, Source)
    found = {}
    for sample in map(windows.__getitem__, range(len(windows))):
        assert sample.tokens.shape == sample.targets.shape == sample.weights.shape == (8,)
        assert sample.weights.any() and set(sample.weights) <= {0, 1}
        for place in np.flatnonzero(sample.weights):
            target = int(sample.targets[place])
            assert target not in found
            found[target] = tuple(sample.tokens[: place + 1].tolist())
    assert found == plainly(num_tokens, 8, stride)
    assert sorted(found) == list(range(1, num_tokens))
    assert all(len(context) > 8 - stride for target, context in found.items() if target > 8)
    with pytest.raises(IndexError, match="window"):
        windows[len(windows)]


def test_figures():
    """By hand: 6 nats over 4 tokens of 3 words."""
    score = Score(nll=6.0, tokens=5, words=3, text_bytes=12)
    assert score.nll_per_token == 1.5 and score.perplexity == pytest.approx(math.exp(1.5))
    assert score.bits_per_byte == pytest.approx(6 / math.log(2) / 12)
    assert score.token_ratio == 2 and score.word_perplexity == pytest.approx(math.exp(6 / 2))
    assert Score(nll=200.0, tokens=5, words=3, text_bytes=12).word_perplexity == math.exp(20)
    assert Score(nll=6.0, tokens=5, words=1, text_bytes=12).word_perplexity is None


def test_words_are_what_single_spaces_separate():
    # WikiText's line ends stand between spaces, and count
    assert num_words(" = Title = \n a b ") == 6
    assert num_words("a  b\nc") == 3


def test_characters_unknown_to_a_tokenizer(tmp_path):
    word_level = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    word_level.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    dropping = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    for name, tokenizer in (("unk", word_level), ("dropping", dropping)):
        tokenizer.save(str(tmp_path / f"{name}.json"))
        found = unknown_characters("a ab\nßaßé", HuggingFaceTokenizer(tmp_path / f"{name}.json"))
        assert found == {"ß": 2, "é": 1}
    for knowing in (ByteTokenizer(), CharacterTokenizer("ab")):
        assert unknown_characters("ab", knowing) == {}
