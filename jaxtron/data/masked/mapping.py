"""Which sentences make up each sample of BERT and T5: Megatron's `build_mapping`, draw for draw."""

from bisect import bisect_left

import numpy as np
from jaxtyping import Integer, UInt

from jaxtron.config import UserError
from jaxtron.data.masked.mersenne import mt19937, mt19937_64

LONGEST_SENTENCE = 512
"""A document of several sentences is left out when one of them has more tokens than this."""


def build_mapping(
    documents: Integer[np.ndarray, "D"],
    lengths: Integer[np.ndarray, "N"],
    *,
    max_length: int,
    min_sentences: int,
    short_probability: float,
    seed: int,
    num_epochs: int | None = 1,
    num_samples: int | None = None,
) -> UInt[np.ndarray, "Samples 3"]:
    """Rows of (first sentence, one after the last, tokens wanted), shuffled; uint32, or uint64 for 2^32 sentences.

    `documents` are the sentence numbers at which documents start, and where the last one ends; `lengths` are tokens of
    every sentence of the file. Sentences of a document are gathered until they have the tokens wanted: `max_length`, or
    with `short_probability` fewer. A row may exceed what it wants by its last sentences; the samples cut it.

    Whole epochs are walked until `num_samples` rows are there or `num_epochs` are over, None being no limit, so there
    may be more rows than asked for. UserError where no document can be used or no limit is given.
    """
    assert max_length > 1 and min_sentences >= 1 and 0 <= short_probability <= 1
    if num_epochs is None and num_samples is None:
        raise UserError("an endless mapping: give the number of samples or of epochs")
    usable = _usable_documents(documents, lengths, min_sentences)
    if not len(usable):
        raise UserError(
            f"none of {len(documents) - 1} documents has {min_sentences} sentences, all of at most {LONGEST_SENTENCE} "
            "tokens; preprocess with --split-sentences"
        )
    # C++ rounds halves away from zero, and 1/p is positive
    ratio = int(1 / short_probability + 0.5) if short_probability > 0 else 0
    draws = mt19937(seed)

    def target() -> int:
        draw = next(draws) if ratio else 1
        return 2 + draw % (max_length - 1) if ratio and draw % ratio == 0 else max_length

    rows: list[tuple[int, int, int]] = []
    epoch = 0
    while (num_epochs is None or epoch < num_epochs) and (num_samples is None or len(rows) < num_samples):
        for first, last in usable.tolist():
            sums = np.concatenate([[0], np.cumsum(lengths[first:last], dtype=np.int64)]).tolist()
            count, start = last - first, 0
            while start < count:
                wanted = target()
                end = max(bisect_left(sums, sums[start] + wanted), start + min_sentences)
                # a single sentence is never left for the next row
                end = end if count - end > 1 else count
                rows.append((first + start, first + end, wanted))
                start = end
            # one is drawn for a row that never comes
            target()
        epoch += 1
    mapping = np.array(rows, np.uint64 if len(lengths) > 2**32 - 1 else np.uint32).reshape(-1, 3)
    return mapping[_shuffled(len(rows), seed + 1)]


def _usable_documents(
    documents: Integer[np.ndarray, "D"], lengths: Integer[np.ndarray, "N"], min_sentences: int
) -> Integer[np.ndarray, "Usable 2"]:
    """First sentence and one after the last of the documents with enough sentences and none too long."""
    long_before = np.concatenate([[0], np.cumsum(lengths > LONGEST_SENTENCE)])
    starts, ends = documents[:-1], documents[1:]
    counts = ends - starts
    is_usable = (counts >= min_sentences) & ((counts == 1) | (long_before[ends] == long_before[starts]))
    return np.stack([starts, ends], axis=1)[is_usable]


def _shuffled(count: int, seed: int) -> Integer[np.ndarray, "N"]:
    """Fisher-Yates from the last place down, on `std::mt19937_64`."""
    sizes = np.arange(count, 1, -1, dtype=np.uint64)
    order = list(range(count))
    for i, j in zip(range(count - 1, 0, -1), (mt19937_64(seed, len(sizes)) % sizes).tolist(), strict=True):
        order[i], order[j] = order[j], order[i]
    return np.array(order, np.int64)
