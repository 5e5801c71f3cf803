"""Conversations as prompts: written by the model's template, with no turn forged by what somebody says."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Integer

from jaxtron.config import UserError
from jaxtron.data.chat.template import ChatMl, Conversation, Message, Refusal, open_template
from jaxtron.data.chat.tokens import encode_prompt, tokens_to_insert
from jaxtron.data.config import ChatConfig
from jaxtron.data.tokenizers import Tokenizer
from jaxtron.generate.settings import SamplingSettings
from jaxtron.words import NO_TEXT, is_whole_text

NO_TEMPLATE = "the model has no chat template; give one with --chat_template FILE, or prompts that are plain text"


class ChatPrompts:
    """Writes conversations for a model to answer; `UserError` where the template cannot be used."""

    def __init__(self, config: ChatConfig | None, tokenizer: Tokenizer):
        if config is None:
            raise UserError(NO_TEMPLATE)
        self._template = open_template(config, tokenizer)
        self.source = self._template.source
        self._tokenizer = tokenizer
        self._tokens = tokens_to_insert(self._template.tokens, tokenizer)
        # of ChatML the end of a turn, which is the tokenizer's end of a document of other templates
        self._end = self._template.markers[1] if isinstance(self._template, ChatMl) else None

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> Integer[np.ndarray, "P"]:
        """The ids of a conversation that an answer is to follow; a `UserError` for what is no conversation."""
        turns = [self._message(number, message) for number, message in enumerate(messages)]
        if not turns:
            raise UserError("messages is empty: a conversation has at least one")
        try:
            text = self._template.prompt(Conversation(turns))
        except Refusal as error:
            raise UserError(f"messages: the chat template refuses them: {error}") from None
        return encode_prompt(text, tokenizer=self._tokenizer, tokens=self._tokens)

    def ending(self, settings: SamplingSettings) -> SamplingSettings:
        """Settings with which an answer ends where its turn does."""
        if self._end is None:
            return settings
        token = self._tokenizer.token_id(self._end)
        if token is None:
            return replace(settings, stop=(*settings.stop, self._end))
        return replace(settings, stop_token_ids=(*settings.stop_token_ids, token))

    def _message(self, number: int, message: Mapping[str, Any]) -> Message:
        role, content = message.get("role"), message.get("content")
        for name, value in (("role", role), ("content", content)):
            if not isinstance(value, str):
                raise UserError(f"messages[{number}].{name} must be a text")
            if not is_whole_text(value):
                raise UserError(f"messages[{number}].{name} {NO_TEXT}")
        extras = {name: value for name, value in message.items() if name not in ("role", "content")}
        for name in extras:
            if not self._template.reads(name):
                raise UserError(f"messages[{number}].{name} has no effect: the chat template does not read it")
        for marker in self._template.markers:
            if marker and (marker in str(content) or marker in str(role)):
                raise UserError(f"messages[{number}] has {marker!r} in it, which would forge a turn")
        return Message(str(role), str(content), extras=extras)
