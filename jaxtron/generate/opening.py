"""The engine of a model, a run's or that of Hugging Face weights, on the devices here, with its tokenizer."""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Integer

from jaxtron.config import UserError
from jaxtron.data.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from jaxtron.generate.chat import ChatPrompts
from jaxtron.generate.engine import GenerationEngine
from jaxtron.generate.protocol import TokenEngine
from jaxtron.generate.settings import SamplingSettings
from jaxtron.generate.source import ModelConfiguration, ModelSource
from jaxtron.generate.streaming import AnswerStream, hidden_tokens
from jaxtron.models.families import program_of
from jaxtron.run.configuration import Configuration
from jaxtron.run.restored import check_vocabulary, restore_model, tokenizer_of
from jaxtron.run.session import RunSession, make_session
from jaxtron.sharding.folding import FLAGS
from jaxtron.typing import PyTree
from jaxtron.weights.load import load_parameters
from jaxtron.words import NO_TEXT, is_whole_text, plural


@dataclass(frozen=True)
class SpeakingModel:
    """An engine, and what turns text into its tokens and back."""

    engine: TokenEngine
    tokenizer: Tokenizer
    configuration: ModelConfiguration
    prefix: tuple[int, ...] = ()
    """Tokens that stand before every plain text."""
    hidden: frozenset[int] = frozenset()
    """Tokens that are no text of an answer."""
    end: int | None = None
    """What ends an answer, and stands behind a plain text, where the model answers it with a sequence of its own."""

    @property
    def answers(self) -> bool:
        """Whether what it makes is a sequence of its own, with as much room as the prompt."""
        return self.end is not None

    def settings(self, **given: Any) -> SamplingSettings:
        """Those of a request over the model's own, with the tokens that end its text; a `UserError` for others."""
        ends = dict.fromkeys((*self.configuration.eos_token_ids, self.tokenizer.end_of_document, self.end))
        known = tuple(token for token in ends if token is not None and token < self.engine.vocab)
        settings = self.configuration.settings(**given, eos_token_ids=known)
        settings.check_vocab(self.engine.vocab)
        return settings

    def encode(self, text: str) -> Integer[np.ndarray, "P"]:
        """The ids of a plain text for the model to go on from; a `UserError` for what is no text."""
        if not is_whole_text(text):
            raise UserError(f"prompt {NO_TEXT}")
        ids = self.tokenizer.encode(text)
        begun = ids[: len(self.prefix)].tolist() == list(self.prefix)
        ended = self.end is None or ids[-1:].tolist() == [self.end]
        return np.concatenate([[] if begun else self.prefix, ids, [] if ended else [self.end]]).astype(np.int32)

    def check_prompt(self, prompt: Integer[np.ndarray, "P"], wanted: int | None) -> None:
        """A `UserError` for a prompt without tokens, or that leaves no room for those wanted (None: for one).

        Where none is wanted it is only scored.
        """
        wanted = 1 if wanted is None else wanted
        if not len(prompt):
            raise UserError("prompt is empty: the model needs a token to go on from")
        if prompt.min() < 0 or prompt.max() >= self.engine.vocab:
            odd = int(prompt.min() if prompt.min() < 0 else prompt.max())
            raise UserError(f"prompt has token {odd}, and the model knows 0 to {self.engine.vocab - 1:,}")
        if self.answers and max(len(prompt), 1 + wanted) > self.engine.room:
            raise UserError(
                f"prompt has {plural(len(prompt), 'token')}, and the model has room for {self.engine.room:,} in a text "
                "and in an answer, with what that begins with; raise --room, or shorten it"
            )
        if not self.answers and len(prompt) + wanted > self.engine.room:
            raise UserError(
                f"prompt has {plural(len(prompt), 'token')}, and with {wanted:,} more that is beyond the model's room "
                f"for {self.engine.room:,}"
            )

    def stream(
        self,
        prompt: Integer[np.ndarray, "P"],
        settings: SamplingSettings,
        *,
        goes_on: bool = True,
        shows_special: bool = False,
    ) -> AnswerStream:
        """The text of an answer, which goes on from that of the prompt or begins anew."""
        return AnswerStream(
            self.tokenizer,
            settings,
            # of an answer that is a sequence of its own, what it begins with takes a place
            room=self.engine.room - (1 if self.answers else len(prompt)),
            hidden=frozenset() if shows_special else self.hidden,
            before=prompt if goes_on and not self.answers else None,
        )

    @functools.cached_property
    def chat(self) -> ChatPrompts:
        """Conversations as the model knows them; a `UserError` where it has no template."""
        return ChatPrompts(self.configuration.chat, self.tokenizer)


@contextlib.contextmanager
def open_model(source: ModelSource, configuration: ModelConfiguration, *, rows: int) -> Iterator[SpeakingModel]:
    """The model of `read_model` on JAX's devices, which have started; for `rows` sequences at a time at least."""
    config = configuration.config
    devices = jax.devices()
    known = [getattr(config.mesh, axis) for axis in FLAGS]
    if -1 not in known and config.devices is None and jax.process_count() == 1:
        # too few devices are an error below
        devices = devices[: math.prod(known)]
    session = make_session(of_any_length(config, len(devices)), devices, trains=False)
    params, tokenizer = _weights(source, configuration, session)
    model = speaking_model(session, params, tokenizer, configuration, rows=source.rows or rows)
    # the engine has copies
    del params
    yield model


def speaking_model(
    session: RunSession, params: PyTree, tokenizer: Tokenizer, configuration: ModelConfiguration, *, rows: int
) -> SpeakingModel:
    """The engine of a session's model, for `rows` sequences at a time at least, with what its family knows of text."""
    prefix = tokenizer.prefix if configuration.is_begun and isinstance(tokenizer, HuggingFaceTokenizer) else ()
    config, shown, opening, end = session.config, frozenset[int](), (), None
    if config.family.writes == "answer":
        ends = (*configuration.eos_token_ids, None)
        text = program_of(config.model).answers(config.model, tokenizer, configuration.begin, ends[0])
        tokenizer, shown, opening, end = text.tokenizer, text.shown, (text.begin,), text.end
    engine = GenerationEngine(session, params, rows=rows, room=configuration.room, opening=opening)
    return SpeakingModel(engine, tokenizer, configuration, prefix, hidden_tokens(tokenizer) - shown, end)


def of_any_length(config: Configuration, num_devices: int) -> Configuration:
    """The configuration with sequences that split over mesh.tensor: of text nothing is as long as a training's.

    Several stacks are the chunks of a stage, whose order does not matter where nothing is trained.
    """
    sizes, length = config.mesh.shape(num_devices), config.data.sequence_length
    tensor = sizes["tensor"]
    data = config.data.model_copy(update={"sequence_length": max(tensor, length - length % tensor)})
    pipeline = config.pipeline
    if sizes["pipe"] > 1 and len(config.family.stacks(config.model)) > 1:
        pipeline = pipeline.model_copy(update={"schedule": "interleaved"})
    model = config.family.of_any_length(config.model)
    return config.model_copy(update={"data": data, "pipeline": pipeline, "model": model})


def _weights(source: ModelSource, configuration: ModelConfiguration, session: RunSession) -> tuple[PyTree, Tokenizer]:
    config, trained = configuration.config, configuration.trained
    with session.use():
        if trained is not None:
            restored = restore_model(session, source.directory, trained, source.step)
            return restored.params, tokenizer_of(trained, config, restored.extra)
        tokenizer = load_tokenizer(config.data.tokenizer, end_of_document=config.data.end_of_document)
        if tokenizer is None:
            raise UserError("--data.tokenizer characters has its vocabulary from a training's data; give a file")
        check_vocabulary(tokenizer, config)
        params = load_parameters(source.directory, config.model, session.blueprint, session.trainer.partitions)
        return params, tokenizer
