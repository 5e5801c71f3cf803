"""Settings of BERT."""

from typing import Literal

from jaxtron.data.masked.config import MaskingConfig
from jaxtron.models.encoder.settings import EncoderSettings

Pairs = Literal["order", "next", "none"]


class BertConfig(EncoderSettings):
    """An encoder that predicts masked tokens, and how the two parts of its text go together (1810.04805)."""

    pairs: Pairs = "order"
    """What the pooled output predicts of a pair: order, whether its parts were swapped (Megatron-LM, 1909.11942); next,
    whether the second is of another document (BERT); none: nothing, samples are one text."""
    masking: MaskingConfig = MaskingConfig()
    """Which tokens are to be predicted."""
