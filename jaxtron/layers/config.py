"""Settings of layers, and the names of their kinds."""

import math
from typing import Literal

from pydantic import Field, model_validator

from jaxtron.config import Config, UserError, format_value
from jaxtron.kernels.attention.config import Implementation

Activation = Literal["gelu", "gelu_tanh", "relu", "squared_relu", "swiglu", "geglu", "clamped_swiglu"]
GATED = frozenset({"swiglu", "geglu", "clamped_swiglu"})
NormKind = Literal["layer_norm", "layer_norm_1p", "rms_norm"]
# of 8-bit numbers in products: none of them, or by the maximum of the tensor at hand, or of each of its blocks
Scaling = Literal["none", "current", "block"]
PositionKind = Literal["learned", "rotary", "alibi", "none"]


class AttentionConfig(Config):
    """What attention computes beside its product, and by which implementation."""

    implementation: Implementation = "auto"
    """auto: the fastest that can do what is asked on the mesh's devices; mosaic (Hopper), cudnn, xla (anywhere, memory
    linear in the sequence), materialized (probabilities in memory), reference (float32)."""
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


class Fp8Config(Config):
    """Products of 8-bit numbers (2209.05433), in attention's projections and MLPs alone.

    All else stays as train.precision says: embedding, head, norms, cores of attention, routers, experts, state spaces.
    """

    scaling: Scaling = "none"
    """none: no such products; current: each tensor is scaled by its own maximum, over the whole microbatch; block: e4m3
    for gradients too, scaled by the maxima of 1 x 128 numbers, of weights of 128 x 128 (DeepSeek-V3, 2412.19437)."""


class LoraConfig(Config):
    """Low-rank adapters (LoRA, 2106.09685) of linear layers: `y = x W + scale (x A) B`, W frozen, A and B trained."""

    rank: int = Field(ge=1)
    """Columns of A and rows of B."""
    alpha: float | None = Field(default=None, gt=0)
    """The scale is alpha / rank (none: alpha is the rank, and the scale 1)."""
    rslora: bool = False
    """The scale is alpha / sqrt(rank), which keeps high ranks from learning slowly (rsLoRA, 2312.03732)."""
    targets: tuple[str, ...] = ("attention.*", "mlp.*")
    """Linear layers that have adapters: patterns of their names, or of the ends of these, as attention.query, mlp.*."""

    @model_validator(mode="after")
    def _check(self) -> "LoraConfig":
        if not self.targets or not all(self.targets):
            raise UserError(
                "train.lora.targets has no pattern, or an empty one: leave it out for all projections of attention and "
                "MLPs, or name some, as attention.query"
            )
        return self

    @property
    def scale(self) -> float:
        """What multiplies the product of A and B."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LatentConfig(Config):
    """Widths of multi-head latent attention (DeepSeek-V2, 2405.04434), by the names of its released configurations."""

    q_lora_rank: int | None = Field(default=None, ge=1)
    """Of the latent that queries are made of (none: they are made of the stream)."""
    kv_lora_rank: int = Field(default=512, ge=1)
    """Of the latent that keys and values are made of."""
    qk_nope_head_dim: int = Field(default=128, ge=1)
    """Dimensions of a head's queries and keys that know no positions."""
    qk_rope_head_dim: int = Field(default=64, ge=2)
    """Those that are rotated; a key's are the same in all heads."""
    v_head_dim: int = Field(default=128, ge=1)
    """Dimensions of a head's values."""

    @property
    def key_dim(self) -> int:
        """Dimensions of a head's queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


class RotaryScaling(Config):
    """The stretching of low rotary frequencies, by Llama 3's rule (2407.21783) or YaRN's (2309.00071)."""

    kind: Literal["llama3", "yarn"] = "llama3"
    """The rule; each reads factor, original_length and its own of the others."""
    factor: float = Field(default=8.0, gt=0)
    """How many times longer the sequences become."""
    low_frequency_factor: float = Field(default=1.0, gt=0)
    """Llama 3: wavelengths above `original_length / this` are stretched whole."""
    high_frequency_factor: float = 4.0
    """Llama 3: wavelengths below `original_length / this` stay."""
    original_length: int = Field(default=8192, ge=1)
    """Sequence length of the training before the stretch, in tokens."""
    beta_fast: float = Field(default=32.0, gt=0)
    """YaRN: what turns more often than this in `original_length` stays."""
    beta_slow: float = Field(default=1.0, gt=0)
    """YaRN: what turns less often is stretched whole."""
    mscale: float = Field(default=1.0, ge=0)
    """YaRN: rotated queries and keys are multiplied by m(this) / m(mscale_all_dim), m(s) = 0.1 s ln(factor) + 1."""
    mscale_all_dim: float = Field(default=0.0, ge=0)
    """YaRN: scores of latent attention are multiplied by the square of m(this) (DeepSeek-V2, V3)."""
    truncate: bool = True
    """YaRN: the pairs between which it stretches in part are whole numbers, those around beta_fast and beta_slow
    (gpt-oss: false)."""

    @model_validator(mode="after")
    def _check(self) -> "RotaryScaling":
        own = {
            "llama3": ("low_frequency_factor", "high_frequency_factor"),
            "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        }
        for kind, names in own.items():
            for name in names if kind != self.kind else ():
                if getattr(self, name) != type(self).model_fields[name].default:
                    value = format_value(getattr(self, name))
                    raise ValueError(f"{name} {value} has no effect with kind {self.kind}; leave it out")
        for low, high in (own["llama3"], ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} must be below {high} {getattr(self, high)}")
        return self

    @property
    def magnitude(self) -> float:
        """Factor of what is rotated."""
        return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)

    @property
    def latent_scores(self) -> float:
        """Factor of the scores of latent attention."""
        return self._magnitude(self.mscale_all_dim) ** 2

    def _magnitude(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0 if self.kind == "yarn" and self.factor > 1 else 1.0


class RotaryConfig(Config):
    """Rotary position embedding (RoFormer, 2104.09864)."""

    fraction: float = Field(default=1.0, gt=0, le=1)
    """Part of each head's dimensions that is rotated."""
    base: float = Field(default=10000.0, gt=1)
    """Base of the geometric series of wavelengths."""
    scaling: RotaryScaling | None = None
    """For sequences longer than those of the training before: of frequencies, or none."""

    def dimensions(self, head_dim: int) -> int:
        """Rotated dimensions of a head, an even number."""
        return int(head_dim * self.fraction) // 2 * 2
