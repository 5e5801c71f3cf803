"""BERT's samples: two parts of a document in either order, with some of their whole words masked.

The same draws in the same order as Megatron's BERT dataset, so the same samples for the same files and seed.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, Integer

from jaxtron.config import UserError
from jaxtron.data.masked.ngrams import Masking, mask_tokens, word_positions
from jaxtron.data.masked.sample import MaskedSample, pad
from jaxtron.data.megatron.indexed import IndexedReader

SPECIAL_TOKENS = 3
"""`[CLS]`, `[SEP]` and `[SEP]`: what a sample has besides text."""
MASK_PROBABILITY = 0.8
KEEP_PROBABILITY = 0.5
"""Of the masked tokens that do not become `[MASK]`."""


@dataclass(frozen=True)
class BertVocabulary:
    """The special tokens, and which others continue a word (`words.continuations`; None: every token is a word)."""

    classify: int
    separate: int
    mask: int
    pad: int
    size: int
    """Random replacements are drawn from the ids below it; Megatron draws from all of its tokenizer's."""
    continues: Bool[np.ndarray, "V"] | None = None


class BertSource:
    """Masked pairs from a file of sentences, in the order of `rows`; read by several threads at once.

    `rows` are those of `mapping.build_mapping` for `max_length` = sequence length - 3, and at least two sentences for
    pairs. Without pairs a sample is `[CLS] text [SEP]`, the text cut from either end. Sample i draws from
    `RandomState((seed + i) % 2^32)`.
    """

    def __init__(
        self,
        reader: IndexedReader,
        rows: Integer[np.ndarray, "Samples 3"],
        *,
        sequence_length: int,
        vocabulary: BertVocabulary,
        seed: int,
        masking: Masking | None = None,
        pairs: bool = True,
    ):
        masking = Masking() if masking is None else masking
        if masking.geometric:
            raise UserError("geometric n-grams are for T5; BERT's masking draws n with p(n) ~ 1/n")
        _check_rows(reader, rows, most_tokens=sequence_length - SPECIAL_TOKENS)
        if pairs and len(rows) and (rows[:, 1] - rows[:, 0]).min() < 2:
            raise UserError(
                "a sample of one sentence is no pair; build the mapping with min_sentences 2, or ask for none"
            )
        self.sequence_length = sequence_length
        self._reader = reader
        self._rows = rows
        self._vocabulary = vocabulary
        self._seed = seed
        self._masking = masking
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> MaskedSample:
        if not 0 <= index < len(self._rows):
            raise IndexError(f"sample {index} of {len(self._rows)}")
        first, end, target_length = self._rows[index].tolist()
        rng = np.random.RandomState((self._seed + index) % 2**32)
        sentences = [self._reader.get(number) for number in range(first, end)]
        a, b, is_swapped = make_pair(sentences, rng) if self._pairs else (np.concatenate(sentences), None, False)
        a, b = truncate_pair(a, b, target_length, rng)
        return make_bert_sample(
            a,
            b,
            is_swapped=is_swapped,
            sequence_length=self.sequence_length,
            target_length=target_length,
            vocabulary=self._vocabulary,
            masking=self._masking,
            rng=rng,
        )


def make_pair(
    sentences: list[Integer[np.ndarray, "..."]], rng: np.random.RandomState
) -> tuple[Integer[np.ndarray, "A"], Integer[np.ndarray, "B"], bool]:
    """The sentences in two parts, cut at a random place and in half of all cases swapped (the third value)."""
    assert len(sentences) >= 2, "a pair needs two sentences"
    pivot = int(rng.randint(1, len(sentences))) if len(sentences) >= 3 else 1
    is_swapped = bool(rng.random_sample() < 0.5)
    a, b = np.concatenate(sentences[:pivot]), np.concatenate(sentences[pivot:])
    return (b, a, True) if is_swapped else (a, b, False)


def truncate_pair(
    a: Integer[np.ndarray, "A"], b: Integer[np.ndarray, "B"] | None, length: int, rng: np.random.RandomState
) -> tuple[Integer[np.ndarray, "A2"], Integer[np.ndarray, "B2"] | None]:
    """Both cut to `length` tokens together: one at a time from the longer (B if equal), first or last by the toss."""
    begins, ends = [0, 0], [len(a), 0 if b is None else len(b)]
    for toss in rng.random_sample(max(sum(ends) - length, 0)).tolist():
        part = 0 if ends[0] - begins[0] > ends[1] - begins[1] else 1
        if toss < 0.5:
            begins[part] += 1
        else:
            ends[part] -= 1
    return a[begins[0] : ends[0]], None if b is None else b[begins[1] : ends[1]]


def make_bert_sample(
    a: Integer[np.ndarray, "A"],
    b: Integer[np.ndarray, "B"] | None,
    *,
    is_swapped: bool,
    sequence_length: int,
    target_length: int,
    vocabulary: BertVocabulary,
    masking: Masking,
    rng: np.random.RandomState,
) -> MaskedSample:
    """`[CLS] A [SEP] B [SEP]` with words masked, of `masking.count(length, target_length)` tokens at most.

    Of those 80 % become `[MASK]`, 10 % a random token and 10 % stay (Devlin et al. 2019, section 3.1). An empty or
    missing B has no `[SEP]` of its own.
    """
    classify, separate = [vocabulary.classify], [vocabulary.separate]
    parts = [classify, a, separate]
    if b is not None and len(b):
        parts += [b, separate]
    tokens = np.concatenate([np.asarray(part, np.int32) for part in parts])
    types = np.repeat([0, 1], [len(a) + 2, len(tokens) - len(a) - 2])

    def replace(rng: np.random.RandomState) -> int | None:
        if rng.random_sample() < MASK_PROBABILITY:
            return vocabulary.mask
        return None if rng.random_sample() < KEEP_PROBABILITY else int(rng.randint(0, vocabulary.size))

    masked, chosen = mask_tokens(
        tokens,
        word_positions(*_candidates(tokens, vocabulary)),
        masking=masking,
        target_length=target_length,
        rng=rng,
        replace=replace,
    )
    padded, padding = pad(masked, sequence_length, vocabulary.pad)
    return MaskedSample(
        tokens=padded,
        targets=pad(tokens, sequence_length, vocabulary.pad)[0],
        weights=pad(chosen, sequence_length, 0)[0].astype(np.float32),
        token_types=pad(types, sequence_length, 0)[0],
        padding=padding,
        is_swapped=is_swapped,
    )


def _candidates(
    tokens: Integer[np.ndarray, "S"], vocabulary: BertVocabulary
) -> tuple[Int64[np.ndarray, "C"], Bool[np.ndarray, "C"] | None]:
    """Positions that may be masked, and which of them continue the word before."""
    positions = np.flatnonzero((tokens != vocabulary.classify) & (tokens != vocabulary.separate))
    return positions, None if vocabulary.continues is None else vocabulary.continues[tokens[positions]]


def _check_rows(reader: IndexedReader, rows: Integer[np.ndarray, "Samples 3"], *, most_tokens: int) -> None:
    if len(rows) and (rows[:, 1].max() > len(reader) or rows[:, 2].max() > most_tokens):
        raise UserError(
            f"{reader.prefix} has {len(reader)} sentences and samples have room for {most_tokens} tokens of text, but "
            f"the mapping goes to sentence {rows[:, 1].max()} and {rows[:, 2].max()} tokens; build it for these"
        )
