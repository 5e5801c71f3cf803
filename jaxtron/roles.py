"""What a parameter is: its role decides its precision in products and whether it decays, its status who changes it."""

from typing import Literal

Role = Literal["kernel", "embedding", "position", "bias", "scale", "router", "state", "adapter"]
# trained by gradients, frozen as it was made, or a buffer that a step updates without gradient
Status = Literal["trained", "frozen", "buffer"]
