"""Training samples by number: the seam between a data format and the loader."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Source(Protocol):
    """A fixed number of samples of one length, read in any order by several threads at once.

    A sample is a batch (`batch.py`) without the axis of rows, for most models a `TokenBatch`.
    """

    @property
    def sequence_length(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class NoSamples:
    """A source of nothing."""

    sequence_length = 0

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError(f"sample {index} of none")


NO_SAMPLES = NoSamples()
