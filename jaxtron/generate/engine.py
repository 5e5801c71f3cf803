"""Sequences that a model makes, a token of each at a time: they come and go, and share a batch while they are there.

The batch has a fixed number of rows, shared out along `data` and `fsdp`. A prompt is read whole into a free row, with
others that begin then; a step chooses a token of each row and makes the logits of the next. Rows do not know of each
other: a sequence is the same whatever else is in the batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int32, Integer

from jaxtron.config import UserError
from jaxtron.generate.sampling import NO_TOKEN, choose, empty_state, features_of, place
from jaxtron.generate.settings import SamplingSettings
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.decode import Steps
from jaxtron.models.growing import SequenceMemory, WritingModel, insert
from jaxtron.run.session import RunSession
from jaxtron.sharding.collectives import largest, vary
from jaxtron.sharding.folding import BATCH_FLAGS
from jaxtron.sharding.parameters import manual_specs
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, Float, Int, PyTree

# a prompt is padded to a power of two, for each length is a program of its own
SHORTEST = 16


@dataclass(frozen=True)
class ChosenToken:
    """A token of a row, with natural logarithms of probabilities before any rule of sampling."""

    row: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The best tokens, as many as the row's settings ask for, the best first."""


@dataclass
class _Sequence:
    settings: SamplingSettings
    prompt: Int32[np.ndarray, "P"]
    before: Int32[np.ndarray, "Q"]
    """What the tokens that are made follow: the prompt, or the opening of an answer."""
    made: int = 0


class GenerationEngine:
    """Rows of sequences on a session's mesh; its methods enter the mesh by themselves.

    `params` are the session's, at rest. Weights are copied, whole along `data` and `fsdp`, in the type of the session's
    products; those that were given need not stay. An `opening` is what answers begin with that are sequences of their
    own; then prompt and answer have as much room each. `UserError` for a model or a mesh that cannot.
    """

    def __init__(
        self, session: RunSession, params: PyTree, *, rows: int, room: int, opening: tuple[int, ...] = ()
    ) -> None:
        config, writes = session.config.model, session.config.family.writes
        if writes is None:
            raise UserError(f"model.family {config.family} makes no text; give a decoder")
        assert (writes == "answer") == bool(opening), "`opening.speaking_model` knows what answers begin with"
        is_learned = isinstance(config, ModelConfig) and config.position == "learned"
        learned = config.max_positions if isinstance(config, ModelConfig) and is_learned else None
        if learned is not None and room > learned:
            raise UserError(
                f"sequences of {room:,} tokens are longer than model.max_positions {learned:,}, which the "
                "model has learned; ask for fewer tokens or give a shorter prompt"
            )
        self._session = session
        vocab = session.config.vocabulary_size()
        assert vocab is not None, "what makes text has a vocabulary"
        self.vocab, self.room, self.opening = vocab, room, opening
        with session.use():
            rules = current()
            parts = rules.parts(*BATCH_FLAGS)
            self.rows = math.ceil(rows / parts) * parts
            self._local = self.rows // parts
            own, specs = PartitionSpec(rules.manual), manual_specs(session.blueprint.parameters)
            self._make: Any = jax.jit(region(partial(_module, session), (specs,), own))
            model = self._make(params)
            start = region(lambda model: model.start(self._local, room), (own,), own)
            self._memory: SequenceMemory = jax.jit(start)(model)
            # a list is passed on sooner than the arrays of a module are found, which each token would wait for
            self._model, structure = jax.tree.flatten(model)
            self._begin: Any = jax.jit(
                _of_module(structure, partial(_begin, self.vocab, room, opening)), donate_argnums=(1, 2)
            )
            self._advance: Any = jax.jit(_of_module(structure, partial(_advance, self.vocab)), donate_argnums=1)
            self._score: Any = jax.jit(_of_module(structure, partial(_score, self.vocab)), static_argnames="top")
            # as the steps leave them, so that each program is compiled once
            begun = jnp.zeros((self.rows, self.vocab), jnp.float32), empty_state(self.rows, room)
            self._logits, self._sampling = jax.device_put(begun, NamedSharding(rules.mesh, PartitionSpec()))
        self._there: dict[int, _Sequence] = {}
        self._begun: list[int] = []

    def renew(self, params: PyTree) -> None:
        """Takes other values of the parameters, with nothing compiled anew; sequences go on with them."""
        with self._session.use():
            self._model = jax.tree.leaves(self._make(params))

    @property
    def free(self) -> list[int]:
        """Rows without a sequence."""
        return [row for row in range(self.rows) if row not in self._there]

    def begin(self, row: int, prompt: Integer[np.ndarray, "P"], settings: SamplingSettings) -> None:
        """Puts a sequence into a free row; the next `step` reads its prompt. Its settings have a seed."""
        if row in self._there or not 0 <= row < self.rows:
            raise ValueError(f"row {row} is not free")
        if not 0 < len(prompt) < self.room + bool(self.opening):
            raise UserError(f"a prompt of {len(prompt):,} tokens does not leave room in {self.room:,}")
        if prompt.min() < 0 or prompt.max() >= self.vocab:
            raise UserError(
                f"a prompt has token {int(prompt.max()):,}, and the model's vocabulary {self.vocab:,} tokens"
            )
        prompt = np.asarray(prompt, np.int32)
        before = np.asarray(self.opening, np.int32) if self.opening else prompt
        self._there[row] = _Sequence(settings, prompt, before)
        self._begun.append(row)

    def end(self, row: int) -> None:
        """Frees the row."""
        del self._there[row]
        self._begun = [other for other in self._begun if other != row]

    def step(self) -> list[ChosenToken]:
        """A token of every row that has a sequence with room for it, by row; `FloatingPointError` where the model's
        logits are not finite."""
        with self._session.use():
            self._read_prompts()
            rows = {row: one for row, one in self._there.items() if len(one.before) + one.made < self.room}
            if not rows:
                return []
            features = features_of(one.settings for one in rows.values())
            is_there = np.zeros(self.rows, np.int32)
            is_there[list(rows)] = 1
            choice, self._sampling = _choose(self._logits, self._sampling, features, is_there > 0)
            self._logits, self._memory = self._advance(self._model, self._memory, choice.tokens, is_there)
        # what is read here was chosen before the devices began with the next logits
        tokens, logprobs, top_tokens, top_logprobs = map(np.asarray, jax.tree.leaves(choice))
        found = []
        for row, one in sorted(rows.items()):
            one.made += 1
            if tokens[row] == NO_TOKEN:
                raise FloatingPointError(f"the logits of token {one.made} are not finite")
            top = zip(top_tokens[row].tolist(), top_logprobs[row].tolist(), strict=True)
            wanted = tuple(top)[: one.settings.logprobs or 0]
            found.append(ChosenToken(row, int(tokens[row]), float(logprobs[row]), wanted))
        return found

    def score(
        self, sequences: Sequence[Integer[np.ndarray, "_"]], top: int = 1
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each sequence, for all tokens but the first: natural logarithms of their probabilities [S - 1], and the
        `top` best tokens in their places and theirs [S - 1, top]. A sequence may be a token longer than there is room.
        Not for models that answer.
        """
        assert not self.opening, "a text is scored by a model that goes on with it"
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        with self._session.use():
            for start in range(0, len(sequences), self.rows):
                some = sequences[start : start + self.rows]
                tokens, counts = self._padded({row: one[:-1] for row, one in enumerate(some)}, self.rows)
                targets, _ = self._padded({row: one[1:] for row, one in enumerate(some)}, self.rows)
                logprobs, ids, best = map(np.asarray, self._score(self._model, tokens, targets, counts, top=top))
                for row, one in enumerate(some):
                    count = len(one) - 1
                    found.append((logprobs[row, :count], ids[row, :count], best[row, :count]))
        return found

    def _read_prompts(self) -> None:
        """Those that began since the last step: as many at once as there are on the device that has most of them."""
        if not self._begun:
            return
        parts: list[list[int]] = [[] for _ in range(self.rows // self._local)]
        for row in self._begun:
            parts[row // self._local].append(row)
        most = max(map(len, parts))
        count = min(2 ** math.ceil(math.log2(most)), self._local)
        for start in range(0, most, count):
            spots = {
                part * count + spot: row
                for part, own in enumerate(parts)
                for spot, row in enumerate(own[start : start + count])
            }
            tokens, counts = self._padded(
                {spot: self._there[row].prompt for spot, row in spots.items()}, count * len(parts)
            )
            slots = np.full(len(tokens), self._local, np.int32)
            for spot, row in spots.items():
                slots[spot] = row % self._local
            targets = np.full(len(tokens), self.rows, np.int32)
            targets[list(spots)] = list(spots.values())
            self._logits, self._memory = self._begin(
                self._model, self._memory, self._logits, tokens, counts, slots, targets
            )
        for row in self._begun:
            one = self._there[row]
            self._sampling = place(self._sampling, row, one.settings, one.before)
        self._begun = []

    def _padded(
        self, rows: dict[int, Integer[np.ndarray, "_"]], count: int
    ) -> tuple[Int32[np.ndarray, "B S"], Int32[np.ndarray, "B"]]:
        """So many rows of tokens of one length, and how many tokens each has."""
        longest = max(1, *map(len, rows.values()))
        length = max(SHORTEST, 2 ** math.ceil(math.log2(longest)))
        tokens, counts = np.zeros((count, max(min(length, self.room), longest)), np.int32), np.zeros(count, np.int32)
        for row, own in rows.items():
            tokens[row, : len(own)], counts[row] = own, len(own)
        return tokens, counts


def _module(session: RunSession, params: PyTree) -> WritingModel:
    trainer = session.trainer
    module = trainer.blueprint.module(trainer.parts.join(trainer.working(params)))
    return trainer.program.steps(module, trainer.stages.partitions)


def _of_module(structure: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a module as one of its arrays."""

    def run(leaves: list[Array], *given: Any, **named: Any) -> Any:
        return function(jax.tree.unflatten(structure, leaves), *given, **named)

    return run


_choose = jax.jit(choose, static_argnums=2, donate_argnums=1)


def _begin(
    vocab: int,
    room: int,
    opening: tuple[int, ...],
    model: WritingModel,
    memory: SequenceMemory,
    logits: Float[Array, "B V"],
    tokens: Int[Array, "A S"],
    counts: Int[Array, "A"],
    slots: Int[Array, "A"],
    targets: Int[Array, "A"],
) -> tuple[Float[Array, "B V"], SequenceMemory]:
    """Memory and logits with further rows, which begin."""

    def local(
        model: WritingModel, memory: SequenceMemory, tokens: Array, counts: Array, slots: Array
    ) -> tuple[tuple[Array], SequenceMemory]:
        new, begun = model.begin(tokens, counts, room, opening)
        return (new[:, :vocab],), insert(memory, begun, vary(slots))

    (new,), memory = _by_row(local, (model, memory), tokens, counts, slots)
    return logits.at[targets].set(new, mode="drop"), memory


def _advance(
    vocab: int, model: WritingModel, memory: SequenceMemory, tokens: Int[Array, "B"], is_there: Int[Array, "B"]
) -> tuple[Float[Array, "B V"], SequenceMemory]:
    """Logits of what follows a token of each row that is there, the same on every device."""

    def local(
        model: WritingModel, memory: SequenceMemory, tokens: Array, is_there: Array
    ) -> tuple[tuple[Array], SequenceMemory]:
        logits, memory = model.advance(tokens[:, None], memory, vary(is_there))
        return (logits[:, :vocab],), memory

    (logits,), memory = _by_row(local, (model, memory), tokens, is_there)
    return logits, memory


def _score(
    vocab: int,
    model: Steps,
    tokens: Int[Array, "B S"],
    targets: Int[Array, "B S"],
    counts: Int[Array, "B"],
    *,
    top: int,
) -> tuple[Array, Array, Array]:
    """As `Steps.score`, the same on every device."""

    def local(model: Steps, tokens: Array, targets: Array, counts: Array) -> tuple[tuple[Array, ...], tuple[()]]:
        return model.score(tokens, targets, counts, vocab, top), ()

    logprobs, best, values = _by_row(local, (model,), tokens, targets, counts)[0]
    return logprobs, best, values


def _by_row(
    local: Callable[..., tuple[tuple[Array, ...], PyTree]], held: tuple[PyTree, ...], *rows: Array
) -> tuple[tuple[Array, ...], PyTree]:
    """What a function makes on each device of what it holds and of its part of the rows: arrays by row, the same on
    every device then, and what it holds from now on."""
    rules = current()
    own, split = PartitionSpec(rules.manual), PartitionSpec(rules.batch)
    # devices along the others have the same rows, and are to be typed so
    others = tuple(axis for axis in rules.manual if axis not in rules.batch)

    def run(*given: PyTree) -> tuple[tuple[Array, ...], PyTree]:
        found, holds = local(*given)
        return tuple(largest(vary(array), others) for array in found), holds

    specs = (*(own for _ in held), *(split for _ in rows))
    found, holds = region(run, specs, (split, own))(*held, *(jax.sharding.reshard(array, split) for array in rows))
    return tuple(jax.sharding.reshard(array, PartitionSpec()) for array in found), holds
