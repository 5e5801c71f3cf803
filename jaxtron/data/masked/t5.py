"""T5's samples: text without some spans of whole words for the encoder, the spans for the decoder.

The same draws in the same order as Megatron's T5 dataset, so the same samples for the same files and seed.
"""

import numpy as np
from jaxtyping import Integer

from jaxtron.config import UserError
from jaxtron.data.masked.ngrams import Masking, NgramChooser, word_positions
from jaxtron.data.masked.sample import SpanSample
from jaxtron.data.masked.spans import SpanVocabulary, fitting_spans, take_out
from jaxtron.data.megatron.indexed import IndexedReader

SPECIAL_TOKENS = 2
"""What Megatron leaves free in the encoder."""
T5_MASKING = Masking(probability=0.15, max_ngram=10, geometric=True)


class T5Source:
    """Span corruption over a file of sentences, in the order of `rows`; read by several threads at once.

    `rows` are those of `mapping.build_mapping` for `max_length` = encoder length - 2 and one sentence at least. Sample
    i draws from `RandomState((seed + i) % 2^32)`. Where Megatron would stop because the spans outgrow the decoder or
    the sentinels, the last spans stay in the text instead.
    """

    def __init__(
        self,
        reader: IndexedReader,
        rows: Integer[np.ndarray, "Samples 3"],
        *,
        encoder_length: int,
        decoder_length: int,
        vocabulary: SpanVocabulary,
        seed: int,
        masking: Masking = T5_MASKING,
    ):
        most_tokens = encoder_length - SPECIAL_TOKENS
        if masking.permute:
            raise UserError("permuted tokens are for BERT; T5 takes spans out")
        if not vocabulary.sentinels or decoder_length < 3:
            raise UserError(
                f"{len(vocabulary.sentinels)} sentinels and a decoder of {decoder_length} tokens leave no room for a "
                "span; give at least 1 and 3"
            )
        if len(rows) and (rows[:, 1].max() > len(reader) or rows[:, 2].max() > most_tokens):
            raise UserError(
                f"{reader.prefix} has {len(reader)} sentences and the encoder room for {most_tokens} tokens of text, "
                f"but the mapping goes to sentence {rows[:, 1].max()} and {rows[:, 2].max()} tokens; build it for these"
            )
        self.encoder_length = encoder_length
        self.decoder_length = decoder_length
        self._reader = reader
        self._rows = rows
        self._vocabulary = vocabulary
        self._seed = seed
        self._masking = masking

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> SpanSample:
        if not 0 <= index < len(self._rows):
            raise IndexError(f"sample {index} of {len(self._rows)}")
        first, end, target_length = self._rows[index].tolist()
        rng = np.random.RandomState((self._seed + index) % 2**32)
        text = np.concatenate([self._reader.get(number) for number in range(first, end)])[:target_length]
        spans = word_spans(
            text, vocabulary=self._vocabulary, masking=self._masking, target_length=target_length, rng=rng
        )
        return take_out(
            text,
            fitting_spans(spans, num_sentinels=len(self._vocabulary.sentinels), decoder_length=self.decoder_length),
            vocabulary=self._vocabulary,
            encoder_length=self.encoder_length,
            decoder_length=self.decoder_length,
        )


def word_spans(
    tokens: Integer[np.ndarray, "N"],
    *,
    vocabulary: SpanVocabulary,
    masking: Masking,
    target_length: int,
    rng: np.random.RandomState,
) -> Integer[np.ndarray, "Spans 2"]:
    """(start, end) of the n-grams of whole words that masking takes, in order; adjacent ones stay apart."""
    continues = None if vocabulary.continues is None else vocabulary.continues[tokens]
    chooser = NgramChooser(word_positions(np.arange(len(tokens)), continues), masking, rng)
    ngrams = chooser.choose(masking.count(len(tokens), target_length), taken=set())
    return np.array(sorted((ngram[0], ngram[-1] + 1) for ngram in ngrams), np.int64).reshape(-1, 2)
