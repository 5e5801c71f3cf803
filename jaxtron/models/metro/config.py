"""Settings of METRO-LM."""

import math
from typing import Literal

from pydantic import Field

from jaxtron.layers.config import Activation
from jaxtron.models.encoder.settings import EncoderSettings

# tokens that are text in no sample: [CLS] before it and [SEP] after it
SPECIAL_TOKENS = 2
# rows of a batch have so many masked places, or a multiple, so that tensor parts share them
PLACES = 8


class MetroConfig(EncoderSettings):
    """An encoder that learns from what a smaller one, trained beside it, puts where tokens are masked (2204.06644)."""

    auxiliary_layers: int = Field(default=4, ge=1, le=2**16)
    """Layers of the smaller encoder, which is as wide and drops nothing (the paper's: 4 for 12 layers, 6 for 24)."""
    masked_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of a text's tokens that are masked for the smaller encoder."""
    detection_weight: float = Field(default=50.0, ge=0)
    """Of the loss by which the larger encoder tells at each token whether it was replaced."""
    correction_weight: float = Field(default=1.0, ge=0)
    """Of the loss by which it tells what stood at each masked place."""
    distance_buckets: int = Field(default=32, ge=4)
    """Distances that attention tells apart, near ones each and far ones together (the paper's large: 128)."""
    max_distance: int = Field(default=128, ge=4)
    """In tokens: what is farther is in the last bucket of its side (the paper's large: 256)."""
    token_types: int = Field(default=0, ge=0)
    """Kinds of tokens with an embedding of their own (0: none; a sample has one text)."""
    activation: Activation = "relu"
    """Of the MLP: gelu (erf), gelu_tanh, relu, squared_relu, swiglu, geglu, geglu_tanh, or clamped_swiglu."""
    norm_placement: Literal["pre", "post"] = "post"
    """post: on the stream after attention and MLP, and after the embedding; pre: on what they read, and after the last
    layer."""

    @property
    def auxiliary(self) -> EncoderSettings:
        """Of the smaller encoder."""
        changes = {"num_layers": self.auxiliary_layers, "dropout": 0.0, "attention_dropout": 0.0}
        return self.model_copy(update=changes)

    def masked_tokens(self, tokens: int) -> int:
        """How many of so many tokens of text are masked: at least one, where there is text."""
        return min(tokens, max(1, round(tokens * self.masked_share)))

    def places(self, length: int) -> int:
        """Masked places that each row of a batch has room for, of sequences of `length` tokens."""
        return math.ceil(self.masked_tokens(max(length - SPECIAL_TOKENS, 1)) / PLACES) * PLACES
