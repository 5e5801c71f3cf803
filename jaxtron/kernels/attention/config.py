"""Names of the implementations of attention."""

from typing import Literal

Implementation = Literal["auto", "mosaic", "cudnn", "xla", "materialized", "reference"]
