"""Settings that families with encoders share, and the sizes that follow from them."""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from jaxtron.config import Config, UserError
from jaxtron.kernels.attention.config import Implementation
from jaxtron.layers.config import CENTERED, GATED, Activation, NormKind
from jaxtron.models.family import FamilyConfig
from jaxtron.models.fits import check_heads, check_multiple
from jaxtron.sharding.config import ContextConfig

ATTENTION_CORE = "attention_core"


class EncoderAttentionConfig(Config):
    """By which implementation attention is computed."""

    implementation: Implementation = "auto"
    """auto: the fastest that can do what is asked on the mesh's devices; mosaic (Hopper), cudnn, xla (anywhere, memory
    linear in the sequence), materialized (probabilities in memory), reference (float32)."""
    deterministic: bool = False
    """The same bits from every run: a slower backward on GPUs, where sums else come in any order."""


class EncoderSettings(FamilyConfig):
    """Layers of attention over all tokens of a sequence, and what is before them; a family adds its heads."""

    FREE: ClassVar[str] = "attention.implementation attention.deterministic recompute"
    CONTENT: ClassVar[str] = "vocab_multiple"

    num_layers: int = Field(default=12, ge=1, le=2**16)
    """Transformer layers: attention and an MLP."""
    hidden_size: int = Field(default=768, ge=1)
    """Width of the residual stream."""
    num_heads: int = Field(default=12, ge=1)
    """Heads of an attention layer."""
    head_dim: int | None = Field(default=None, ge=1)
    """Dimensions of a head (none: hidden_size / num_heads)."""
    mlp_size: int | None = Field(default=None, ge=1)
    """Width of the MLP (none: 4 x hidden_size)."""
    vocab_size: int = Field(default=261, ge=1, le=2**31 - 1)
    """Entries of the vocabulary: the tokenizer's, and special tokens that it has not."""
    vocab_multiple: int = Field(default=128, ge=1)
    """The table is padded to a multiple of this (Megatron: 128 x tensor parallel size)."""
    max_positions: int | None = Field(default=None, ge=1)
    """Entries of the learned position table (none: data.sequence_length)."""
    token_types: int = Field(default=2, ge=0)
    """Kinds of tokens with an embedding of their own: of the first part of a pair and of the second (0: none)."""
    activation: Activation = "gelu"
    """Of the MLP: gelu (erf), gelu_tanh, relu, squared_relu, swiglu, geglu, geglu_tanh, or clamped_swiglu."""
    norm: NormKind = "layer_norm"
    """layer_norm or rms_norm, or each with _1p: the stored scale is gamma - 1."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Added to the variance (Hugging Face's BERT: 1e-12)."""
    norm_placement: Literal["pre", "post"] = "pre"
    """pre: on what attention and MLP read, and after the last layer (Megatron-LM, 1909.08053, Fig. 7b); post: on the
    stream after each of them, and after the embedding (BERT, 1810.04805), which diverges in large models."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the embedding and of each branch before it joins the residual stream."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the attention probabilities; the same ones on every mesh and by every implementation."""
    initial_std: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights; projections back to the stream use it / sqrt(2 x num_layers)."""
    attention: EncoderAttentionConfig = EncoderAttentionConfig()
    """The kernels of attention."""
    recompute: Literal["none", "selective", "all_but_cores", "full"] = "none"
    """Computed again in the backward: none, selective (attention cores that keep scores), all_but_cores (layers without
    attention cores that keep none), full (layers)."""

    @model_validator(mode="after")
    def _check_widths(self) -> "EncoderSettings":
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_heads {self.num_heads}; change "
                "one of them, or set model.head_dim"
            )
        return self

    @property
    def head_size(self) -> int:
        """Dimensions of a head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def heads_width(self) -> int:
        """Of all heads together."""
        return self.num_heads * self.head_size

    @property
    def mlp_width(self) -> int:
        """Width of the MLP."""
        return self.mlp_size or 4 * self.hidden_size

    @property
    def mlp_inputs(self) -> int:
        """Matrices before the activation: 2 where it is gated."""
        return 2 if self.activation in GATED else 1

    @property
    def norms_have_bias(self) -> bool:
        """Whether norms add a bias; those by the root mean square never do."""
        return self.norm in CENTERED

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def tied_head(self) -> bool:
        """The output head is the embedding table."""
        return True

    @property
    def output_std(self) -> float:
        """Initial standard deviation of projections back to the residual stream (1909.08053, Sec. 4.2)."""
        return self.initial_std / math.sqrt(2 * self.num_layers)

    @property
    def is_random(self) -> bool:
        """Whether a step draws random numbers."""
        return self.dropout > 0 or self.attention_dropout > 0

    @property
    def recomputed(self) -> frozenset[str]:
        """Names of the regions computed again in the backward; `layer` for all of it."""
        names = {"none": (), "selective": (ATTENTION_CORE,), "all_but_cores": ("layer",), "full": ("layer",)}
        return frozenset(names[self.recompute])

    @property
    def spared(self) -> frozenset[str]:
        """Regions inside of those that are not computed again, where they keep nothing quadratic in the sequence."""
        return frozenset({ATTENTION_CORE} if self.recompute == "all_but_cores" else ())


SettingsT = TypeVar("SettingsT", bound=EncoderSettings)


def check(config: EncoderSettings, sizes: Mapping[str, int], _length: int, context: ContextConfig) -> None:
    """`UserError` where layers or vocabulary do not fit a mesh of these sizes by flag."""
    check_heads({"num_heads": config.num_heads}, sizes, context)
    check_multiple("model.mlp_size", config.mlp_width, sizes["tensor"])
    check_multiple("the padded vocabulary (model.vocab_multiple)", config.padded_vocab, sizes["tensor"])


def resolve(config: SettingsT, length: int) -> SettingsT:
    """The model with a table of positions as long as sequences are, where its settings say nothing."""
    if config.max_positions is None:
        return config.model_copy(update={"max_positions": length})
    if config.max_positions < length:
        raise UserError(f"data.sequence_length {length} is longer than model.max_positions {config.max_positions}")
    return config


def evaluated(config: SettingsT) -> SettingsT:
    """The model with nothing drawn."""
    return config.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0})


def sizes(config: EncoderSettings) -> str:
    """What decides how large the model is."""
    named = {"num_layers": config.num_layers, "hidden_size": config.hidden_size}
    texts = [f"model.{name} {value:,}" for name, value in named.items()]
    return f"{', '.join(texts)} and model.vocab_size {config.vocab_size:,}"
