"""Schedules drawn."""

import re

import matplotlib.image
import pytest

from jaxtron.config import UserError
from jaxtron.pipeline.schedules.named import SCHEDULES, make_schedule
from jaxtron.plan.schedule import draw_schedule, schedule_text

CHUNKS = {"interleaved": 2, "eager_interleaved": 2, "zero_bubble_v": 2, "dualpipe_v": 2}
DRAWN = """\
1f1b: 2 stages, 3 microbatches

tick     0  1  2  3  4  5  6  7
stage 0  F0 .  F1 B0 F2 B1 .  B2
stage 1  .  F0 B0 F1 B1 F2 B2 .
F forward, B backward; the number is the microbatch; . is idle

stage  warm-up  most in flight  peak activations
    0        1               2         1.953 MiB
    1        0               1          1000 KiB

ticks     8, ideally 6: 33.3% more
time      12 forwards of a stage; bubble 33.3%, or 55.6% if every tick waits for its longest entry
messages  6 a step, at most 3 of one kind over one link (activations, stage 0 to 1)"""


def test_a_small_schedule_as_text():
    assert schedule_text(make_schedule("1f1b", 2, 3), chunk_bytes=[1000 * 2**10]) == DRAWN


def test_bytes_are_known_by_chunk_or_not_at_all():
    schedule = make_schedule("zero_bubble", 4, 8)
    assert "activations" not in schedule_text(schedule).partition("ticks ")[0]
    # what is deferred counts as much as what is in flight: four in all on every stage
    assert peaks(schedule_text(schedule, chunk_bytes=[10])) == ["40 B"] * 4
    # of an encoder and a decoder one microbatch each; the decoder's chunk keeps ten times as much
    both = make_schedule("interleaved", 2, 2, num_stacks=2)
    drawn = schedule_text(both, chunk_bytes=[1, 10])
    assert re.findall(r"^ +\d +\d +(\d) ", drawn, re.MULTILINE) == ["4", "3"]
    # the last stage has one of the decoder at a time
    assert peaks(drawn) == ["22 B", "12 B"]


def peaks(drawn: str) -> list[str]:
    """Of each stage."""
    return re.findall(r"^ +\d(?: +\d+)+ +(\d+ B)$", drawn, re.MULTILINE)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("width", [60, 120])
def test_a_wide_table_loses_its_middle_and_says_so(name, width):
    schedule = make_schedule(name, 4, 64, CHUNKS.get(name, 1))
    lines = schedule_text(schedule, width=width).splitlines()
    first, last = map(int, re.search(r"ticks (\d+) to (\d+) are left out to fit", "\n".join(lines)).groups())
    header = next(line for line in lines if line.startswith("tick "))
    stages = [line for line in lines if line.startswith("stage ") and "warm-up" not in line]
    assert len(stages) == 4 and max(map(len, [header, *stages])) <= width
    assert [int(word) for word in header.split()[1:]] == [*range(first), *range(last + 1, schedule.num_ticks)]
    assert all("..." in line for line in stages)


def test_colors_change_nothing_else():
    for name in SCHEDULES:
        schedule = make_schedule(name, 2, 4, CHUNKS.get(name, 1))
        colored = schedule_text(schedule, color=True)
        assert "\x1b[34m" in colored
        assert re.sub(r"\x1b\[[\d;]*m", "", colored) == schedule_text(schedule)


@pytest.mark.parametrize("name", ["1f1b", "zero_bubble_v"])
@pytest.mark.parametrize("num_microbatches", [4, 512])
def test_the_timeline_as_a_picture(tmp_path, name, num_microbatches):
    path = tmp_path / "schedule.png"
    draw_schedule(make_schedule(name, 4, num_microbatches, CHUNKS.get(name, 1)), path)
    image = matplotlib.image.imread(path)
    height, width = image.shape[:2]
    assert 200 < height < 600 and 800 < width <= 4800
    # forwards are blue
    pixels = image[..., :3].reshape(-1, 3)
    assert ((pixels[:, 2] > pixels[:, 0] + 0.2) & (pixels[:, 2] > pixels[:, 1])).mean() > 0.1
    assert [entry.name for entry in tmp_path.iterdir()] == ["schedule.png"]


def test_a_picture_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="cannot write .*nowhere"):
        draw_schedule(make_schedule("1f1b", 2, 3), tmp_path / "nowhere" / "schedule.png")
