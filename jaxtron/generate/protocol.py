"""What an engine of tokens offers to those who stream its text to a terminal or over a network."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from jaxtron.generate.settings import SamplingSettings


class Drawn(NamedTuple):
    """One token of one row, with log-probabilities before any rule of sampling."""

    row: int
    token: int
    """`sampling.NO_TOKEN` where the model's logits were not finite."""
    logprob: float
    top_logprobs: list[tuple[int, float]]
    """Ids of the best tokens with theirs, the best first: at least as many as the row's settings want."""


class Scored(NamedTuple):
    """How likely a token of a prompt was after those before it."""

    logprob: float
    top_logprobs: list[tuple[int, float]]


@runtime_checkable
class TokenEngine(Protocol):
    """A batch of sequences that grow by a token each at every step; for one thread."""

    @property
    def rows(self) -> int:
        """How many sequences at a time, numbered from 0."""
        ...

    @property
    def room(self) -> int:
        """How many tokens a sequence may have, prompt and output."""
        ...

    @property
    def vocab(self) -> int:
        """How many tokens the model knows, padding not counted."""
        ...

    def begin(self, row: int, prompt: Integer[np.ndarray, "P"], settings: SamplingSettings) -> None:
        """Puts a sequence into a row that is free; its settings have a seed, and its prompt at least one token."""
        ...

    def step(self) -> list[Drawn]:
        """The next token of the rows in use; one whose prompt is not read whole yet may have none."""
        ...

    def end(self, row: int) -> None:
        """Frees a row."""
        ...

    def score(self, prompt: Integer[np.ndarray, "P"], top: int) -> list[Scored]:
        """Of each token of a sequence but the first; with the `top` best tokens of its place."""
        ...
