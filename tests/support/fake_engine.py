"""An engine without a model: after a letter comes the next one of the alphabet, and after z the end of the text."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxtron.data.config import ChatConfig
from jaxtron.data.tokenizers import ByteTokenizer
from jaxtron.generate.opening import SpeakingModel
from jaxtron.generate.settings import SamplingSettings
from jaxtron.generate.source import ModelConfiguration
from jaxtron.run.configuration import Configuration

END = 256
# what the model makes of it is not finite
BAD = ord("!")


@dataclass(frozen=True)
class FakeToken:
    """What the real engine calls a chosen token."""

    row: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def after(token: int) -> int:
    """The next letter."""
    return END if token == ord("z") else token + 1 if ord("a") <= token < ord("z") else ord("a")


def tops(token: int, count: int) -> tuple[tuple[int, float], ...]:
    """The best tokens where this one is."""
    return tuple(((token + number) % 257, -0.5 - number) for number in range(count))


class FakeEngine:
    """Rows that grow by a letter at each step, which takes some seconds."""

    vocab = 257

    def __init__(self, rows: int = 4, room: int = 64, seconds: float = 0.0):
        self.rows, self.room, self.seconds = rows, room, seconds
        self.there: dict[int, tuple[int, SamplingSettings]] = {}
        self.most_at_once = self.num_begun = self.num_steps = 0
        self.begun: list[SamplingSettings] = []

    def begin(self, row: int, prompt: np.ndarray, settings: SamplingSettings) -> None:
        assert row not in self.there and 0 <= row < self.rows
        assert 0 < len(prompt) < self.room and settings.seed is not None
        self.there[row] = int(prompt[-1]), settings
        self.begun.append(settings)
        self.most_at_once = max(self.most_at_once, len(self.there))

    def step(self) -> list[FakeToken]:
        time.sleep(self.seconds)
        self.num_steps += 1
        if any(last == BAD for last, _ in self.there.values()):
            raise FloatingPointError("the logits of token 1 are not finite")
        found = []
        for row, (last, settings) in self.there.items():
            token = after(last)
            self.there[row] = token, settings
            found.append(FakeToken(row, token, -0.5, tops(token, settings.logprobs or 0)))
        return found

    def end(self, row: int) -> None:
        del self.there[row]

    def score(self, sequences: Sequence[np.ndarray], top: int = 1) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        found = []
        for one in sequences:
            best = [tops(after(int(token)), top) for token in one[:-1]]
            own = [-0.5 if after(int(a)) == b else -3.0 for a, b in zip(one[:-1], one[1:], strict=True)]
            ids = np.array([[token for token, _ in row] for row in best], np.int32).reshape(-1, top)
            values = np.array([[value for _, value in row] for row in best], np.float32).reshape(-1, top)
            found.append((np.array(own, np.float32), ids, values))
        return found


def fake_model(engine: FakeEngine, *, chat: bool = True) -> SpeakingModel:
    """The engine with bytes for tokens, and ChatML."""
    configuration = ModelConfiguration(None, Configuration(), engine.room, ChatConfig() if chat else None, {}, ())
    return SpeakingModel(engine, ByteTokenizer(), configuration, (), frozenset({END}))
