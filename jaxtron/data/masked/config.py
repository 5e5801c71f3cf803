"""What is masked of a text, and how long samples of sentences are."""

from pydantic import Field

from jaxtron.config import Config


class MaskingConfig(Config):
    """Tokens to predict: whole words, in n-grams (1907.10529; Megatron's mask_lm_prob and max_ngrams)."""

    probability: float = Field(default=0.15, gt=0, lt=1)
    """Share of a sample's tokens that are predicted; of these 80 % become [MASK], 10 % another token, 10 % stay."""
    max_ngram: int = Field(default=3, ge=1)
    """Words of the longest n-gram; n of them are as likely as 1/n."""
    whole_words: bool = True
    """All tokens of a word are masked together, as far as the tokenizer's pieces show where words begin; of bytes each
    is a word."""
    short_probability: float = Field(default=0.1, ge=0, le=1)
    """Share of the samples that are made shorter than a sequence (Megatron's short_seq_prob)."""
