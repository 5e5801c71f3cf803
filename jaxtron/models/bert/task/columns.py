"""What a row of a file must have: columns by name, and texts in them."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtron.config import UserError


def check_columns(row: Mapping[str, Any], names: Sequence[str], place: str) -> None:
    """`UserError` for the first of these columns that a row has not."""
    for name in names:
        if name not in row:
            raise UserError(
                f"{place} has no column {name}, only {', '.join(list(row)[:8])}; name the columns with --model.columns"
            )


def text_in(row: Mapping[str, Any], name: str, place: str) -> str:
    """The text in a column; `UserError` where it is none."""
    value = row[name]
    if not isinstance(value, str):
        raise UserError(f"{place} has no text in {name}; mend or remove it")
    return value
