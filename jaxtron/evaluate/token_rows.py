"""Rows of tokens of a JSON file: of a text, or of a text and of an answer to it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtron.config import UserError

BOTH = ("tokens", "decoder_tokens")


@dataclass(frozen=True)
class TokenRows:
    """Rows of equal length, and as many for a decoder, of a length of their own, where the model has an encoder too."""

    tokens: list[list[int]]
    decoder_tokens: list[list[int]] | None = None

    @property
    def answered(self) -> list[list[int]]:
        """Those whose logits there are: of what a decoder goes on with, if it has rows of its own."""
        return self.tokens if self.decoder_tokens is None else self.decoder_tokens


def read_token_ids(path: Path, vocabulary: int) -> TokenRows:
    """The rows of a file; a `UserError` if it is not that, or has others than the model."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --token_ids {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--token_ids {path} is not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        return TokenRows(_checked(found, path, vocabulary))
    if found.keys() != set(BOTH):
        raise UserError(f"--token_ids {path} must be rows, or an object of two: {' and '.join(BOTH)}")
    tokens, decoder_tokens = (_checked(found[name], path, vocabulary) for name in BOTH)
    if len(tokens) != len(decoder_tokens):
        raise UserError(
            f"--token_ids {path} has {len(tokens):,} rows of tokens and {len(decoder_tokens):,} of decoder_tokens: "
            "give as many"
        )
    return TokenRows(tokens, decoder_tokens)


def _checked(rows: Any, path: Path, vocabulary: int) -> list[list[int]]:
    is_rows = isinstance(rows, list) and rows and all(isinstance(row, list) and row for row in rows)
    if not is_rows or not all(type(token) is int for row in rows for token in row):
        raise UserError(f"--token_ids {path} must be rows of whole numbers, such as [[1, 5, 2], [4, 4, 3]]")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise UserError(
            f"--token_ids {path} has rows of {lengths[0]} and of {lengths[-1]} tokens: make them equal, for what "
            "follows a token changes nothing before it"
        )
    wrong = next((token for row in rows for token in row if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise UserError(f"--token_ids {path} has the token {wrong}, and the model knows 0 to {vocabulary - 1:,}")
    return rows
