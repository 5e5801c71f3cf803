"""Samples of encoders made of windows of text, one of each."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from jaxtron.data.batch import TokenBatch
from jaxtron.data.source import Source


@dataclass(frozen=True)
class WindowSamples:
    """As many samples as a source has windows, as long as these; a family says what it makes of one."""

    source: Source

    @property
    def sequence_length(self) -> int:
        """Tokens of a sample, special ones and padding among them."""
        return self.source.sequence_length

    def __len__(self) -> int:
        return len(self.source)

    def text(self, index: int) -> Integer[np.ndarray, "T"]:
        """What a window has of tokens that weigh."""
        sample: TokenBatch = self.source[index]
        return sample.tokens[sample.weights > 0]
