"""A stream of tokens cut into windows."""

import numpy as np
from jaxtyping import Integer

from jaxtron.data.batch import TokenBatch
from jaxtron.data.megatron.boundaries import Boundaries, make_sample


class WindowSource:
    """Windows of a token stream that do not overlap; the last one is padded when `pad_last`, dropped otherwise."""

    def __init__(
        self,
        tokens: Integer[np.ndarray, "T"],
        *,
        sequence_length: int,
        pad_last: bool,
        boundaries: Boundaries | None = None,
    ):
        self.sequence_length = sequence_length
        self._tokens = tokens
        self._boundaries = boundaries or Boundaries()
        # the last token has no successor, so it is only ever a target
        num_targets = max(len(tokens) - 1, 0)
        self._length = -(-num_targets // sequence_length) if pad_last else num_targets // sequence_length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> TokenBatch:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        start = index * self.sequence_length
        window = self._tokens[start : start + self.sequence_length + 1].astype(np.int32)
        return make_sample(window, sequence_length=self.sequence_length, boundaries=self._boundaries)
