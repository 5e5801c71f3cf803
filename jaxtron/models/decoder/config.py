"""A decoder's configuration: its pattern and what its layers are made of."""

import math
from typing import ClassVar, Literal, NoReturn

from pydantic import Field, model_validator

from jaxtron.config import NoEffect, UserError
from jaxtron.layers.config import Activation, AttentionConfig, NormKind, PositionKind, RotaryConfig
from jaxtron.models.decoder.pattern import ATTENTIONS, MLP, SYMBOLS, WINDOW, Pattern, parse
from jaxtron.models.family import FamilyConfig

# What `recompute: selective` drops and computes again (2205.05198): the part quadratic in the sequence.
SELECTIVE = ("attention_core",)
# What only layers of one kind read, or contain.
FIELDS_OF = {
    ATTENTIONS: ("num_kv_heads", "head_dim", "qk_norm", "qkv_bias", "attention_dropout", "attention"),
    (MLP,): ("mlp_size", "activation"),
}
REGIONS_OF = {ATTENTIONS: ("attention_core", "attention"), (MLP,): ("mlp",)}
RecomputeName = Literal["attention_core", "attention", "mlp"]


class ModelConfig(FamilyConfig):
    """A decoder-only language model (GPT, Llama, PaLM, BLOOM, Nemotron, ...)."""

    FREE: ClassVar[str] = "attention.implementation attention.deterministic recompute unroll"
    CONTENT: ClassVar[str] = "vocab_multiple"

    pattern: str = "*-"
    """Residual layers in order: `*` attention, `W` attention in a window, `-` MLP, `(*-)` both in parallel on one norm.
    `|` cuts all layers into the stages of mesh.pipe (with num_layers 1; one stage runs them all)."""
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
    """Of the MLP: gelu (erf), gelu_tanh, relu, squared_relu, swiglu or geglu."""
    norm: NormKind = "layer_norm"
    """layer_norm, layer_norm_1p (stored scale is gamma - 1) or rms_norm."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Added to the variance."""
    embedding_norm: bool = False
    """A norm right after the embedding (BLOOM)."""
    qk_norm: bool = False
    """Norms on queries and keys, per head."""
    bias: bool = True
    """Biases of linear layers and LayerNorms."""
    qkv_bias: bool | None = None
    """Biases of the query, key and value projections (none: as `bias`)."""
    position: PositionKind = "learned"
    """learned, rotary, alibi or none."""
    rotary: RotaryConfig = RotaryConfig()
    """Only for rotary positions."""
    tied_head: bool = True
    """The output head is the embedding table."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the embedding and of each branch before it joins the residual stream."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the attention probabilities."""
    initial_std: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights; projections back to the stream use it / sqrt(2 x num_layers)."""
    attention: AttentionConfig = AttentionConfig()
    """Scores of attention, and its kernels."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of log(Z)^2 in the loss (PaLM: 1e-4)."""
    recompute: Literal["none", "selective", "full"] | tuple[RecomputeName, ...] = "none"
    """Computed again in the backward: none, selective (attention core), full (layers), or a list of names."""
    unroll: int | None = Field(default=None, ge=1)
    """Periods unrolled in each iteration of the scan over layers (none: 1)."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        try:
            parsed = parse(self.pattern, self.num_layers)
        except UserError as error:
            raise ValueError(str(error)) from None
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_heads {self.num_heads}; "
                "change one or set model.head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.kv_heads}"
            )
        given = self.model_fields_set
        if self.position != "rotary" and "rotary" in given and self.rotary != RotaryConfig():
            self._refuse("rotary", "position")
        if self.position != "learned" and self.max_positions is not None:
            self._refuse("max_positions", "position")
        if self.position in ("rotary", "alibi") and not parsed.count(*ATTENTIONS):
            self._refuse("position", "pattern", "it has no attention; leave it out")
        return self

    @model_validator(mode="after")
    def _refuse_ignored_fields(self) -> "ModelConfig":
        missing = [symbols for symbols in FIELDS_OF if not self.layout.count(*symbols)]
        for symbols in missing:
            kinds = " or ".join(f"{SYMBOLS[symbol]} ({symbol})" for symbol in symbols)
            for field in FIELDS_OF[symbols]:
                # by value: a saved configuration names every field
                if getattr(self, field) != type(self).model_fields[field].default:
                    self._refuse(field, "pattern", f"leave it out, or add {kinds} to the pattern")
        without = {name for symbols in missing for name in REGIONS_OF[symbols]}
        for name in self.recomputed & without:
            self._refuse("recompute", "pattern", f"it has no {name}; leave that out")
        self._check_attention()
        if {"attention", "attention_core"} <= self.recomputed:
            raise ValueError("model.recompute attention_core has no effect beside attention, which contains it")
        if self.layout.count(MLP) and not self.mlp_width:
            raise ValueError(
                f"model.hidden_size {self.hidden_size} is too small for the default width of a gated MLP; "
                "set model.mlp_size"
            )
        return self

    def _refuse(self, field: str, choice: str, mend: str = "leave it out") -> NoReturn:
        raise NoEffect(f"model.{field}", getattr(self, field), {f"model.{choice}": getattr(self, choice)}, mend)

    def _check_attention(self) -> None:
        attention, fields = self.attention, type(self.attention).model_fields
        if (attention.window is not None) != bool(self.layout.count(WINDOW)):
            raise ValueError(
                f"model.attention.window {attention.window} and model.pattern {self.pattern!r} do not agree: layers "
                f"with a window are {WINDOW}"
            )
        drops_by_name = attention.implementation == "materialized"
        for name in ("soft_cap", "sinks", "deterministic", *(() if drops_by_name else ("implementation",))):
            if self.attention_dropout and getattr(attention, name) != fields[name].default:
                raise NoEffect(
                    f"model.attention.{name}",
                    getattr(attention, name),
                    {"model.attention_dropout": self.attention_dropout},
                    "leave it out, or set model.attention_dropout to 0",
                )

    @property
    def layout(self) -> Pattern:
        """The parsed pattern."""
        return parse(self.pattern, self.num_layers)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Dimensions of a head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def mlp_width(self) -> int:
        """Width of the MLP."""
        if self.mlp_size:
            return self.mlp_size
        return (
            int(4 * self.hidden_size * 2 / 3) // 64 * 64
            if self.activation in ("swiglu", "geglu")
            else 4 * self.hidden_size
        )

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def output_std(self) -> float:
        """Initial standard deviation of projections back to the residual stream (GPT-2, Megatron)."""
        return self.initial_std / math.sqrt(2 * self.num_transformer_layers)

    @property
    def num_transformer_layers(self) -> int:
        """Layers as Megatron counts them: pairs of attention and MLP."""
        return max(self.layout.count(*ATTENTIONS), self.layout.count(MLP))

    @property
    def recomputed(self) -> frozenset[str]:
        """Names of the regions computed again in the backward; `layer` for all of it."""
        if isinstance(self.recompute, tuple):
            return frozenset(self.recompute)
        return frozenset({"none": (), "selective": SELECTIVE, "full": ("layer",)}[self.recompute])
