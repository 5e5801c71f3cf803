"""Settings of the toy family."""

from typing import ClassVar

from pydantic import Field

from jaxtron.models.family import FamilyConfig


class ToyConfig(FamilyConfig):
    """An encoder of sequences, what it found gated into a decoder of the next token, and a guess of a label."""

    FREE: ClassVar[str] = "label_weight"

    width: int = Field(default=16, ge=1)
    """Of the residual streams; MLPs are four times as wide."""
    encoder_layers: int = Field(default=4, ge=1)
    """Layers of the encoder."""
    decoder_layers: int = Field(default=4, ge=1)
    """Layers of the decoder."""
    vocab_size: int = Field(default=257, ge=1)
    """Entries of the tokenizer's vocabulary, padded to a multiple of 8."""
    label_weight: float = Field(default=0.5, ge=0)
    """Of the label's loss beside that of the tokens."""

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table."""
        return -(-self.vocab_size // 8) * 8
