"""Which sequences of a file train, validate and test: a split string such as `969,30,1`."""

import itertools
import re

import numpy as np

from jaxtron.config import UserError

NUMBER = re.compile(r"\d+\.?\d*|\.\d+")


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of training, validation and test, which sum to 1; shares left out at the end are 0."""
    words = [word for word in re.split(r"[,/\s]+", split.strip()) if word]
    if not 1 <= len(words) <= 3 or not all(NUMBER.fullmatch(word) for word in words):
        raise UserError(f"the split {split!r} is not one to three numbers such as 969,30,1 (train,validation,test)")
    shares = np.array([float(word) for word in words] + [0.0] * (3 - len(words)))
    if not shares.sum() > 0:
        raise UserError(f"the split {split!r} gives nothing to anyone; give a number above 0, as in 969,30,1")
    train, validation, test = (shares / shares.sum()).tolist()
    return train, validation, test


def split_ranges(split: str, count: int) -> tuple[range, range, range]:
    """The numbers, of `count` sequences (documents, for masked objectives), that each split has; rounded as Megatron.

    Bounds are rounded half to even, so that neighbours meet; a share of 0 is an empty range.
    """
    bounds = [round(share * float(count)) for share in itertools.accumulate(parse_split(split), initial=0.0)]
    train, validation, test = (range(*pair) for pair in itertools.pairwise(bounds))
    return train, validation, test
