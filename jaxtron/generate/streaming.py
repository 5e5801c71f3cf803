"""Tokens to text, piece by piece, as they come: no broken characters, and nothing of a text that ends before it.

The pieces of an answer, joined, are what the tokenizer makes of all its tokens. For a tokenizer may write a token in
another way after others (a space between words, a character in several tokens), a piece is the difference of two texts:
that of a window of tokens with the new ones, and without.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Integer

from jaxtron.data.tokenizers import Tokenizer
from jaxtron.generate.settings import SamplingSettings

FinishReason = Literal["stop", "length"]
# what stands for bytes that are no character, or not yet
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# bytes of a character that may lack its last one
MOST_MISSING = 3
# a character has four bytes at most, each perhaps in a token: so many without an end are none
MOST_HELD = 32
# tokens of a prompt that tell how what follows is written
CONTEXT = 8


class TextStream:
    """The text of tokens that come one by one, after `before`, whose text is not part of it."""

    def __init__(self, tokenizer: Tokenizer, *, before: Integer[np.ndarray, "P"] | None = None):
        self._tokenizer = tokenizer
        self._window: list[int] = [] if before is None else before[-CONTEXT:].tolist()
        # tokens of the window whose text is out, and that text
        self._read = len(self._window)
        self._written = self._decode(self._window)

    def push(self, token: int) -> str:
        """The text that is certain with this token; empty inside a character."""
        self._window.append(token)
        text = self._decode(self._window)
        end = len(text.rstrip(REPLACEMENT))
        open_bytes = min(len(text) - end, MOST_MISSING)
        if open_bytes and len(self._window) - self._read < MOST_HELD:
            certain = text[: len(text) - open_bytes]
            piece = certain[len(self._written) :] if certain.startswith(self._written) else ""
            self._written += piece
            return piece
        if not text.startswith(self._written):
            return self._move(self._decode(self._window[self._read :]))
        # a token without text, such as a space that another has to follow, is not read yet
        piece = text[len(self._written) :]
        return self._move(piece) if piece else ""

    def finish(self) -> str:
        """What was held back, now that nothing follows: bytes that are no character come out as its replacement."""
        text = self._decode(self._window)
        known = text.startswith(self._written)
        return self._move(text[len(self._written) :] if known else self._decode(self._window[self._read :]))

    def _move(self, piece: str) -> str:
        """The piece, which is read; its tokens are what the next one is written after."""
        # after nothing but spaces some tokenizers would write as at the beginning of a text
        if piece.strip() or len(self._window) >= MOST_HELD:
            self._window = self._window[self._read :]
        self._read = len(self._window)
        self._written = self._decode(self._window)
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(np.array(tokens, np.int64))


class StopSearch:
    """Text as it comes, up to the first of the `stops`; of what may be the beginning of one nothing is given."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str, *, searched: bool = True) -> str:
        """The text that no stop begins in; `searched` is false where none counts yet."""
        if self.found is not None:
            return ""
        text = self._held + piece
        if not searched:
            self._held = ""
            return text
        places = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            place, self.found = min(places)
            self._held = ""
            return text[:place]
        kept = self._beginning(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """What was held back, for no stop came of it."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a stop."""
        longest = max(map(len, self._stops), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)


class AnswerStream:
    """One answer: its tokens, and its text in pieces, until something ends it.

    `hidden` are tokens that have no text, such as those of a chat template; `before` is the prompt where the text goes
    on from it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: SamplingSettings,
        *,
        room: int,
        hidden: frozenset[int] = frozenset(),
        before: Integer[np.ndarray, "P"] | None = None,
    ):
        self._settings = settings
        self._hidden = hidden
        self._ends = frozenset(settings.ends)
        self._limit = room if settings.max_new_tokens is None else min(room, settings.max_new_tokens)
        self._text = TextStream(tokenizer, before=before)
        self._stops = StopSearch(settings.stop)
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    def push(self, token: int) -> str:
        """The text that is certain with this token; `finish_reason` says whether it was the last."""
        assert self.finish_reason is None
        self.num_tokens += 1
        is_end = token in self._ends
        piece = "" if is_end or token in self._hidden else self._text.push(token)
        if is_end or self.num_tokens >= self._limit:
            self.finish_reason = "stop" if is_end else "length"
            piece += self._text.finish()
        text = self._stops.push(piece, searched=self.num_tokens > self._settings.min_new_tokens)
        if self._stops.found is not None:
            self.finish_reason = "stop"
        return text if self.finish_reason is None else text + self._stops.finish()


def hidden_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids of a tokenizer's special tokens, which are no text of an answer."""
    ids = (tokenizer.token_id(text) for text in tokenizer.special_texts)
    return frozenset(token for token in ids if token is not None)
