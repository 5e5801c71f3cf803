"""Text from a session's state: the engine of `jaxtron.generate`, compiled once and given each state in turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer

from jaxtron.config import UserError
from jaxtron.data.tokenizers import Tokenizer
from jaxtron.generate.batch import Batch, GrowingSequence, Grown
from jaxtron.generate.engine import GenerationEngine
from jaxtron.generate.opening import SpeakingModel, speaking_model
from jaxtron.generate.settings import SamplingSettings
from jaxtron.generate.source import ModelConfiguration
from jaxtron.run.session import RunSession
from jaxtron.typing import PyTree

MOST_ROWS = 8
# the one seed that is not a setting of the model: each call gives the same
SETTINGS = [name for name in SamplingSettings.__dataclass_fields__ if name != "eos_token_ids"]


@dataclass
class Speaker:
    """An engine with room for the model's sequences, kept from call to call."""

    model: SpeakingModel
    engine: GenerationEngine

    @classmethod
    def of(cls, session: RunSession, params: PyTree, tokenizer: Tokenizer, prompts: int) -> "Speaker":
        """For so many prompts at a time, or fewer where they are many."""
        config = session.config
        room = config.data.sequence_length
        configuration = ModelConfiguration(None, config, room, None, {}, ())
        model = speaking_model(session, params, tokenizer, configuration, rows=min(prompts, MOST_ROWS))
        assert isinstance(model.engine, GenerationEngine)
        return cls(model, model.engine)

    def write(self, prompts: Sequence[Integer[np.ndarray, "_"]], settings: SamplingSettings, seed: int) -> list[str]:
        """What follows each prompt."""
        batch, made = Batch(self.engine), []
        for number, prompt in enumerate(prompts):
            self.model.check_prompt(prompt, None)
            pieces: list[Grown] = []
            own = settings.seeded(seed, number)
            batch.add(GrowingSequence(prompt, own, self.model.stream(prompt, own), pieces.append))
            made.append(pieces)
        try:
            while batch.is_busy:
                batch.step()
        except FloatingPointError as error:
            for sequence in batch.sequences:
                batch.drop(sequence)
            raise UserError(f"the state has diverged: {error}; go back to an earlier one") from None
        return ["".join(grown.text for grown in pieces) for pieces in made]


def sampling(model: SpeakingModel, given: dict[str, Any]) -> SamplingSettings:
    """The settings of a call; a `UserError` for unknown ones."""
    for name in given:
        if name not in SETTINGS:
            raise UserError(f"generate has no setting {name!r}; they are {', '.join(SETTINGS)}")
    # a text alone is one of them
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    return model.settings(**given)
