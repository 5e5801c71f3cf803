"""Settings of layers, and the names of their kinds."""

import math
from typing import Literal

from pydantic import Field, model_validator

from jaxtron.config import Config, UserError, format_value
from jaxtron.kernels.attention.config import Implementation
from jaxtron.words import plural

Activation = Literal["gelu", "gelu_tanh", "relu", "squared_relu", "swiglu", "geglu", "geglu_tanh", "clamped_swiglu"]
GATED = frozenset({"swiglu", "geglu", "geglu_tanh", "clamped_swiglu"})
NormKind = Literal["layer_norm", "layer_norm_1p", "rms_norm", "rms_norm_1p"]
# those that subtract the mean and can have a bias, and those whose stored scale is gamma - 1
CENTERED = frozenset({"layer_norm", "layer_norm_1p"})
FROM_ONE = frozenset({"layer_norm_1p", "rms_norm_1p"})
# of 8-bit numbers in products: none of them, or by the maximum of the tensor at hand, or of each of its blocks
Scaling = Literal["none", "current", "block"]
# of queries and keys: none, per head with scales that all heads share, with each head's own, or over all heads as one
QkNorm = bool | Literal["each_head", "projection"]
# of norms: before a branch, after it, or both
NormPlacement = Literal["input", "output", "both"]
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
    output_gate: bool = False
    """What heads attended to is multiplied by the sigmoid of a further projection of the input (Qwen3-Next)."""


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
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Part of an adapter's input that is dropped in training, drawn for each adapter alone (peft's lora_dropout)."""
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


ScalingKind = Literal["llama3", "yarn", "linear", "dynamic", "longrope"]
# which of its settings each rule of stretching reads, beside `factor` and `kind`
READ: dict[ScalingKind, tuple[str, ...]] = {
    "llama3": ("original_length", "low_frequency_factor", "high_frequency_factor"),
    "yarn": (
        *("original_length", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
    "linear": (),
    "dynamic": ("original_length",),
    "longrope": ("original_length", "attention_factor", "short_factors", "long_factors"),
}


class RotaryScaling(Config):
    """The stretching of rotary frequencies: by Llama 3's rule (2407.21783), YaRN's (2309.00071), LongRoPE's
    (2402.13753), of all alike (linear), or of the base by how long sequences are (dynamic)."""

    kind: ScalingKind = "llama3"
    """The rule; each reads factor and its own of the others."""
    factor: float = Field(default=8.0, gt=0)
    """How many times longer the sequences become."""
    low_frequency_factor: float = Field(default=1.0, gt=0)
    """Llama 3: wavelengths above `original_length / this` are stretched whole."""
    high_frequency_factor: float = 4.0
    """Llama 3: wavelengths below `original_length / this` stay."""
    original_length: int = Field(default=8192, ge=1)
    """Sequence length of the training before the stretch, in tokens; of all rules but linear."""
    attention_factor: float | None = Field(default=None, gt=0)
    """YaRN and LongRoPE: rotated queries and keys are multiplied by this (none: what the rule says)."""
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
    short_factors: tuple[float, ...] = ()
    """LongRoPE: what each pair is stretched by where sequences are no longer than `original_length`."""
    long_factors: tuple[float, ...] = ()
    """LongRoPE: the same where they are longer. They are as long as data.sequence_length; of generated text as long as
    it may become, from its beginning."""

    @model_validator(mode="after")
    def _check(self) -> "RotaryScaling":
        read = ("kind", "factor", *READ[self.kind])
        for name, field in type(self).model_fields.items():
            if name not in read and getattr(self, name) != field.default:
                value = format_value(getattr(self, name))
                raise ValueError(f"{name} {value} has no effect with kind {self.kind}; leave it out")
        for low, high in (("low_frequency_factor", "high_frequency_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} must be below {high} {getattr(self, high)}")
        if self.kind == "dynamic" and self.factor < 1:
            raise ValueError(f"factor {self.factor:g} of kind dynamic must be 1 or more")
        for name in ("short_factors", "long_factors") if self.kind == "longrope" else ():
            factors = getattr(self, name)
            if not factors or min(factors) <= 0:
                raise ValueError(f"{name} {format_value(factors)} of kind longrope must be numbers above 0, one a pair")
        return self

    @property
    def magnitude(self) -> float:
        """Factor of what is rotated."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "longrope":
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length)) if self.factor > 1 else 1.0
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

    def check(self, name: str, rotated: int) -> None:
        """`UserError` where it, the setting of this name, does not fit so many rotated dimensions."""
        scaling = self.scaling
        for factors in ("short_factors", "long_factors") if scaling and scaling.kind == "longrope" else ():
            count = len(getattr(scaling, factors))
            if count != rotated // 2:
                raise UserError(
                    f"{name}.scaling.{factors} has {plural(count, 'number')}, and {rotated} rotated dimensions have "
                    f"{rotated // 2:,} pairs; give one a pair"
                )
