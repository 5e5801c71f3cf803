"""Schedules on file."""

import pytest

from jaxtron.config import UserError
from jaxtron.pipeline.schedules.named import SCHEDULES, make_schedule
from jaxtron.pipeline.schedules.table_file import read_csv, write_csv

CHUNKS = {"interleaved": 3, "eager_interleaved": 2, "zero_bubble_v": 2, "dualpipe_v": 2}


def written(tmp_path, text):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_returns_from_file(tmp_path, name):
    sizes = (3, 7, CHUNKS.get(name, 1))
    schedule = make_schedule(name, *sizes)
    path = tmp_path / f"{schedule.name}.csv"
    write_csv(schedule, path)
    assert read_csv(path) == schedule
    assert make_schedule(str(path), *sizes) == schedule


def test_header_and_placement_are_optional(tmp_path):
    rows = "F0.0,\nF0.1,F0.0 B0.0\nB0.0,F0.1 B0.1\nB0.1,\n"
    plain = read_csv(written(tmp_path, rows))
    assert (plain.name, plain.num_stages, plain.num_ticks, plain.num_microbatches) == ("mine", 2, 4, 2)
    assert read_csv(written(tmp_path, "stage 0,stage 1\n" + rows)) == plain
    assert (
        read_csv(written(tmp_path, "# two stages\n# placement: round_robin\nrank 0, rank 1\n" + rows + "\n\n")) == plain
    )
    idle = read_csv(written(tmp_path, rows.replace("B0.1,\n", ",\nB0.1,\n")))
    assert idle.num_ticks == 5 and all(entry.is_idle for entry in idle.table[3])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the table is empty"),
        ("stage 0,stage 1\n", "the table is empty"),
        ("# placement: ring\nF0.0 B0.0\n", "unknown placement 'ring'; use round_robin or v_shape"),
        ("F0.0,\nF0,F0.0\n", "tick 1, stage 0: 'F0' is no work; write F, B or W and chunk.microbatch, such as F0.3"),
        ("F0.0,\nX0.0,F0.0\n", "tick 1, stage 0: 'X0.0' is no work"),
        ("F0.0 F0.1,\n", "tick 0, stage 0: two F in 'F0.0 F0.1'; a tick has one of each at most"),
        ("F0.0,\n,B0.0 F0.0\n", "tick 1, stage 1: 'B0.0 F0.0' is out of order; within a tick F runs first"),
        ("F0.0,\nB0.0\n", "tick 1: 1 columns where others have 2"),
        ("F0.0,F0.0\n,B0.0\nB0.0,\n", "tick 0, stage 1: F0.0 needs F0.0 of stage 0 at an earlier tick"),
        ("F0.0,\n,F0.0\n,B0.0\n", "stage 0 has no B0.0 at any tick"),
    ],
)
def test_errors_name_file_tick_and_stage(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(UserError, match="mine") as error:
        read_csv(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_is_for_the_sizes_of_the_run(tmp_path):
    path = tmp_path / "table.csv"
    write_csv(make_schedule("1f1b", 2, 4), path)
    message = "for 2 stages, 4 microbatches, 1 chunks, the run has 4 stages, 8 microbatches, 1 chunks"
    with pytest.raises(UserError, match=message):
        make_schedule(str(path), 4, 8)
    with pytest.raises(UserError, match="cannot read the schedule .*missing.csv"):
        make_schedule(str(tmp_path / "missing.csv"), 4, 8)
