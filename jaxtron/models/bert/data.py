"""BERT's samples: of sentences, and of text that is there as windows."""

import functools
import json
from dataclasses import dataclass

import numpy as np

from jaxtron.config import UserError
from jaxtron.data.config import DataConfig
from jaxtron.data.dataset import Data, wrapped
from jaxtron.data.dataset import open_data as open_windows
from jaxtron.data.masked.bert import (
    SPECIAL_TOKENS,
    BertSource,
    BertVocabulary,
    make_bert_sample,
    make_pair,
    truncate_pair,
)
from jaxtron.data.masked.next_sentence import NextSentenceSource
from jaxtron.data.masked.ngrams import Masking
from jaxtron.data.masked.sentences import SentenceRows, SentenceSamples, open_sentences
from jaxtron.data.source import Source
from jaxtron.data.tokenizers import Tokenizer
from jaxtron.models.bert.batch import BertBatch, from_sample
from jaxtron.models.bert.config import BertConfig
from jaxtron.models.encoder.special_tokens import special_tokens
from jaxtron.models.encoder.windows import WindowSamples


def vocabulary_of(config: BertConfig, tokenizer: Tokenizer | None) -> BertVocabulary:
    """The special tokens that the tokenizer has by name, or the last ids of the model's vocabulary."""
    return special_tokens(config.vocab_size, tokenizer, whole_words=config.masking.whole_words)


def masking_of(config: BertConfig) -> Masking:
    """What of a sample is masked."""
    return Masking(probability=config.masking.probability, max_ngram=config.masking.max_ngram)


@dataclass(frozen=True)
class MaskedTexts:
    """Samples of `data/masked` as this family reads them."""

    source: BertSource | NextSentenceSource
    config: BertConfig
    tokens: int
    """What ids are below."""

    @property
    def sequence_length(self) -> int:
        """Tokens of a sample, special ones and padding among them."""
        return self.source.sequence_length

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> BertBatch:
        sample = self.source[index]
        if sample.targets.min() < 0 or sample.targets.max() >= self.tokens:
            wrong = sample.targets[(sample.targets < 0) | (sample.targets >= self.tokens)][0]
            raise UserError(
                f"the data has the id {wrong}, but ids here are 0 to {self.tokens - 1}; give the tokenizer that made "
                "it, or make it again"
            )
        return from_sample(sample, has_pair=self.config.pairs != "none")


@dataclass(frozen=True)
class WindowsAsPairs(WindowSamples):
    """Windows of a text as masked pairs: what each has of tokens that weigh, cut in two at a random place.

    Sample i draws from `RandomState(i)`.
    """

    config: BertConfig
    vocabulary: BertVocabulary

    def __getitem__(self, index: int) -> BertBatch:
        rng = np.random.RandomState(index % 2**32)
        room = self.sequence_length - SPECIAL_TOKENS
        text = self.text(index)
        has_pair = self.config.pairs != "none" and len(text) > 1
        a, b, is_swapped = text, None, False
        if has_pair:
            a, b, is_swapped = make_pair(np.split(text, np.arange(1, len(text))), rng)
            if self.config.pairs == "next" and is_swapped:
                # in its place some other text follows
                a, b = b, self.text(int(rng.randint(len(self))))
        a, b = truncate_pair(a, b, room, rng)
        sample = make_bert_sample(
            a,
            b,
            is_swapped=is_swapped,
            sequence_length=self.sequence_length,
            target_length=room,
            vocabulary=self.vocabulary,
            masking=masking_of(self.config),
            rng=rng,
        )
        return from_sample(sample, has_pair=has_pair)


def samples_of_text(config: BertConfig, source: Source, tokenizer: Tokenizer | None) -> Source:
    """Windows of text as this family reads them."""
    return WindowsAsPairs(source, config, vocabulary_of(config, tokenizer))


def open_data(config: BertConfig, data: DataConfig, *, seed: int, train_samples: int | None) -> Data:
    """Masked pairs of sentences from Megatron's files or from text; counted tokens (mock) as windows."""
    if data.format == "mock":
        found = open_windows(data, seed=seed, train_samples=train_samples)
        return wrapped(found, lambda source: samples_of_text(config, source, found.tokenizer))
    samples = SentenceSamples(
        family=config.family,
        max_length=data.sequence_length - SPECIAL_TOKENS,
        min_sentences=1 if config.pairs == "none" else 2,
        short_probability=config.masking.short_probability,
        make=functools.partial(_make, config, data.sequence_length, seed),
        identity=json.dumps([config.pairs, config.masking.model_dump(mode="json"), config.vocab_size]),
    )
    return open_sentences(data, samples, seed=seed, train_samples=train_samples)


def _make(config: BertConfig, length: int, seed: int, found: SentenceRows, tokenizer: Tokenizer) -> Source:
    vocabulary = vocabulary_of(config, tokenizer)
    given = {"sequence_length": length, "vocabulary": vocabulary, "seed": seed, "masking": masking_of(config)}
    if config.pairs == "next":
        source = NextSentenceSource(found.reader, found.rows, found.documents, **given)
    else:
        source = BertSource(found.reader, found.rows, pairs=config.pairs == "order", **given)
    return MaskedTexts(source, config, config.vocab_size)
