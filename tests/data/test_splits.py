"""Split strings, and the ranges they become."""

import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.data.megatron.splits import parse_split, split_ranges


def test_shares_sum_to_one():
    assert parse_split("969,30,1") == (0.969, 0.03, 0.001)
    assert parse_split("1") == parse_split("2, 0,0") == parse_split("100/0") == (1.0, 0.0, 0.0)
    assert parse_split("0.8 .1 0.1") == tuple((np.array([0.8, 0.1, 0.1]) / np.array([0.8, 0.1, 0.1]).sum()).tolist())


@pytest.mark.parametrize("split", ["", ",", "0,0,0", "1,1,1,1", "a", "1,-1", "1e3,1", "nan", "1..2,1"])
def test_other_splits_are_refused(split):
    with pytest.raises(UserError, match="the split"):
        parse_split(split)


@pytest.mark.parametrize(
    ("split", "count", "bounds"),
    [
        ("969,30,1", 1000, [0, 969, 999, 1000]),
        ("969,30,1", 10, [0, 10, 10, 10]),
        ("1,1", 1, [0, 0, 1, 1]),  # a half goes to the even neighbour
        ("1,1", 3, [0, 2, 3, 3]),
        ("1,1", 5, [0, 2, 5, 5]),
        ("1,1,2", 10, [0, 2, 5, 10]),
        ("98,2,0", 0, [0, 0, 0, 0]),
        ("0,1,0", 7, [0, 0, 7, 7]),
    ],
)
def test_bounds_are_rounded_half_to_even(split, count, bounds):
    assert [(part.start, part.stop) for part in split_ranges(split, count)] == list(
        zip(bounds, bounds[1:], strict=False)
    )


def test_splits_cover_everything_once():
    rng = np.random.default_rng(0)
    for _ in range(300):
        count = int(rng.integers(0, 10**9))
        train, validation, test = split_ranges(",".join(f"{share:.4f}" for share in rng.random(3) + 1e-3), count)
        assert train.start == 0 and train.stop == validation.start
        assert validation.stop == test.start and test.stop == count
