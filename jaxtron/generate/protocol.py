"""What an engine of tokens offers to those who stream its text to a terminal or over a network."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from jaxtron.generate.settings import SamplingSettings


@runtime_checkable
class DrawnToken(Protocol):
    """One token of one row, with natural logarithms of probabilities before any rule of sampling."""

    @property
    def row(self) -> int: ...

    @property
    def token(self) -> int: ...

    @property
    def logprob(self) -> float: ...

    @property
    def top(self) -> Sequence[tuple[int, float]]:
        """Ids of the best tokens with theirs, as many as the row's settings ask for, the best first."""
        ...


@runtime_checkable
class TokenEngine(Protocol):
    """A batch of sequences that grow by a token each at every step; for one thread."""

    rows: int
    """How many sequences at a time, numbered from 0."""
    room: int
    """How many tokens a sequence may have, prompt and output."""
    vocab: int
    """How many tokens the model knows, padding not counted."""

    def begin(self, row: int, prompt: Integer[np.ndarray, "P"], settings: SamplingSettings) -> None:
        """Puts a sequence into a free row; its settings have a seed, its prompt a token or more and room behind it."""
        ...

    def step(self) -> Sequence[Any]:
        """A `DrawnToken` of every row in use; `FloatingPointError` where the model's logits are not finite."""
        ...

    def end(self, row: int) -> None:
        """Frees a row."""
        ...

    def score(
        self, sequences: Sequence[Integer[np.ndarray, "_"]], top: int = 1
    ) -> Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each sequence, for all tokens but the first: their log-probabilities [S - 1], the `top` best tokens in
        their places and theirs [S - 1, top]."""
        ...
