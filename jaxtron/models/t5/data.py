"""T5's samples: texts with spans taken out, and which ids its special tokens have."""

import functools
import json
from dataclasses import dataclass, replace

from jaxtron.config import UserError
from jaxtron.data.batch import TokenBatch
from jaxtron.data.config import DataConfig
from jaxtron.data.dataset import Data, load_data_tokenizer, wrapped
from jaxtron.data.dataset import open_data as open_windows
from jaxtron.data.masked.ngrams import Masking
from jaxtron.data.masked.sample import SpanSample
from jaxtron.data.masked.sentences import SentenceRows, SentenceSamples, open_sentences
from jaxtron.data.masked.spans import SpanVocabulary
from jaxtron.data.masked.t5 import SPECIAL_TOKENS, T5_MASKING, T5Source
from jaxtron.data.masked.ul2 import Denoiser, Ul2Source, ul2_denoisers
from jaxtron.data.masked.words import continuations
from jaxtron.data.source import Source
from jaxtron.data.tokenizers import HasPieces, Tokenizer
from jaxtron.models.t5.batch import T5Batch, from_sample
from jaxtron.models.t5.config import T5Config
from jaxtron.models.t5.pairs import open_pairs

# of UL2: what name regular, extreme and sequential denoisers where there are modes
MODES = 3


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of a T5's own, and of its denoisers' modes: none without."""

    vocabulary: SpanVocabulary
    modes: tuple[int, ...] = ()


def special_tokens(config: T5Config, tokenizer: Tokenizer | None) -> SpecialTokens:
    """Those that the tokenizer has by name; one without <extra_id_0> gets the last ids of the model's vocabulary.

    With the padding the decoder begins too. Without a tokenizer the model's vocabulary is all that is known.
    `UserError` where some are missing, or no ids are left.
    """
    if tokenizer is not None and tokenizer.token_id("<extra_id_0>") is not None:
        return _of_tokenizer(config, tokenizer)
    return _behind(config, tokenizer)


def _of_tokenizer(config: T5Config, tokenizer: Tokenizer) -> SpecialTokens:
    """By their names; modes, which have none, come after all of its tokens."""
    asked, modes = config.denoising.sentinels, MODES * config.denoising.modes
    found = [tokenizer.token_id(f"<extra_id_{number}>") for number in range(asked)]
    sentinels = tuple(number for number in found if number is not None)
    pad, end = tokenizer.token_id("<pad>"), tokenizer.end_of_document
    if len(sentinels) < asked or pad is None or end is None:
        missing = "<pad>" if pad is None else "</s>" if end is None else f"<extra_id_{found.index(None)}>"
        raise UserError(f"the tokenizer has <extra_id_0> and no {missing}; give T5's own, or fewer sentinels")
    first = tokenizer.vocab_size
    if first + modes > config.vocab_size:
        raise UserError(
            f"model.vocab_size {config.vocab_size} leaves no ids for {modes} modes beside the tokenizer's {first}; set "
            f"--model.vocab_size {first + modes}"
        )
    vocabulary = SpanVocabulary(begin=pad, end=end, pad=pad, sentinels=sentinels)
    return SpecialTokens(vocabulary, tuple(range(first, first + modes)))


def _behind(config: T5Config, tokenizer: Tokenizer | None) -> SpecialTokens:
    """Downwards from the last: sentinels, padding, modes, and the end of a text where it has none."""
    asked, modes = config.denoising.sentinels, MODES * config.denoising.modes
    text, end = (0, None) if tokenizer is None else (tokenizer.vocab_size, tokenizer.end_of_document)
    needed = asked + 1 + modes + (end is None)
    if config.vocab_size < text + needed:
        raise UserError(
            f"model.vocab_size {config.vocab_size} leaves no ids for {asked} sentinels and what else T5 adds to the "
            f"tokenizer's {text}; set --model.vocab_size {text + needed}"
        )
    ids = tuple(range(config.vocab_size - 1, config.vocab_size - 1 - needed, -1))
    vocabulary = SpanVocabulary(
        begin=ids[asked], end=ids[-1] if end is None else end, pad=ids[asked], sentinels=ids[:asked]
    )
    return SpecialTokens(vocabulary, ids[asked + 1 : asked + 1 + modes])


def denoisers_of(config: T5Config, special: SpecialTokens) -> tuple[Denoiser, ...]:
    """How texts are corrupted, each sample by one of these."""
    if config.denoising.objective == "ul2":
        regular, extreme, sequential = special.modes or (None, None, None)
        return ul2_denoisers(regular=regular, extreme=extreme, sequential=sequential)
    return (Denoiser(config.denoising.rate, config.denoising.mean_length),)


@dataclass(frozen=True)
class Shortened:
    """Samples of a text without their last token, where something else comes first."""

    source: Source

    @property
    def sequence_length(self) -> int:
        """One less."""
        return self.source.sequence_length - 1

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> TokenBatch:
        sample: TokenBatch = self.source[index]
        return replace(sample, tokens=sample.tokens[:-1], targets=sample.targets[:-1], weights=sample.weights[:-1])


@dataclass(frozen=True)
class Denoised:
    """Samples of `data/masked` as this family reads them."""

    source: Ul2Source | T5Source
    tokens: int
    """What ids are below."""

    @property
    def sequence_length(self) -> int:
        """Of the encoder."""
        return self.source.encoder_length

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> T5Batch:
        sample: SpanSample = self.source[index]
        for ids in (sample.encoder_tokens, sample.decoder_tokens, sample.targets):
            if ids.min() < 0 or ids.max() >= self.tokens:
                wrong = ids[(ids < 0) | (ids >= self.tokens)][0]
                raise UserError(
                    f"the data has the id {wrong}, but ids here are 0 to {self.tokens - 1}; give the tokenizer that "
                    "made it, or make it again"
                )
        return from_sample(sample)


def samples_of_text(config: T5Config, source: Source, tokenizer: Tokenizer | None) -> Source:
    """Windows of text with spans taken out."""
    if not len(source):
        return source
    special, length = special_tokens(config, tokenizer), source.sequence_length
    texts = Shortened(source) if special.modes else source
    made = Ul2Source(
        texts,
        denoisers_of(config, special),
        encoder_length=length,
        decoder_length=config.decoder_tokens(length),
        vocabulary=special.vocabulary,
        seed=0,
    )
    return Denoised(made, config.vocab_size)


def open_data(config: T5Config, data: DataConfig, *, seed: int, train_samples: int | None) -> Data:
    """Pairs of conversations (data.format chat), sentences without n-grams of words, or windows of text or tokens with
    spans taken out; `UserError` for bad input."""
    if data.format == "chat":
        vocabulary = special_tokens(config, load_data_tokenizer(data)).vocabulary
        decoder_length = config.decoder_tokens(data.sequence_length)
        return open_pairs(data, vocabulary=vocabulary, decoder_length=decoder_length, seed=seed)
    if config.denoising.objective == "words":
        samples = SentenceSamples(
            family=config.family,
            max_length=data.sequence_length - SPECIAL_TOKENS,
            min_sentences=1,
            short_probability=config.denoising.short_probability,
            make=functools.partial(_make_words, config, data.sequence_length, seed),
            identity=json.dumps([config.denoising.model_dump(mode="json"), config.vocab_size]),
        )
        return open_sentences(data, samples, seed=seed, train_samples=train_samples)
    found = open_windows(data, seed=seed, train_samples=train_samples)
    return wrapped(found, lambda source: samples_of_text(config, source, found.tokenizer))


def _make_words(config: T5Config, length: int, seed: int, found: SentenceRows, tokenizer: Tokenizer) -> Source:
    vocabulary = special_tokens(config, tokenizer).vocabulary
    if isinstance(tokenizer, HasPieces):
        ids = (tokenizer.token_id(text) for text in tokenizer.special_texts)
        special = {number for number in ids if number is not None}
        try:
            vocabulary = replace(vocabulary, continues=continuations(tokenizer.pieces, special=special))
        except UserError as error:
            raise UserError(f"{error}: --model.denoising.objective spans") from None
    masking = Masking(config.denoising.rate, T5_MASKING.max_ngram, geometric=True)
    source = T5Source(
        found.reader,
        found.rows,
        encoder_length=length,
        decoder_length=config.decoder_tokens(length),
        vocabulary=vocabulary,
        seed=seed,
        masking=masking,
    )
    return Denoised(source, config.vocab_size)
