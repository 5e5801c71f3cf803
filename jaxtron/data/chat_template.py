"""How a conversation is written out, and which of its characters the model is to write itself.

Each piece of text is encoded by itself, so an answer's ids are those the model gives when it writes after the prompt.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtron.config import UserError

try:
    import jinja2
    import jinja2.sandbox
except ImportError:
    jinja2 = None

ASSISTANT = "assistant"


@dataclass(frozen=True)
class Message:
    """One turn: who speaks (system, user, assistant, tool ...) and what is said."""

    role: str
    content: str


@dataclass(frozen=True)
class Piece:
    """Text that is an answer, with the mark that ends it, or text that is none."""

    text: str
    is_answer: bool


class ChatTemplate(Protocol):
    """From messages to pieces of text."""

    @property
    def fingerprint(self) -> str:
        """Equal for two templates exactly when they write alike."""
        ...

    @property
    def markers(self) -> tuple[str, ...]:
        """What no message may contain, since it would forge a turn."""
        ...

    def render(self, messages: Sequence[Message]) -> list[Piece]:
        """The conversation's text in pieces; ValueError says why it cannot be written."""
        ...


class ChatMl:
    """`<|im_start|>role`, a line feed, the content, `<|im_end|>`, a line feed; `<|im_end|>` is part of an answer.

    The markers should be tokens of the tokenizer.
    """

    fingerprint = "chatml"
    markers = ("<|im_start|>", "<|im_end|>")

    def render(self, messages: Sequence[Message]) -> list[Piece]:
        start, end = self.markers
        pieces, prompt = [], ""
        for message in messages:
            prompt += f"{start}{message.role}\n"
            if message.role == ASSISTANT:
                pieces += [Piece(prompt, False), Piece(message.content + end, True)]
                prompt = "\n"
            else:
                prompt += f"{message.content}{end}\n"
        return [*pieces, Piece(prompt, False)]


class JinjaTemplate:
    """A Jinja template as `tokenizer_config.json` files have it; needs `pip install "jaxtron[chat]"`.

    It is given `messages`, `add_generation_prompt` and `tokens` such as `bos_token` and `eos_token`. What it writes up
    to an answer must be how it writes the conversation before it with `add_generation_prompt`; the answer is what it
    writes after that, less white space at the end. A template that rewrites earlier turns is an error.
    """

    def __init__(self, source: str, *, tokens: Mapping[str, str] | None = None, markers: Sequence[str] = ()):
        if jinja2 is None:
            raise UserError('a Jinja chat template needs the package jinja2: pip install "jaxtron[chat]"')
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"line {error.lineno} of the chat template: {error.message}; mend the template") from error
        self._tokens = dict(tokens or {})
        self._error = jinja2.TemplateError
        self.markers = tuple(markers)
        description = json.dumps([source, sorted(self._tokens.items()), self.markers])
        self.fingerprint = f"jinja:{hashlib.sha256(description.encode()).hexdigest()}"

    def render(self, messages: Sequence[Message]) -> list[Piece]:
        pieces, written = [], ""
        for number, message in enumerate(messages):
            if message.role != ASSISTANT:
                continue
            prompt = self._write(messages[:number], prompting=True)
            whole = self._write(messages[: number + 1], prompting=False)
            if not (prompt.startswith(written) and whole.startswith(prompt)):
                raise ValueError(
                    f"the template writes the conversation before message {number} in another way than with it; "
                    "use a template that only appends"
                )
            answer = whole[len(prompt) :].rstrip()
            pieces += [Piece(prompt[len(written) :], False), Piece(answer, True)]
            written = prompt + answer
        return pieces

    def _write(self, messages: Sequence[Message], *, prompting: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=prompting, **self._tokens)
        except self._error as error:
            raise ValueError(f"the chat template cannot write it: {error}") from error


def _raise(message: str) -> None:
    """What templates call when a conversation is not as they want it."""
    assert jinja2 is not None
    raise jinja2.TemplateError(message)
