"""What a model that answers a text with another knows of both beside its tokenizer."""

from dataclasses import dataclass

from jaxtron.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class AnswerText:
    """How texts become an encoder's tokens, and a decoder's tokens text."""

    tokenizer: Tokenizer
    """Knows the model's further tokens by their texts."""
    begin: int
    """What an answer begins with; it is not part of it."""
    end: int
    """What ends an answer, and stands behind a text that is read."""
    shown: frozenset[int] = frozenset()
    """Special tokens that are text of an answer all the same."""
