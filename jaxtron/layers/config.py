"""Settings of layers, and the names of their kinds."""

from typing import Literal

from pydantic import Field, model_validator

from jaxtron.config import Config
from jaxtron.kernels.attention.config import Implementation

Activation = Literal["gelu", "gelu_tanh", "relu", "squared_relu", "swiglu", "geglu"]
GATED = frozenset({"swiglu", "geglu"})
NormKind = Literal["layer_norm", "layer_norm_1p", "rms_norm"]
PositionKind = Literal["learned", "rotary", "alibi", "none"]


class AttentionConfig(Config):
    """What attention computes beside its product, and by which implementation."""

    implementation: Implementation = "auto"
    """auto: the fastest that can do what is asked on the mesh's devices; mosaic (Hopper), cudnn, xla (anywhere, memory
    linear in the sequence), materialized (probabilities in memory, which alone can be dropped), reference (float32)."""
    deterministic: bool = False
    """The same bits from every run: a slower backward on GPUs, where sums else come in any order."""
    window: int | None = Field(default=None, ge=1)
    """Tokens that a `W` layer of the pattern sees, its own among them (Mistral, 2310.06825)."""
    soft_cap: float | None = Field(default=None, gt=0)
    """Scores s become cap x tanh(s / cap) (Gemma 2, 2408.00118); none: as they are."""
    scale: float | None = Field(default=None, gt=0)
    """Factor of scores (none: 1 / sqrt(head dim))."""
    sinks: bool = False
    """A learned logit a head joins each softmax without a value (gpt-oss, 2508.10925)."""


class RotaryScaling(Config):
    """Llama 3's stretching of low rotary frequencies (2407.21783)."""

    factor: float = Field(default=8.0, gt=0)
    """How many times longer the sequences become."""
    low_frequency_factor: float = Field(default=1.0, gt=0)
    """Wavelengths above `original_length / this` are stretched whole."""
    high_frequency_factor: float = 4.0
    """Wavelengths below `original_length / this` stay."""
    original_length: int = Field(default=8192, ge=1)
    """Sequence length of the training before the stretch, in tokens."""

    @model_validator(mode="after")
    def _check(self) -> "RotaryScaling":
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if low >= high:
            raise ValueError(f"low_frequency_factor {low} must be below high_frequency_factor {high}")
        return self


class RotaryConfig(Config):
    """Rotary position embedding (RoFormer, 2104.09864)."""

    fraction: float = Field(default=1.0, gt=0, le=1)
    """Part of each head's dimensions that is rotated."""
    base: float = Field(default=10000.0, gt=1)
    """Base of the geometric series of wavelengths."""
    scaling: RotaryScaling | None = None
    """Llama 3's frequency scaling, or none."""

    def dimensions(self, head_dim: int) -> int:
        """Rotated dimensions of a head, an even number."""
        return int(head_dim * self.fraction) // 2 * 2
