"""What to train on, and how it becomes token ids."""

from pydantic import Field, model_validator

from jaxtron.config import Config, UserError

PYTHON_STDLIB = "python:stdlib"


class DataConfig(Config):
    """Text, tokenizer, windows and loading."""

    path: str | tuple[str, ...] = Field(
        default=PYTHON_STDLIB,
        description=f"Files or folders of UTF-8 text; {PYTHON_STDLIB} is the source of Python's own standard library.",
    )
    tokenizer: str = Field(
        default="bytes",
        description="bytes, characters (vocabulary from the data) or a Hugging Face tokenizer.json file.",
    )
    end_of_document: str | None = Field(
        default=None,
        description="Token of the tokenizer.json that ends a document; by default its <|endoftext|>, </s> or the like.",
    )
    sequence_length: int = Field(default=256, ge=1, description="Tokens in a sequence.")
    mask_end_of_document: bool = Field(
        default=False, description="Predictions made from the end of a document have no loss (Megatron: eod-mask-loss)."
    )
    reset_positions: bool = Field(
        default=False, description="Positions start again after each end of a document (Megatron: reset-position-ids)."
    )
    reset_attention: bool = Field(
        default=False,
        description="Tokens see those of their own document only (Megatron: reset-attention-mask).",
    )
    validation_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="Share of the tokens, at the end of the data, kept for validation."
    )
    cache_directory: str | None = Field(
        default=None, description="Where token ids are kept; by default $XDG_CACHE_HOME/jaxtron or ~/.cache/jaxtron."
    )
    workers: int = Field(default=1, ge=1, description="Threads that read batches ahead of the step.")
    prefetch: int = Field(default=4, ge=1, description="Batches read ahead of the step; at least as many as workers.")

    @model_validator(mode="after")
    def _every_worker_has_a_batch(self) -> "DataConfig":
        if self.workers > self.prefetch:
            raise UserError(
                f"data.workers {self.workers} is more than data.prefetch {self.prefetch}, the batches they read ahead; "
                "lower workers or raise prefetch"
            )
        return self
