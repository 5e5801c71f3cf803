"""Token ids of a conversation: those that inference gives to a model, and those the model is to answer with.

No token lies over the border of an answer. Before an answer stand the ids of its prompt as the prompt is encoded by
itself, for that is all there is when the model answers; then the ids that its text has as a continuation, without the
space that many tokenizers put before a text. Where a tokenizer would make one token of the end of a prompt and the
beginning of an answer (or of an answer and what follows), it is cut there. Without such a place, the ids are those of
the whole conversation.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from jaxtron.data.chat.template import Piece
from jaxtron.data.packing import PackedSequence
from jaxtron.data.tokenizers import Tokenizer

ANCHORS = ("\n", "a", "0", ".")
"""Texts to continue where the true one merges with what follows: one of them seldom does."""

LEFT = 64
"""Characters on the left with which a text is encoded: many tokens, and not the whole conversation again."""

_NONE = np.empty(0, np.int32)


@dataclass(frozen=True)
class _Part:
    """Text to encode in the place it has, or a token's id; `follows`: the text goes on from the part before."""

    text: str
    token: int | None
    is_answer: bool
    follows: bool


def tokens_to_insert(texts: Sequence[str], tokenizer: Tokenizer) -> dict[str, int]:
    """Those texts that are tokens by name but that the tokenizer encodes as mere text, and their ids."""
    ids = {text: tokenizer.token_id(text) for text in texts}
    return {
        text: token for text, token in ids.items() if token is not None and token not in tokenizer.encode(text).tolist()
    }


def encode_conversations(
    conversations: Sequence[Sequence[Piece]], *, tokenizer: Tokenizer, tokens: Mapping[str, int] | None = None
) -> list[PackedSequence]:
    """Ids of each written conversation up to its last answer, and which of them are answers; empty without any.

    `tokens` are texts that become an id wherever they stand; what follows one is encoded as the beginning of a text.
    """
    split = [_split(_until_the_last_answer(pieces), tokens or {}) for pieces in conversations]
    encoded = iter(_encode_parts(list(itertools.chain.from_iterable(split)), tokenizer))
    sequences = []
    for parts in split:
        ids = [next(encoded) for _ in parts]
        is_answer = [np.full(len(part_ids), part.is_answer) for part_ids, part in zip(ids, parts, strict=True)]
        sequences.append(
            PackedSequence(
                ids=np.concatenate([_NONE, *ids]).astype(np.int32),
                is_answer=np.concatenate([np.empty(0, bool), *is_answer]),
            )
        )
    return sequences


def encode_prompt(
    text: str, *, tokenizer: Tokenizer, tokens: Mapping[str, int] | None = None
) -> Integer[np.ndarray, "P"]:
    """Ids of a written conversation that an answer is to follow, as those before an answer in training."""
    parts = _split([Piece(text, False)], tokens or {})
    return np.concatenate([_NONE, *_encode_parts(parts, tokenizer)]).astype(np.int32)


def _until_the_last_answer(pieces: Sequence[Piece]) -> list[Piece]:
    """Without empty pieces, and those of a kind that follow each other as one."""
    kept = [piece for piece in pieces if piece.text]
    answers = [number for number, piece in enumerate(kept) if piece.is_answer]
    runs = itertools.groupby(kept[: answers[-1] + 1] if answers else [], key=lambda piece: piece.is_answer)
    return [Piece("".join(piece.text for piece in run), is_answer) for is_answer, run in runs]


def _split(pieces: Sequence[Piece], tokens: Mapping[str, int]) -> list[_Part]:
    longest_first = sorted(tokens, key=len, reverse=True)
    # without names, a pattern that is nowhere
    names = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if tokens else r"(?!)")
    parts: list[_Part] = []
    follows = False
    for piece in pieces:
        for text in names.split(piece.text):
            token = tokens.get(text)
            if text:
                parts.append(_Part(text, token, piece.is_answer, follows and token is None))
                follows = token is None
    return parts


def _encode_parts(parts: Sequence[_Part], tokenizer: Tokenizer) -> list[Integer[np.ndarray, "_"]]:
    """Ids of each part in its place."""
    ids = [np.array([part.token or 0], np.int32) for part in parts]
    first = [number for number, part in enumerate(parts) if part.token is None and not part.follows]
    for number, found in zip(first, tokenizer.encode_batch([parts[number].text for number in first]), strict=True):
        ids[number] = found
    pending = [number for number, part in enumerate(parts) if part.follows]
    # the text on its left first: what is far from where they meet makes no difference there
    for anchor in (None, *ANCHORS):
        lefts = [parts[number - 1].text[-LEFT:] if anchor is None else anchor for number in pending]
        found = _continue(lefts, [parts[number].text for number in pending], tokenizer)
        ids_by_number = dict(zip(pending, found, strict=True))
        for number, continued in ids_by_number.items():
            if continued is not None:
                ids[number] = continued
        pending = [number for number in pending if ids_by_number[number] is None]
        if not pending:
            return ids
    for number, found in zip(pending, tokenizer.encode_batch([parts[number].text for number in pending]), strict=True):
        ids[number] = found
    return ids


def _continue(
    lefts: Sequence[str], texts: Sequence[str], tokenizer: Tokenizer
) -> list[Integer[np.ndarray, "_"] | None]:
    """The ids that each text adds to those of the text on its left; None where they change those."""
    encoded = tokenizer.encode_batch([*lefts, *(left + text for left, text in zip(lefts, texts, strict=True))])
    pairs = zip(encoded[: len(lefts)], encoded[len(lefts) :], strict=True)
    return [both[len(left) :] if np.array_equal(both[: len(left)], left) else None for left, both in pairs]
