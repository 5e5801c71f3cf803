"""A schedule is data: what every stage does at every tick, as a table testable without a device."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["idle", "forward_backward"]


@dataclass(frozen=True)
class Entry:
    """One tick of one stage: what it runs and on which microbatch.

    `forward_backward` is a microbatch's forward and its own backward at once, so that no residuals outlive the tick.
    """

    kind: Kind
    microbatch: int = 0


@dataclass(frozen=True)
class Schedule:
    """Rows are ticks, columns stages."""

    table: tuple[tuple[Entry, ...], ...]

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return len(self.table[0])

    @property
    def num_ticks(self) -> int:
        """Ticks of a step."""
        return len(self.table)


def one_stage(num_microbatches: int) -> Schedule:
    """Gradient accumulation: one stage that runs each microbatch forward and backward, in order."""
    if num_microbatches < 1:
        raise ValueError(f"a step needs at least one microbatch, not {num_microbatches}")
    return Schedule(tuple((Entry("forward_backward", index),) for index in range(num_microbatches)))
