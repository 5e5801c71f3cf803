"""Numbers as people read them."""

import pytest

from jaxtron.words import (
    either,
    plural,
    readable_bytes,
    readable_count,
    readable_flops,
    readable_seconds,
    readable_time,
)


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "node", "0 nodes"),
        (1, "node", "1 node"),
        (2, "node", "2 nodes"),
        (1024, "GPU", "1,024 GPUs"),
        (1, "microbatch", "1 microbatch"),
        (8, "microbatch", "8 microbatches"),
        (3, "mesh", "3 meshes"),
    ],
)
def test_plurals(count: int, noun: str, text: str):
    assert plural(count, noun) == text
    assert plural(2, "index", "indices") == "2 indices"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1.5 * 2**30, "1.5 GiB"),
        # what rounds to 1024 has the next unit
        (2**20 - 1, "1 MiB"),
        (2**30 - 1, "1 GiB"),
        (-(2**21), "-2 MiB"),
        (1_234_567_890_123, "1.123 TiB"),
        (2**70, "1,048,576 PiB"),
    ],
)
def test_bytes(number: float, text: str):
    assert readable_bytes(number) == text


def test_counts_flops_and_seconds():
    assert [readable_count(n) for n in (999, 4_096, 22.4e6, 1008.04e9)] == [
        "999",
        "4,096",
        "22.4 million",
        "1,008.04 billion",
    ]
    assert [readable_flops(n) for n in (12, 2e9, 9.484e14)] == ["12 FLOPs", "2 GFLOPs", "948.4 TFLOPs"]
    assert [readable_time(n) for n in (221, 9_000, 2.8e6)] == ["3.7 minutes", "2.5 hours", "32.4 days"]
    assert readable_time(59.9) == "59.9 s"
    assert [readable_seconds(n) for n in (2.5e-6, 0.0123, 39.21)] == ["2.5 us", "12.3 ms", "39.2 s"]


def test_choices_end_in_or():
    assert [either("abc"[:count]) for count in (1, 2, 3)] == ["a", "a or b", "a, b, or c"]
