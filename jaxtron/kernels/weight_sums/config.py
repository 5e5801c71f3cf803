"""Names of the implementations of weight gradients' sums."""

from typing import Literal

Implementation = Literal["auto", "mosaic", "xla"]
