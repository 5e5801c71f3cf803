"""METRO-LM's samples: windows of text with some of their tokens masked."""

from dataclasses import dataclass

import numpy as np

from jaxtron.data.masked.bert import BertVocabulary
from jaxtron.data.masked.sample import pad
from jaxtron.data.source import Source
from jaxtron.data.tokenizers import Tokenizer
from jaxtron.models.encoder.special_tokens import special_tokens
from jaxtron.models.encoder.windows import WindowSamples
from jaxtron.models.metro.batch import MetroBatch
from jaxtron.models.metro.config import SPECIAL_TOKENS, MetroConfig


@dataclass(frozen=True)
class MaskedWindows(WindowSamples):
    """`[CLS] text [SEP]` of what each window has of tokens that weigh, any of which is masked as likely as another.

    All that are masked become `[MASK]` (ELECTRA, 2003.10555). Sample i draws from `RandomState(i)`.
    """

    config: MetroConfig
    vocabulary: BertVocabulary

    def __getitem__(self, index: int) -> MetroBatch:
        length, special = self.sequence_length, self.vocabulary
        text = self.text(index)[: length - SPECIAL_TOKENS]
        targets = np.concatenate([[special.classify], text, [special.separate]]).astype(np.int32)
        count = self.config.masked_tokens(len(text))
        # behind [CLS]
        places = 1 + np.sort(np.random.RandomState(index % 2**32).permutation(len(text))[:count])
        tokens = targets.copy()
        tokens[places] = special.mask
        room = self.config.places(length)
        in_text = np.arange(length) < len(targets)
        return MetroBatch(
            tokens=pad(tokens, length, special.pad)[0],
            targets=pad(targets, length, special.pad)[0],
            segments=in_text.astype(np.int32),
            weights=in_text.astype(np.float32),
            places=np.pad(places, (0, room - count), constant_values=-1).astype(np.int32),
            place_weights=(np.arange(room) < count).astype(np.float32),
        )


def samples_of_text(config: MetroConfig, source: Source, tokenizer: Tokenizer | None) -> Source:
    """Windows of text as this family reads them."""
    return MaskedWindows(source, config, special_tokens(config.vocab_size, tokenizer, whole_words=False))
