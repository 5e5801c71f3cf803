"""Training samples by number: the seam between a data format and the loader."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32


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


class NoSamples:
    """A source of nothing."""

    sequence_length = 0

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Sample:
        raise IndexError(f"sample {index} of none")


NO_SAMPLES = NoSamples()
