"""Training samples by number: the seam between a data format and the loader."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, Integer


@dataclass(frozen=True)
class Sample:
    """One sequence: ids, the id after each, and what each prediction weighs in the loss (0 for padding).

    A source gives all of its samples positions, or none of them; segments likewise.
    """

    tokens: Int32[np.ndarray, "S"]
    targets: Int32[np.ndarray, "S"]
    weights: Float32[np.ndarray, "S"]
    positions: Int32[np.ndarray, "S"] | None = None
    """Places of the tokens, starting again at 0 in each document; none: those in the sequence."""
    segments: Int32[np.ndarray, "S"] | None = None
    """Documents by number: tokens see those of their own only; none: one document."""


@runtime_checkable
class Source(Protocol):
    """A fixed number of samples of one length, read in any order by several threads at once."""

    @property
    def sequence_length(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class WindowSource:
    """Windows of a token stream that do not overlap; the last one is padded when `pad_last`, dropped otherwise."""

    def __init__(self, tokens: Integer[np.ndarray, "T"], *, sequence_length: int, pad_last: bool):
        self.sequence_length = sequence_length
        self._tokens = tokens
        # the last token has no successor, so it is only ever a target
        num_targets = max(len(tokens) - 1, 0)
        self._length = -(-num_targets // sequence_length) if pad_last else num_targets // sequence_length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        start = index * self.sequence_length
        window = self._tokens[start : start + self.sequence_length + 1].astype(np.int32)
        missing = self.sequence_length + 1 - len(window)
        weights = np.ones(self.sequence_length, np.float32)
        if missing:
            window = np.pad(window, (0, missing))
            weights[-missing:] = 0
        return Sample(tokens=window[:-1], targets=window[1:], weights=weights)
