"""Rows of Parquet copied, replaced or left out, all their columns kept."""

import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtron.config import UserError
from jaxtron.preprocess.inputs import column_values

try:
    import pyarrow
    from pyarrow import parquet
except ImportError:
    pyarrow = parquet = None

BATCH_ROWS = 1024


def require(path: Path) -> None:
    """UserError where pyarrow is not installed."""
    if parquet is None:
        raise UserError(f'{path} needs pyarrow; pip install "jaxtron[parquet]"')


def read_column(path: str, column: str) -> Iterator[Any]:
    """The values of a column in order, or none for every row where there is no such column."""
    with parquet.ParquetFile(path) as file:  # pyright: ignore
        if column not in file.schema_arrow.names:
            yield from (None for _ in range(file.metadata.num_rows))
            return
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[column]):
            yield from column_values(batch.column(column))


def write_rows(source: str, target: Path, text_column: str, texts: Iterator[Sequence[str] | None]) -> None:
    """Copies a file row by row; for each row none to keep it as it is, or the texts to have in its place.

    The target appears when whole.
    """
    aside = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with parquet.ParquetFile(source) as file:  # pyright: ignore
            with parquet.ParquetWriter(aside, file.schema_arrow) as writer:  # pyright: ignore
                for batch in file.iter_batches(batch_size=BATCH_ROWS):
                    writer.write_batch(_replaced(batch, text_column, [next(texts) for _ in range(batch.num_rows)]))
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _replaced(batch: Any, text_column: str, texts: Sequence[Sequence[str] | None]) -> Any:
    rows = [row for row, new in enumerate(texts) for _ in range(1 if new is None else len(new))]
    taken = batch.take(pyarrow.array(rows, pyarrow.int64()))  # pyright: ignore
    if all(new is None or not new for new in texts):
        return taken
    column = batch.schema.get_field_index(text_column)
    old = batch.column(column).to_pylist()
    values = [text for row, new in enumerate(texts) for text in ([old[row]] if new is None else new)]
    field = batch.schema.field(column)
    return taken.set_column(column, field, pyarrow.array(values, field.type))  # pyright: ignore
