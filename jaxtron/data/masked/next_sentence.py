"""Pairs whose second part follows the first, or is of another document (1810.04805, section 3.1, task 2)."""

import numpy as np
from jaxtyping import Int64, Integer

from jaxtron.data.masked.bert import SPECIAL_TOKENS, BertVocabulary, make_bert_sample, truncate_pair
from jaxtron.data.masked.ngrams import Masking
from jaxtron.data.masked.sample import MaskedSample
from jaxtron.data.megatron.indexed import IndexedReader

# of another document; where a file has one alone, one more look finds no other
MOST_LOOKS = 10
ANOTHER_PROBABILITY = 0.5


class NextSentenceSource:
    """Masked pairs from a file of sentences, in the order of `rows`; read by several threads at once.

    `rows` are those of `mapping.build_mapping` as for `bert.BertSource`, `documents` the first sentence of each
    document and where the last one ends. The sentences of a row are cut in two at a random place; in half of all cases
    the second part is that of a row of another document, and the sample says that it was swapped. Sample i draws from
    `RandomState((seed + i) % 2^32)`.
    """

    def __init__(
        self,
        reader: IndexedReader,
        rows: Integer[np.ndarray, "Samples 3"],
        documents: Int64[np.ndarray, "D"],
        *,
        sequence_length: int,
        vocabulary: BertVocabulary,
        seed: int,
        masking: Masking,
    ):
        self.sequence_length = sequence_length
        self._reader = reader
        self._rows = rows
        self._documents = documents
        self._vocabulary = vocabulary
        self._seed = seed
        self._masking = masking

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> MaskedSample:
        if not 0 <= index < len(self._rows):
            raise IndexError(f"sample {index} of {len(self._rows)}")
        first, end, target_length = self._rows[index].tolist()
        rng = np.random.RandomState((self._seed + index) % 2**32)
        pivot = first + (int(rng.randint(1, end - first)) if end - first > 1 else 1)
        a, b = self._text(first, pivot), self._text(pivot, end)
        is_another = bool(rng.random_sample() < ANOTHER_PROBABILITY)
        if is_another:
            other = self._other(first, rng)
            is_another = other is not None
            b = b if other is None else self._text(*other)
        a, b = truncate_pair(a, b, min(target_length, self.sequence_length - SPECIAL_TOKENS), rng)
        return make_bert_sample(
            a,
            b,
            is_swapped=is_another,
            sequence_length=self.sequence_length,
            target_length=target_length,
            vocabulary=self._vocabulary,
            masking=self._masking,
            rng=rng,
        )

    def _text(self, first: int, end: int) -> Integer[np.ndarray, "T"]:
        return np.concatenate([np.empty(0, np.int32), *(self._reader.get(number) for number in range(first, end))])

    def _other(self, first: int, rng: np.random.RandomState) -> tuple[int, int] | None:
        """Sentences of a row of another document; None where none was found."""
        own = self._document(first)
        for _ in range(MOST_LOOKS):
            start, end, _ = self._rows[int(rng.randint(len(self._rows)))].tolist()
            if self._document(start) != own:
                return start, end
        return None

    def _document(self, sentence: int) -> int:
        return int(np.searchsorted(self._documents, sentence, side="right"))
