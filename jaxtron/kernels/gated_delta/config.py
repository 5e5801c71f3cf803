"""Names of the implementations of the gated delta rule."""

from typing import Literal

DeltaImplementation = Literal["auto", "xla", "reference"]
