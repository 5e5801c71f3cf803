"""Steps of mixtures as they were published against the prediction of them, row by row."""

import functools
import statistics
from dataclasses import replace

import pytest

from benchmarks import mixtures

MEDIAN, LARGEST = 0.05, 0.20
ROWS = mixtures.read_rows()


@functools.cache
def result(row: mixtures.Row) -> mixtures.Result:
    return mixtures.predict_row(row, mixtures.machine())


def test_every_row_is_close_and_most_are_closer():
    errors = {row.name: result(row).error for row in ROWS}
    assert max(map(abs, errors.values())) <= LARGEST
    for fitted in (True, False):
        assert statistics.median(abs(result(row).error) for row in ROWS if row.fitted == fitted) <= MEDIAN


def test_at_most_half_of_each_table_is_fitted():
    counts = {}
    for row in ROWS:
        fitted, all_rows = counts.get(row.source, (0, 0))
        counts[row.source] = (fitted + row.fitted, all_rows + 1)
    assert {source: rows for source, (_, rows) in counts.items()} == {
        "2504.14960 Table 1": 8,
        "2504.14960 Table 4": 32,
        "2504.14960 Table 5": 4,
    }
    assert all(2 * fitted <= rows for fitted, rows in counts.values())


def test_folding_gains_where_it_was_measured_to():
    gained = {}
    for row in ROWS:
        if row.name.endswith(", folded") and "tokens" not in row.name:
            plain = next(other for other in ROWS if other.name == row.name.removesuffix(", folded"))
            gained[row.name] = (row.mfu / plain.mfu, result(row).mfu / result(plain).mfu)
    assert len(gained) == 20
    # but for 8x70B, whose folded runs have twice the stages: there the prediction is a tie
    sure = {name: gains for name, gains in gained.items() if "Llama3" not in name}
    assert all(measured > 1 and predicted > 1 for measured, predicted in sure.values())
    # by far the most where narrow experts crossed nodes
    assert max(sure, key=lambda name: sure[name][1]).startswith("8x22B-G8T8")


def test_the_document_shows_todays_predictions():
    document = (mixtures.ROOT / "docs" / "prediction.md").read_text()
    assert mixtures.table([result(row) for row in ROWS]) in document, "run python -m benchmarks.mixtures"


@pytest.mark.slow
def test_the_search_finds_constants_that_were_hidden():
    # rows that the model itself made with other constants, not the published ones
    rows = [row for row in ROWS if row.name in ("8x22B-G8T8", "Qwen2-57B-A14B, folded")]
    hidden = mixtures.machine().model_copy(update={"product_fraction": 0.7, "exchange_fraction": 0.45})
    made = []
    for row in rows:
        seconds = mixtures.predict_row(row, hidden).prediction.step_seconds
        made.append(replace(row, mfu=row.mfu * row.published / seconds))
    found = mixtures.fit(made, hidden.model_copy(update={"product_fraction": 0.75, "exchange_fraction": 0.5}))
    assert (found.product_fraction, found.exchange_fraction) == (0.7, 0.45)
