"""What is served, without a network: requests become work for the engine, and its tokens answers."""

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Integer

from jaxtron.config import UserError
from jaxtron.generate.batch import GrowingSequence, Grown
from jaxtron.generate.opening import SpeakingModel
from jaxtron.serve.answers import AnswerWriter, TokenScore, TokenTexts, scored
from jaxtron.serve.bodies import AskedText, setting_error
from jaxtron.serve.errors import ApiError
from jaxtron.serve.request import Limits
from jaxtron.serve.worker import RequestedWork, Scores, Worker


@dataclass(frozen=True)
class _Growth:
    """A token of the choice of this number."""

    index: int
    grown: Grown


@dataclass(frozen=True)
class _Scores:
    """Those of the request's prompts."""

    scores: Scores


@dataclass
class _Choice:
    """One answer while it grows; `echo` is its prompt, where that is part of it."""

    prompt: Integer[np.ndarray, "P"]
    echo_text: str = ""
    echo: list[TokenScore] = field(default_factory=list)
    text: str = ""
    tokens: list[TokenScore] = field(default_factory=list)
    reason: str | None = None


class Service:
    """A model that answers; its methods but `health` and `stop` are for one event loop."""

    def __init__(self, model: SpeakingModel, name: str, limits: Limits):
        self.name, self.limits = name, limits
        self.worker = Worker(model.engine, most_waiting=limits.waiting)
        self.created = int(time.time())
        self._model = model
        self._texts = TokenTexts(model.tokenizer)
        # tokenizers keep caches that are not for two threads at once
        self._lock = threading.Lock()

    async def answer(self, asked: AskedText) -> dict[str, Any]:
        """The whole answer; whoever waits for it no more cancels it."""
        reply = await self.begin(asked)
        async for _ in reply.grown():
            pass
        return reply.whole()

    async def begin(self, asked: AskedText) -> "Reply":
        """Hands a request to the engine; an `ApiError` for one that cannot be."""
        return Reply(self, asked, *await asyncio.to_thread(self._prepare, asked))

    def _prepare(self, asked: AskedText) -> tuple[list[_Choice], list[GrowingSequence], int]:
        with self._lock:
            try:
                return self._prepared(asked)
            except UserError as error:
                raise setting_error(error) from None

    def _prepared(self, asked: AskedText) -> tuple[list[_Choice], list[GrowingSequence], int]:
        model = self._model
        wanted = asked.max_tokens
        limit = self.limits.new_tokens
        if limit is not None and (wanted or 0) > limit:
            raise ApiError(400, f"max_tokens {wanted} is more than the {limit} that are answered", param="max_tokens")
        settings = model.settings(**asked.sampling, **self._lengths(asked))
        prompts = self._prompts(asked)
        if asked.is_chat:
            settings = model.chat.ending(settings)
        fresh = secrets.randbits(32)
        choices, sequences = [], []
        for prompt in prompts:
            if self.limits.prompt_tokens is not None and len(prompt) > self.limits.prompt_tokens:
                most = f"{len(prompt):,} tokens: at most {self.limits.prompt_tokens:,} are taken"
                raise ApiError(400, f"prompt has {most}", param="prompt", code="context_length_exceeded")
            model.check_prompt(prompt, wanted)
            for number in range(asked.n):
                choice = _Choice(prompt)
                if asked.echo:
                    choice.echo_text = model.tokenizer.decode(prompt)
                choices.append(choice)
                if wanted == 0:
                    continue
                own = settings.seeded(fresh, number)
                stream = model.stream(
                    prompt, own, goes_on=not asked.is_chat, shows_special=not asked.skip_special_tokens
                )
                sequences.append(GrowingSequence(prompt, own, stream, _nobody))
        return choices, sequences, sum(map(len, prompts))

    def _lengths(self, asked: AskedText) -> dict[str, int]:
        # a model's own default of a length is for those who say none
        if asked.max_tokens:
            return {"max_new_tokens": asked.max_tokens}
        return {} if self.limits.new_tokens is None else {"max_new_tokens": self.limits.new_tokens}

    def _prompts(self, asked: AskedText) -> list[Integer[np.ndarray, "_"]]:
        if asked.is_chat:
            return [self._model.chat.encode(asked.messages)]
        return [self._ids(prompt, asked.add_special_tokens) for prompt in asked.prompts]

    def _ids(self, prompt: str | tuple[int, ...], adds_special: bool) -> Integer[np.ndarray, "P"]:
        if not isinstance(prompt, str):
            return np.array(prompt, np.int32)
        if adds_special:
            return self._model.encode(prompt)
        return np.asarray(self._model.tokenizer.encode(prompt), np.int32)

    def tokenize(self, text: str, adds_special: bool) -> list[int]:
        """The ids of a text."""
        with self._lock:
            try:
                return self._ids(text, adds_special).tolist()
            except UserError as error:
                raise ApiError(400, str(error), param="prompt") from None

    def detokenize(self, tokens: list[int]) -> str:
        """The text of ids."""
        with self._lock:
            return self._model.tokenizer.decode(np.array(tokens, np.int64))

    def tokenizer_info(self) -> dict[str, Any]:
        """The special tokens by their roles, and the chat template."""
        special: dict[str, str | None] = dict(self._model.tokenizer.special_tokens)
        for role in ("eos_token", "bos_token", "pad_token"):
            special.setdefault(role, "" if role == "eos_token" else None)
        has_template = self._model.configuration.chat is not None
        return {**special, "chat_template": self._model.chat.source if has_template else None}

    @property
    def room(self) -> int:
        """Tokens of a prompt and its answer."""
        return self._model.engine.room

    def writer(self, asked: AskedText, num_prompt_tokens: int) -> AnswerWriter:
        """What writes a request's answer."""
        return AnswerWriter(asked, self._texts, self.name, num_prompt_tokens)


class Reply:
    """The answer to one request as it grows, in an event loop; `close` it in any case."""

    def __init__(
        self,
        service: Service,
        asked: AskedText,
        choices: list[_Choice],
        sequences: list[GrowingSequence],
        num_prompt: int,
    ):
        self._worker = service.worker
        self._asked = asked
        self._choices = choices
        self._writer = service.writer(asked, num_prompt)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[_Growth | _Scores | ApiError] = asyncio.Queue()
        self._num_open = len(sequences)
        for index, sequence in enumerate(sequences):
            sequence.grow = self._taker(index)
        needs_scores = asked.echo and "logprobs" in asked.sampling
        self._is_scoring = needs_scores
        self._work = RequestedWork(
            sequences,
            self._put,
            time.monotonic() + service.limits.seconds,
            # the answers to one prompt echo the same
            prompts=[choice.prompt for choice in choices[:: asked.n]] if needs_scores else [],
            top=max(1, asked.sampling.get("logprobs", 1)),
            scored=(lambda scores: self._put(_Scores(scores))) if needs_scores else None,
        )
        self._worker.submit(self._work)

    def close(self) -> None:
        """Ends what is left of it."""
        self._worker.cancel(self._work)

    async def grown(self) -> AsyncGenerator[tuple[int, Grown], None]:
        """Each token with the number of its choice; an `ApiError` where it ends early."""
        try:
            while self._num_open or self._is_scoring:
                event = await self._events.get()
                if isinstance(event, ApiError):
                    raise event
                if isinstance(event, _Scores):
                    self._take_scores(event.scores)
                    continue
                index, grown = event.index, event.grown
                choice = self._choices[index]
                choice.text += grown.text
                choice.tokens.append(scored(grown))
                choice.reason = grown.finish_reason
                self._num_open -= grown.finish_reason is not None
                yield index, grown
        finally:
            self.close()

    def whole(self) -> dict[str, Any]:
        """The answer, once all has grown."""
        choices: list[tuple[str, list[TokenScore], str | None]] = [
            (choice.echo_text + choice.text, [*choice.echo, *choice.tokens], choice.reason or "length")
            for choice in self._choices
        ]
        return self._writer.whole(choices, self._num_tokens)

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in pieces, each as soon as there is one."""
        is_scored = "logprobs" in self._asked.sampling
        offsets = [0] * len(self._choices)
        for index, choice in enumerate(self._choices):
            if self._asked.is_chat:
                yield self._writer.role_chunk(index)
            elif choice.echo_text and not is_scored:
                yield self._writer.chunk(index, choice.echo_text, [], None)
        is_echoed = not (self._asked.echo and is_scored)
        async for index, grown in self.grown():
            if not is_echoed:
                is_echoed = True
                for number, choice in enumerate(self._choices):
                    yield self._writer.chunk(number, choice.echo_text, choice.echo, None)
                    offsets[number] = self._writer.length(choice.echo)
            if grown.text or is_scored or grown.finish_reason is not None:
                tokens = [scored(grown)] if is_scored else []
                yield self._writer.chunk(index, grown.text, tokens, grown.finish_reason, offset=offsets[index])
                offsets[index] += self._writer.length(tokens)
        if not self._work.sequences:
            for number, choice in enumerate(self._choices):
                yield self._writer.chunk(number, "" if is_echoed else choice.echo_text, choice.echo, "length")
        if self._asked.include_usage:
            yield self._writer.usage_chunk(self._num_tokens)

    @property
    def _num_tokens(self) -> int:
        return sum(len(choice.tokens) for choice in self._choices)

    def _take_scores(self, scores: Scores) -> None:
        self._is_scoring = False
        for number, choice in enumerate(self._choices):
            logprobs, ids, best = scores[number // self._asked.n]
            top = [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), best.tolist(), strict=True)]
            rest = zip(choice.prompt[1:].tolist(), logprobs.tolist(), top, strict=True)
            choice.echo = [(int(choice.prompt[0]), None, ()), *rest]

    def _taker(self, index: int) -> Callable[[Grown], None]:
        return lambda grown: self._put(_Growth(index, grown))

    def _put(self, event: _Growth | _Scores | ApiError) -> None:
        # from the engine's thread; of a loop that has ended nobody waits
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


def _nobody(grown: Grown) -> None:
    """Takes a token that nobody waits for yet."""
