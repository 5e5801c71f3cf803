"""Texts and what is to be written of each: conversations of JSON lines, whose last answer the decoder writes."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from jaxtron.config import NoEffect, UserError
from jaxtron.data.chat.pairs import read_pairs
from jaxtron.data.config import ChatConfig, DataConfig
from jaxtron.data.dataset import Data, load_data_tokenizer
from jaxtron.data.files.data_path import read_data_path
from jaxtron.data.files.reader import find_files
from jaxtron.data.files.storage import cache_root
from jaxtron.data.masked.sample import SpanSample, pad
from jaxtron.data.masked.spans import SpanVocabulary
from jaxtron.data.source import NO_SAMPLES
from jaxtron.models.t5.batch import T5Batch, from_sample
from jaxtron.words import plural

# of `data.chat` what is read; the rest is for templates
READ = ("roles", "too_long", "max_dropped")
# of a hash that says on which side a pair is
BYTES = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """Ids of a text and of its answer, each with the end; and a hash of what they say."""

    text: Int32[np.ndarray, "S"]
    answer: Int32[np.ndarray, "T"]
    digest: bytes


@dataclass(frozen=True)
class PairSource:
    """A sample a pair, for sequences of these lengths."""

    pairs: Sequence[Pair]
    sequence_length: int
    decoder_length: int
    vocabulary: SpanVocabulary

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> T5Batch:
        pair, fill = self.pairs[index], self.vocabulary.pad
        tokens, encoder_padding = pad(pair.text, self.sequence_length, fill)
        targets, decoder_padding = pad(pair.answer, self.decoder_length, fill)
        before = np.concatenate([[self.vocabulary.begin], pair.answer[:-1]])
        decoder_tokens, _ = pad(before, self.decoder_length, fill)
        weights = (~decoder_padding).astype(np.float32)
        return from_sample(SpanSample(tokens, encoder_padding, decoder_tokens, targets, weights, decoder_padding))


def open_pairs(config: DataConfig, *, vocabulary: SpanVocabulary, decoder_length: int, seed: int) -> Data:
    """The pairs of the files that the settings name; `UserError` for bad input, or where too many are left out.

    Turns before the last answer are the text, one after the other with a line's end between. What is longer than its
    sequence is left out, or of a text the end cut (`data.chat.too_long`). A hash of what a pair says decides whether it
    is for validation.
    """
    for name, field in ChatConfig.model_fields.items():
        value = getattr(config.chat, name)
        if name not in READ and value != field.default:
            raise NoEffect(f"data.chat.{name}", value, {"model.family": "t5"}, "leave it out")
    tokenizer = load_data_tokenizer(config)
    files = find_files(read_data_path(config.path, "data.path").files(), cache=cache_root(config.cache_directory))
    kept: list[Pair] = []
    count = 0
    for text, answer in _texts(files, config.chat):
        count += 1
        ids, target = (np.append(tokenizer.encode(side), vocabulary.end).astype(np.int32) for side in (text, answer))
        if config.chat.too_long == "truncate" and len(ids) > config.sequence_length:
            ids = np.append(ids[: config.sequence_length - 1], np.int32(vocabulary.end))
        if len(ids) <= config.sequence_length and len(target) <= decoder_length:
            digest = hashlib.sha256(f"{len(text)} {text} {answer}".encode()).digest()
            kept.append(Pair(ids, target, digest))
    if count - len(kept) > config.chat.max_dropped * count or not kept:
        raise UserError(
            f"{plural(count - len(kept), 'pair')} of {count:,} are longer than data.sequence_length "
            f"{config.sequence_length} or model.decoder_length {decoder_length}; raise them, or data.chat.max_dropped "
            f"{config.chat.max_dropped}"
        )
    bound = round(config.validation_fraction * 256**BYTES)
    of_validation = [int.from_bytes(pair.digest[:BYTES]) < bound for pair in kept]
    sides = {
        side: [pair for pair, own in zip(kept, of_validation, strict=True) if own == side] for side in (True, False)
    }
    if not sides[False]:
        raise UserError(
            f"{plural(len(kept), 'pair')} leave none to train on beside data.validation_fraction "
            f"{config.validation_fraction}; give more, or set --data.validation_fraction 0"
        )
    given = (config.sequence_length, decoder_length, vocabulary)
    said = b"".join(pair.digest for pair in kept)
    identity = f"{hashlib.sha256(said).hexdigest()} {tokenizer.fingerprint} {given} {config.validation_fraction}"
    return Data(
        config=config,
        seed=seed,
        train=PairSource(sides[False], *given),
        validation=PairSource(sides[True], *given) if sides[True] else NO_SAMPLES,
        tokenizer=tokenizer,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        notes=(f"pairs: {count:,} read, {len(kept):,} kept",),
    )


def _texts(files: Sequence[Path], chat: ChatConfig) -> Iterator[tuple[str, str]]:
    """What comes before the last answer of each conversation, and that."""
    for file in files:
        for pair in read_pairs(file, chat.roles):
            yield pair.text, pair.answer
