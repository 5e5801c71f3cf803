"""Names of the implementations of grouped products."""

from typing import Literal

Implementation = Literal["auto", "mosaic", "xla", "reference"]
