"""T5's texts as tokens: sentinels by the names that they have in the released vocabularies, whatever the tokenizer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from jaxtron.data.tokenizers import Tokenizer
from jaxtron.models.answers import AnswerText
from jaxtron.models.t5.config import T5Config
from jaxtron.models.t5.data import special_tokens

SENTINEL = re.compile(r"<extra_id_(\d+)>")


def answer_text(config: T5Config, tokenizer: Tokenizer, begin: int | None, end: int | None) -> AnswerText:
    """What answers begin and end with as a model's own files say, both (else: as it is trained here), and its
    sentinels.

    `UserError` where the vocabulary has no room for the special tokens of a training.
    """
    named = [tokenizer.token_id(_named(number)) for number in range(config.denoising.sentinels)]
    if begin is not None and end is not None:
        # it came with all that it has
        return AnswerText(tokenizer, begin, end, frozenset(token for token in named if token is not None))
    vocabulary = special_tokens(config, tokenizer).vocabulary
    known = tokenizer if named[0] is not None else SentinelTokenizer(tokenizer, vocabulary.sentinels)
    return AnswerText(known, vocabulary.begin, vocabulary.end, frozenset(vocabulary.sentinels))


@dataclass(frozen=True)
class SentinelTokenizer:
    """A tokenizer of text, and sentinels of ids that it has not."""

    text: Tokenizer
    sentinels: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.text.vocab_size, *(number + 1 for number in self.sentinels))

    @property
    def end_of_document(self) -> int | None:
        """The text's."""
        return self.text.end_of_document

    @property
    def pad(self) -> int | None:
        """The text's."""
        return self.text.pad

    @property
    def fingerprint(self) -> str:
        """With the sentinels."""
        return f"{self.text.fingerprint} {self.sentinels}"

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The text's."""
        return self.text.special_tokens

    @property
    def special_texts(self) -> frozenset[str]:
        """With those of the sentinels."""
        return self.text.special_texts | {_named(number) for number in range(len(self.sentinels))}

    def token_id(self, text: str) -> int | None:
        """The id of the token of exactly this text."""
        found = SENTINEL.fullmatch(text)
        if found and int(found[1]) < len(self.sentinels):
            return self.sentinels[int(found[1])]
        return self.text.token_id(text)

    def encode(self, text: str) -> Integer[np.ndarray, "T"]:
        """Ids of the text, in which names of sentinels stand for them."""
        parts, done = [], 0
        for found in SENTINEL.finditer(text):
            if int(found[1]) < len(self.sentinels):
                parts += [self.text.encode(text[done : found.start()]), [self.sentinels[int(found[1])]]]
                done = found.end()
        parts.append(self.text.encode(text[done:]))
        return np.concatenate([np.asarray(part, np.int64) for part in parts])

    def encode_batch(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "_"]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Integer[np.ndarray, "T"]) -> str:
        """Text of the ids, with the names of sentinels."""
        ids = np.asarray(ids)
        numbers = {token: number for number, token in enumerate(self.sentinels)}
        places = [place for place, token in enumerate(ids.tolist()) if token in numbers]
        parts, done = [], 0
        for place in places:
            parts += [self.text.decode(ids[done:place]), _named(numbers[int(ids[place])])]
            done = place + 1
        return "".join([*parts, self.text.decode(ids[done:])])


def _named(number: int) -> str:
    return f"<extra_id_{number}>"
