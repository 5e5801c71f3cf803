"""Answers in OpenAI's form: whole ones and chunks, with log-probabilities where they are wanted."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtron.data.tokenizers import Tokenizer
from jaxtron.generate.batch import Grown
from jaxtron.serve.bodies import AskedText

# a token, its log-probability (None of the first of a prompt), and the best ones of its place
TokenScore = tuple[int, float | None, Sequence[tuple[int, float]]]


class TokenTexts:
    """The text of single tokens, special ones too."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = {tokenizer.token_id(text): text for text in tokenizer.special_texts}

    def __getitem__(self, token: int) -> str:
        return self._special.get(token) or self._tokenizer.decode(np.array([token], np.int64))


class AnswerWriter:
    """Writes what one request is answered."""

    def __init__(self, asked: AskedText, texts: TokenTexts, model: str, num_prompt_tokens: int):
        self._asked = asked
        self._texts = texts
        self._num_prompt_tokens = num_prompt_tokens
        self._is_scored = "logprobs" in asked.sampling
        kind = "chat.completion" if asked.is_chat else "text_completion"
        self._head = {"object": kind, "created": int(time.time()), "model": model}
        self._id = f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, choices: list[tuple[str, list[TokenScore], str | None]], num_tokens: int) -> dict[str, Any]:
        """The answer of all choices: their texts, their tokens, and why they ended."""
        found = []
        for index, (text, tokens, reason) in enumerate(choices):
            said: dict[str, Any] = {"text": text}
            if self._asked.is_chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            found.append({"index": index, **said, "logprobs": self._logprobs(tokens, 0), "finish_reason": reason})
        return {"id": self._id, **self._head, "choices": found, "usage": self._usage(num_tokens)}

    def chunk(
        self, index: int, text: str, tokens: list[TokenScore], reason: str | None, *, offset: int = 0
    ) -> dict[str, Any]:
        """A piece of one choice's answer; `offset` are the characters of its tokens before."""
        said: dict[str, Any] = {"text": text}
        if self._asked.is_chat:
            said = {"delta": {"content": text} if text or reason is None else {}}
        logprobs = self._logprobs(tokens, offset) if tokens else None
        return self._chunk([{"index": index, **said, "logprobs": logprobs, "finish_reason": reason}])

    def role_chunk(self, index: int) -> dict[str, Any]:
        """The first chunk of a choice of a chat."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def usage_chunk(self, num_tokens: int) -> dict[str, Any]:
        """The last chunk, where it is wanted."""
        return self._chunk([]) | {"usage": self._usage(num_tokens)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = self._head | ({"object": "chat.completion.chunk"} if self._asked.is_chat else {})
        return {"id": self._id, **head, "choices": choices}

    def _usage(self, num_tokens: int) -> dict[str, int]:
        prompt = self._num_prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": num_tokens, "total_tokens": prompt + num_tokens}

    def length(self, tokens: Sequence[TokenScore]) -> int:
        """Characters of tokens, each by itself."""
        return sum(len(self._texts[token]) for token, _, _ in tokens)

    def _logprobs(self, tokens: list[TokenScore], offset: int) -> dict[str, Any] | None:
        if not self._is_scored:
            return None
        if self._asked.is_chat:
            return {"content": [self._chat_entry(*one) for one in tokens], "refusal": None}
        texts = [self._texts[token] for token, _, _ in tokens]
        ends = np.cumsum([offset, *map(len, texts)]).tolist()
        return {
            "tokens": texts,
            "token_logprobs": [logprob for _, logprob, _ in tokens],
            "top_logprobs": [self._top(*one) for one in tokens],
            "text_offset": ends[:-1],
        }

    def _top(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> dict[str, float] | None:
        if logprob is None:
            return None
        found: dict[str, float] = {}
        # of two tokens with one text the better one counts
        for other, value in (*self._wanted(top), (token, logprob)):
            found[self._texts[other]] = max(value, found.get(self._texts[other], value))
        return found

    def _chat_entry(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> dict[str, Any]:
        best = [self._entry(other, value) for other, value in self._wanted(top)]
        return self._entry(token, logprob) | {"top_logprobs": best}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._texts[token]
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", errors="replace"))}

    def _wanted(self, top: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
        return top[: self._asked.sampling["logprobs"]]


def scored(grown: Grown) -> TokenScore:
    """A token of an answer."""
    return grown.token, grown.logprob, grown.top
