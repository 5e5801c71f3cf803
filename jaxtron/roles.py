"""What a parameter is: decides its precision in products and whether it decays."""

from typing import Literal

Role = Literal["kernel", "embedding", "position", "bias", "scale"]
