"""Which tokens continue the word before them, from how tokenizers spell their pieces."""

from collections.abc import Collection, Sequence
from enum import Enum

import numpy as np
from jaxtyping import Bool

from jaxtron.config import UserError


class Spelling(Enum):
    """How the pieces of a vocabulary show where words begin."""

    WORDPIECE = "##"
    """BERT: a piece that continues a word has this in front."""
    SENTENCEPIECE = "\u2581"
    """SentencePiece: a piece that begins a word has this in front, a low line that stands for the space."""
    BYTE_BPE = "\u0120"
    """GPT-2's byte-level BPE: likewise, with the letter G with a dot that stands for the space."""


# byte-level BPE's letters for the other white space: tab, line feed, carriage return
_BYTE_BPE_BEGINS = (Spelling.BYTE_BPE.value, "\u0109", "\u010a", "\u010d")


def find_spelling(pieces: Sequence[str]) -> Spelling:
    """The spelling whose mark most pieces begin with; UserError where none has one."""
    counts = {spelling: sum(piece.startswith(spelling.value) for piece in pieces) for spelling in Spelling}
    best = max(counts, key=lambda spelling: counts[spelling])
    if not counts[best]:
        raise UserError(
            f"none of the {len(pieces)} pieces of the vocabulary shows where words begin (##, \u2581 or \u0120); mask "
            "single tokens instead of whole words"
        )
    return best


def continuations(
    pieces: Sequence[str], *, spelling: Spelling | None = None, special: Collection[int] = ()
) -> Bool[np.ndarray, "V"]:
    """Per id, whether it continues a word; `pieces` are spelled by id, `special` ids never continue one.

    To be computed once per tokenizer. The spelling is found from the pieces when not given; an id without a piece
    should be the empty string, which begins a word.
    """
    spelling = find_spelling(pieces) if spelling is None else spelling
    if spelling is Spelling.WORDPIECE:
        found = [piece.startswith(spelling.value) for piece in pieces]
    else:
        begins = _BYTE_BPE_BEGINS if spelling is Spelling.BYTE_BPE else (spelling.value,)
        found = [piece != "" and not piece.startswith(begins) for piece in pieces]
    continues = np.array(found, bool)
    continues[list(special)] = False
    return continues
