"""Names of the implementations of state-space duality."""

from typing import Literal

Implementation = Literal["auto", "mosaic", "xla", "reference"]
