"""How a conversation is written out, and which of its characters the model is to write itself."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtron.config import UserError, expand_home
from jaxtron.data.chat.sandbox import Refusal, make_environment, spending
from jaxtron.data.config import ChatConfig
from jaxtron.data.files.reader import read_document
from jaxtron.data.tokenizers import Tokenizer

try:
    import jinja2
    import jinja2.nodes
except ImportError:
    jinja2 = None

ASSISTANT = "assistant"
# what `{% generation %}` becomes in the text written, and is taken out of it again
_BEGIN, _END = "\0generation\0", "\0endgeneration\0"
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_MARKS = re.compile(f"({_BEGIN}|{_END})")


@dataclass(frozen=True)
class Message:
    """One turn: who speaks (system, user, assistant, tool ...) and what is said."""

    role: str
    content: str
    is_learned: bool = True
    """Whether this turn, if it is an answer, has loss."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """What else the turn comes with, such as `tool_calls`, for templates that write it."""


@dataclass(frozen=True)
class Conversation:
    """Turns in order."""

    messages: Sequence[Message]
    extras: Mapping[str, Any] = field(default_factory=dict)
    """What else came with them, such as `tools`, for templates that write it."""
    unread: tuple[str, ...] = ()
    """Keys that came with it and that nothing reads."""


@dataclass(frozen=True)
class Piece:
    """Text that is to be learned, with the mark that ends it, or text that is not."""

    text: str
    is_answer: bool


@runtime_checkable
class ChatTemplate(Protocol):
    """From conversations to pieces of text."""

    @property
    def fingerprint(self) -> str:
        """Equal for two templates exactly when they write alike."""
        ...

    @property
    def source(self) -> str:
        """The template in Jinja's language."""
        ...

    @property
    def markers(self) -> tuple[str, ...]:
        """What no message may contain, since it would forge a turn."""
        ...

    @property
    def tokens(self) -> tuple[str, ...]:
        """Texts that are each one token of the tokenizer where it has such a token."""
        ...

    def reads(self, name: str) -> bool:
        """Whether what a conversation or a turn has under this name may be written."""
        ...

    def render(self, conversation: Conversation) -> list[Piece]:
        """The text in pieces, up to the last answer or beyond.

        `Refusal` if the template wants none of this conversation; `UserError` if the template itself is at fault.
        """
        ...

    def prompt(self, conversation: Conversation) -> str:
        """The text of all turns and the beginning of an answer, for a model to go on from; errors as `render`'s."""
        ...


class ChatMl:
    """`<|im_start|>role`, a line feed, the content, `<|im_end|>`, a line feed; `<|im_end|>` is part of an answer.

    The markers should be tokens of the tokenizer.
    """

    fingerprint = "chatml"
    source = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    markers = ("<|im_start|>", "<|im_end|>")
    tokens = markers

    def reads(self, name: str) -> bool:
        return False

    def render(self, conversation: Conversation) -> list[Piece]:
        start, end = self.markers
        pieces, prompt = [], ""
        for message in conversation.messages:
            prompt += f"{start}{message.role}\n"
            if message.role == ASSISTANT and message.is_learned:
                pieces += [Piece(prompt, False), Piece(message.content + end, True)]
                prompt = "\n"
            else:
                prompt += f"{message.content}{end}\n"
        return [*pieces, Piece(prompt, False)]

    def prompt(self, conversation: Conversation) -> str:
        start, end = self.markers
        turns = [f"{start}{message.role}\n{message.content}{end}\n" for message in conversation.messages]
        return "".join([*turns, f"{start}{ASSISTANT}\n"])


class JinjaTemplate:
    """A Jinja template as `tokenizer_config.json` files have it; needs `pip install "jaxtron[chat]"`.

    It is given `messages`, `add_generation_prompt`, the conversation's extras (`tools`) and `variables` (`eos_token`).
    Other names may be tested, as in `{% if tools %}`; to write one is a `UserError`. What it writes of `special` texts,
    and of variables named `..._token`, are tokens, which no message may contain.

    With `{% generation %}` in it, what is written inside is an answer. Else, what it writes up to an answer must be how
    it writes the conversation before it with `add_generation_prompt`, and the answer is what it writes after that, less
    white space at the end; a template that rewrites earlier turns is then a `UserError`.
    """

    def __init__(
        self,
        source: str,
        *,
        variables: Mapping[str, Any] | None = None,
        markers: Sequence[str] = (),
        special: Collection[str] = (),
    ):
        if jinja2 is None:
            raise UserError('a Jinja chat template needs the package jinja2: pip install "jaxtron[chat]"')
        self.source = source
        environment = make_environment({"generation": _mark})
        marked, num_tags = _GENERATION.subn(_as_call, source)
        try:
            parsed = environment.parse(marked)
            self._template = environment.from_string(marked)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"line {error.lineno} of the chat template: {error.message}; mend the template") from error
        kinds = ((jinja2.nodes.Name, "name"), (jinja2.nodes.Getattr, "attr"), (jinja2.nodes.Const, "value"))
        self._words = {getattr(node, field) for kind, field in kinds for node in parsed.find_all(kind)}
        self._marks_answers = num_tags > 0
        self._variables = {name: value for name, value in (variables or {}).items() if self.reads(name)}
        named = [value for name, value in self._variables.items() if name.endswith("_token")]
        written = [text for text in sorted(special) if text in source]
        self.tokens = tuple(dict.fromkeys(text for text in (*named, *written) if isinstance(text, str) and text))
        self.markers = tuple(dict.fromkeys([*markers, *self.tokens, _BEGIN, _END]))
        description = json.dumps([source, sorted(self._variables.items()), self.markers], default=str)
        self.fingerprint = f"jinja:{hashlib.sha256(description.encode()).hexdigest()}"

    def reads(self, name: str) -> bool:
        return name in self._words

    def render(self, conversation: Conversation) -> list[Piece]:
        answers = [message for message in conversation.messages if message.role == ASSISTANT]
        if self._marks_answers:
            return self._render_marked(conversation, answers)
        pieces, written = [], ""
        for number, message in enumerate(conversation.messages):
            if message.role != ASSISTANT:
                continue
            prompt = self._prompt(conversation, number)
            whole = self._write(conversation, number + 1, prompting=False)
            if not (prompt.startswith(written) and whole.startswith(prompt)):
                raise UserError(
                    f"the template writes the conversation before message {number + 1} in another way than with it; "
                    "use a template that only appends, or mark its answers with {% generation %}"
                )
            answer = whole[len(prompt) :].rstrip()
            pieces += [Piece(prompt[len(written) :], False), Piece(answer, message.is_learned)]
            written = prompt + answer
        return pieces

    def prompt(self, conversation: Conversation) -> str:
        return _MARKS.sub("", self._write(conversation, len(conversation.messages), prompting=True))

    def _render_marked(self, conversation: Conversation, answers: Sequence[Message]) -> list[Piece]:
        text = self._write(conversation, len(conversation.messages), prompting=False)
        # text, mark, text, mark ...: every other text is inside
        parts = _MARKS.split(text)
        inside = len(parts) // 4
        if inside != len(answers) and not all(answer.is_learned for answer in answers):
            raise UserError(
                f"turns of the assistant: {len(answers)}, but the chat template marks {inside} as answers, so that "
                "it is unknown which have weight 0; mark each turn once"
            )
        is_learned = [answer.is_learned for answer in answers] if inside == len(answers) else [True] * inside
        return [Piece(part, bool(place % 2) and is_learned[place // 2]) for place, part in enumerate(parts[::2])]

    def _prompt(self, conversation: Conversation, count: int) -> str:
        try:
            return self._write(conversation, count, prompting=True)
        except UserError as error:
            if count:
                raise
            # many templates look at the first message, whatever it is
            raise Refusal(f"it begins with an answer ({error})") from error

    def _write(self, conversation: Conversation, count: int, *, prompting: bool) -> str:
        """The first `count` messages as the template writes them."""
        assert jinja2 is not None
        turns = [
            {**message.extras, "role": message.role, "content": message.content}
            for message in conversation.messages[:count]
        ]
        # transformers gives these two names to every template
        names = {"tools": None, "documents": None, **self._variables, **conversation.extras}
        try:
            with spending():
                return self._template.render(names, messages=turns, add_generation_prompt=prompting)
        except Refusal:
            raise
        except jinja2.UndefinedError as error:
            raise UserError(
                f"the chat template writes what has no value: {error.message}; give such a name as "
                "--data.chat.variables.NAME VALUE, or mend the template"
            ) from error
        # a template is a program, and may fail like one
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise UserError(f"the chat template cannot write it: {error}; mend the template") from error


def open_template(config: ChatConfig, tokenizer: Tokenizer) -> ChatTemplate:
    """The template that the settings name, with the special tokens of the tokenizer; `UserError` for bad settings."""
    if config.template is None:
        for name in ("variables", "markers"):
            if getattr(config, name):
                raise UserError(f"data.chat.{name} has no effect on ChatML; leave it out, or give data.chat.template")
        return ChatMl()
    path = Path(expand_home(config.template))
    source = read_document(path)
    if path.suffix == ".json":
        source = _declared_template(path, source)
    template = JinjaTemplate(
        source,
        variables={**tokenizer.special_tokens, **config.variables},
        markers=config.markers,
        special=tokenizer.special_texts,
    )
    for name, value in config.variables.items():
        if not template.reads(name):
            raise UserError(f"data.chat.variables.{name} has no effect: {path} does not name it; leave it out")
        if name.endswith("_token") and value and tokenizer.token_id(str(value)) is None:
            raise UserError(
                f"data.chat.variables.{name} {value} is no token of the tokenizer; give the text of one that it has"
            )
    return template


def _declared_template(path: Path, content: str) -> str:
    """`chat_template` of a tokenizer_config.json: a text, or a list of texts with names."""
    try:
        found = json.loads(content)["chat_template"]
        if isinstance(found, list):
            found = next(entry["template"] for entry in found if entry["name"] == "default")
    except (ValueError, LookupError, TypeError, StopIteration, RecursionError):
        found = None
    if not isinstance(found, str):
        raise UserError(f"{path} has no chat_template; give a file that is a Jinja template, or has one")
    return found


def _mark(caller) -> str:
    return f"{_BEGIN}{caller()}{_END}"


def _as_call(tag: re.Match) -> str:
    """`{% generation %}` and its end as the tags of a call, with their control of white space."""
    before, end, after = tag.groups()
    return f"{{%{before} {'endcall' if end else 'call generation()'} {after}%}}"
