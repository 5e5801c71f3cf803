"""Settings of T5."""

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from jaxtron.config import Config, UserError
from jaxtron.kernels.attention.config import Implementation
from jaxtron.layers.config import GATED, Activation
from jaxtron.models.family import FamilyConfig


class T5AttentionConfig(Config):
    """By which implementation attention is computed; biases by distance are for xla, materialized and reference."""

    implementation: Implementation = "auto"
    """auto: the fastest that can do what is asked on the mesh's devices; mosaic (Hopper), cudnn, xla (anywhere, memory
    linear in the sequence), materialized (probabilities in memory), reference (float32)."""
    deterministic: bool = False
    """The same bits from every run: a slower backward on GPUs, where sums else come in any order."""


class DenoisingConfig(Config):
    """What is taken out of a text for the decoder to write."""

    objective: Literal["spans", "words", "ul2"] = "spans"
    """spans of random tokens (T5, 1910.10683, section 3.1.4); words: n-grams of whole words in sentences (Megatron's);
    ul2: a mixture of seven denoisers (2205.05131)."""
    rate: float = Field(default=0.15, gt=0, lt=1)
    """Part of the tokens that is taken out; ul2 has its own."""
    mean_length: float = Field(default=3.0, ge=1)
    """Tokens of a span; words and ul2 have their own."""
    short_probability: float = Field(default=0.1, ge=0, le=1)
    """Of samples of words, the part that is made shorter than there is room for."""
    sentinels: int = Field(default=100, ge=1)
    """Ids that stand for spans: the tokenizer's <extra_id_0>, <extra_id_1> ..., or the vocabulary's last, downwards."""
    modes: bool = False
    """A token for the kind of denoiser comes first in the encoder (ul2): ids before the sentinels'."""

    @model_validator(mode="after")
    def _check(self) -> "DenoisingConfig":
        if self.modes and self.objective != "ul2":
            raise UserError(f"model.denoising.modes are of ul2, not of {self.objective}; leave them out")
        for name in ("rate", "mean_length"):
            own = self.objective == "spans" or (self.objective == "words" and name == "rate")
            if not own and getattr(self, name) != type(self).model_fields[name].default:
                raise UserError(f"model.denoising.{name} has no effect on {self.objective}; leave it out")
        return self


class T5Config(FamilyConfig):
    """An encoder of a text, and a decoder that attends to it (1910.10683; v1.1: gated MLPs, and a head of its own)."""

    FREE: ClassVar[str] = "attention.implementation attention.deterministic recompute"
    CONTENT: ClassVar[str] = "vocab_multiple"

    hidden_size: int = Field(default=512, ge=1)
    """Width of the residual streams."""
    num_heads: int = Field(default=8, ge=1)
    """Heads of an attention layer."""
    head_dim: int | None = Field(default=None, ge=1)
    """Dimensions of a head (none: hidden_size / num_heads)."""
    mlp_size: int | None = Field(default=None, ge=1)
    """Width of the MLPs (none: 4 x hidden_size)."""
    encoder_layers: int = Field(default=6, ge=1, le=2**16)
    """Layers of the encoder: attention over all tokens, and an MLP."""
    decoder_layers: int = Field(default=6, ge=1, le=2**16)
    """Layers of the decoder: causal attention, attention to the encoder's output, and an MLP."""
    decoder_length: int | None = Field(default=None, ge=3)
    """Tokens of the decoder's sequences (none: data.sequence_length, which is the encoder's)."""
    vocab_size: int = Field(default=32128, ge=1, le=2**31 - 1)
    """Entries of the vocabulary: the tokenizer's, and special tokens that it has not."""
    vocab_multiple: int = Field(default=128, ge=1)
    """The table is padded to a multiple of this."""
    activation: Activation = "relu"
    """Of the MLPs: relu (v1.0), geglu_tanh (v1.1), gelu (erf), gelu_tanh, squared_relu, swiglu, geglu, or
    clamped_swiglu."""
    tied_head: bool = True
    """The output head is the embedding table, and logits are divided by the root of hidden_size (v1.0)."""
    norm_epsilon: float = Field(default=1e-6, gt=0)
    """Added to the mean square."""
    num_buckets: int = Field(default=32, ge=4)
    """Numbers of a head by distance, which all layers of a stack share; half of the encoder's are for later keys."""
    max_distance: int = Field(default=128, ge=2)
    """From this distance on all share a bucket, in tokens."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the embeddings, of each branch before it joins the residual stream, and of what leaves a stack."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the attention probabilities; the same ones on every mesh and by every implementation."""
    initial_factor: float = Field(default=1.0, gt=0)
    """Of the standard deviations of initial weights, which follow from their inputs (the embedding's is this)."""
    attention: T5AttentionConfig = T5AttentionConfig()
    """The kernels of attention."""
    denoising: DenoisingConfig = DenoisingConfig()
    """What it learns from a text."""
    recompute: Literal["none", "full"] = "none"
    """Computed again in the backward: none, or full (layers)."""

    @model_validator(mode="after")
    def _check(self) -> "T5Config":
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_heads {self.num_heads}; change "
                "one of them, or set model.head_dim"
            )
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 2:
            raise UserError(
                f"model.num_buckets {self.num_buckets} must be a multiple of 4, and less than twice model.max_distance "
                f"{self.max_distance}"
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
        """Width of the MLPs."""
        return self.mlp_size or 4 * self.hidden_size

    @property
    def mlp_inputs(self) -> int:
        """Matrices before the activation: 2 where it is gated."""
        return 2 if self.activation in GATED else 1

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def is_random(self) -> bool:
        """Whether training drops anything."""
        return self.dropout > 0 or self.attention_dropout > 0

    @property
    def recomputed(self) -> frozenset[str]:
        """Names of the regions computed again in the backward."""
        return frozenset({"layer"} if self.recompute == "full" else ())

    @property
    def spared(self) -> frozenset[str]:
        """Regions inside of those that are not: none."""
        return frozenset()

    def decoder_tokens(self, length: int) -> int:
        """Length of the decoder's sequences beside an encoder's of `length`, in tokens."""
        return self.decoder_length or length
