"""A decoder's settings and the sizes that follow from them, which its kinds of layers read."""

import math

from pydantic import Field

from jaxtron.layers.config import (
    CENTERED,
    GATED,
    Activation,
    AttentionConfig,
    Fp8Config,
    LatentConfig,
    NormKind,
    NormPlacement,
    PositionKind,
    QkNorm,
    RotaryConfig,
)
from jaxtron.layers.moe.config import MoeConfig
from jaxtron.layers.ssm.config import DeltaConfig, MambaConfig
from jaxtron.models.family import FamilyConfig


class DecoderSettings(FamilyConfig):
    """What a decoder-only language model is, without how it is run; `ModelConfig` says what must agree."""

    pattern: str = "*-"
    """Residual layers in order: `*` attention, `W` attention in a window, `L` latent attention, `M` Mamba-2, `m` Mamba,
    `G` a gated delta net, `-` MLP, `E` a mixture of experts; `(*-)` is both in parallel on one norm. `|` cuts layers
    into the stages of mesh.pipe (with num_layers 1; one stage runs them all). One that never repeats is a
    loop over layers by their kinds."""
    hybrid: tuple[float, float, int] | None = None
    """Makes the pattern of a hybrid: the share of attention, of MLPs, and how many layers there are; the others are
    Mamba-2, as even as can be (2406.07887, Appendix A: 0.08 0.5 56)."""
    num_layers: int = Field(default=12, ge=1, le=2**16)
    """How often the pattern repeats; for `*-` the usual count of transformer layers."""
    hidden_size: int = Field(default=768, ge=1)
    """Width of the residual stream."""
    num_heads: int = Field(default=12, ge=1)
    """Query heads of an attention layer."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key/value heads: fewer than num_heads is grouped, 1 multi-query attention (none: num_heads)."""
    head_dim: int | None = Field(default=None, ge=1)
    """Dimensions of a head (none: hidden_size / num_heads)."""
    mlp_size: int | None = Field(default=None, ge=1)
    """Width of the MLP (none: 4 x hidden_size, or 8/3 of it to the next 64 below when gated, as Megatron)."""
    vocab_size: int = Field(default=257, ge=1, le=2**31 - 1)
    """Entries of the tokenizer's vocabulary."""
    vocab_multiple: int = Field(default=128, ge=1)
    """The table is padded to a multiple of this (Megatron: 128 x tensor parallel size)."""
    max_positions: int | None = Field(default=None, ge=1)
    """Entries of the learned position table (none: data.sequence_length); only for learned positions."""
    activation: Activation = "gelu_tanh"
    """Of the MLP: gelu (erf), gelu_tanh, relu, squared_relu, swiglu, geglu, geglu_tanh (Gemma), or clamped_swiglu:
    (up + 1) x gate x sigmoid(1.702 gate), gate at most 7 and up within 7 of 0 (gpt-oss)."""
    norm: NormKind = "layer_norm"
    """layer_norm or rms_norm, or each with _1p: the stored scale is gamma - 1 (Nemotron; Gemma)."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Added to the variance."""
    embedding_norm: bool = False
    """A norm right after the embedding (BLOOM)."""
    embedding_multiplier: float = Field(default=1.0, gt=0)
    """Factor of rows of the embedding table, rounded to the step's precision (Gemma: sqrt(hidden_size); Granite)."""
    residual_multiplier: float = Field(default=1.0, gt=0)
    """Factor of what each branch adds to the residual stream (Granite)."""
    norm_placement: NormPlacement = "input"
    """Norms on what branches read (input), on what they make before it joins the stream (output: OLMo 2), or both
    (Gemma 2)."""
    branch_norms: bool = False
    """In a group such as `(*-)` each branch reads a norm of its own, not one that all share (GPT-NeoX, Falcon)."""
    qk_norm: QkNorm = False
    """Norms on queries and keys: true, per head with scales that all heads share; each_head, with its own (Cohere);
    projection, over all heads as one (OLMo 2)."""
    bias: bool = True
    """Biases of linear layers, experts, their router and LayerNorms."""
    norm_bias: bool | None = None
    """Biases of LayerNorms alone, as Nemotron's (none: as `bias`)."""
    qkv_bias: bool | None = None
    """Biases of the query, key and value projections (none: as `bias`)."""
    attention_output_bias: bool | None = None
    """That of attention's projection back to the stream (none: as `bias`)."""
    mlp_bias: bool | None = None
    """Biases of the MLP (none: as `bias`)."""
    position: PositionKind = "learned"
    """learned, rotary, alibi or none."""
    rotary: RotaryConfig = RotaryConfig()
    """Only for rotary positions."""
    window_rotary: RotaryConfig | None = None
    """That of `W` layers, where it is another (none: as `rotary`; Gemma 3)."""
    tied_head: bool = True
    """The output head is the embedding table."""
    head_bias: bool = False
    """A bias of the output head, whatever `bias` says (GPT-J, Phi)."""
    logit_scale: float = Field(default=1.0, gt=0)
    """Factor of the head's logits, before its bias (Cohere; Granite: 1 / logits_scaling)."""
    logit_soft_cap: float | None = Field(default=None, gt=0)
    """The head's logits l become cap x tanh(l / cap) (Gemma 2, 2408.00118); none: as they are."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the embedding and of each branch before it joins the residual stream."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the attention probabilities; the same ones on every mesh and by every implementation."""
    initial_std: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights; projections back to the stream use it / sqrt(branches): of `*-` there
    are 2 x num_layers."""
    latent: LatentConfig = LatentConfig()
    """Widths of `L` layers, whose heads are made of latents."""
    attention: AttentionConfig = AttentionConfig()
    """Scores of attention, and its kernels."""
    moe: MoeConfig = MoeConfig()
    """Experts of `E` layers."""
    mamba: MambaConfig = MambaConfig()
    """State-space layers, `M` and `m`."""
    delta: DeltaConfig = DeltaConfig()
    """Gated delta nets, `G`."""
    fp8: Fp8Config = Fp8Config()
    """Products of 8-bit numbers, for GPUs that have them."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of log(Z)^2 in the loss (PaLM: 1e-4)."""

    @property
    def expert_bias(self) -> bool:
        """Whether experts and their router have biases."""
        return self.bias if self.moe.bias is None else self.moe.bias

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_attention_output_bias(self) -> bool:
        """Whether attention's projection back has a bias."""
        return self.bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def has_mlp_bias(self) -> bool:
        """Whether the MLP has biases."""
        return self.bias if self.mlp_bias is None else self.mlp_bias

    def num_norms(self, branches: int) -> int:
        """Norms of a residual layer with so many branches."""
        inputs = branches if self.branch_norms else 1
        return inputs * (self.norm_placement != "output") + branches * (self.norm_placement != "input")

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Dimensions of a head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def norms_have_bias(self) -> bool:
        """Whether norms add a bias; those by the root mean square never do."""
        return self.norm in CENTERED and (self.bias if self.norm_bias is None else self.norm_bias)

    @property
    def mlp_width(self) -> int:
        """Width of the MLP."""
        if self.mlp_size:
            return self.mlp_size
        return int(4 * self.hidden_size * 2 / 3) // 64 * 64 if self.activation in GATED else 4 * self.hidden_size

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple
