"""Requests that share an engine: each has a row while it lasts, and those that find none free wait in order."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from jaxtron.generate.protocol import TokenEngine
from jaxtron.generate.settings import SamplingSettings
from jaxtron.generate.streaming import AnswerStream, FinishReason


@dataclass(frozen=True)
class Grown:
    """One more token of an answer, and the text that is certain with it."""

    text: str
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None


@dataclass(eq=False)
class GrowingSequence:
    """One answer that is wanted: `grow` is called with each token of it, the last with a reason."""

    prompt: Integer[np.ndarray, "P"]
    settings: SamplingSettings
    stream: AnswerStream
    grow: Callable[[Grown], None]


class Batch:
    """Sequences in the rows of an engine and those that wait for one; for the engine's thread."""

    def __init__(self, engine: TokenEngine):
        self.engine = engine
        self._waiting: deque[GrowingSequence] = deque()
        self._rows: dict[int, GrowingSequence] = {}

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._rows or self._waiting)

    @property
    def sequences(self) -> list[GrowingSequence]:
        """Those that are not done."""
        return [*self._rows.values(), *self._waiting]

    def add(self, sequence: GrowingSequence) -> None:
        """Takes a sequence, whose prompt leaves room for a token."""
        self._waiting.append(sequence)

    def drop(self, sequence: GrowingSequence) -> None:
        """Forgets a sequence, if it is still there."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        for row in [row for row, own in self._rows.items() if own is sequence]:
            self._end(row)

    def step(self) -> None:
        """A token of each sequence that has a row; what ends makes room for the next."""
        for row in range(self.engine.rows):
            if self._waiting and row not in self._rows:
                self._rows[row] = sequence = self._waiting.popleft()
                self.engine.begin(row, sequence.prompt, sequence.settings)
        for drawn in self.engine.step():
            # one that was dropped by what another's token led to
            if (sequence := self._rows.get(drawn.row)) is None:
                continue
            text = sequence.stream.push(drawn.token)
            reason = sequence.stream.finish_reason
            if reason is not None:
                self._end(drawn.row)
            sequence.grow(Grown(text, drawn.token, drawn.logprob, tuple(drawn.top), reason))

    def _end(self, row: int) -> None:
        del self._rows[row]
        self.engine.end(row)
