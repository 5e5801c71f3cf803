"""What to train on, and how it becomes token ids."""

from typing import Literal

from pydantic import Field, model_validator

from jaxtron.config import Config, FileName, NoEffect, UserError

PYTHON_STDLIB = "python:stdlib"
TOKENIZER_KINDS = (
    "bytes, characters (training only: their vocabulary comes from the data), a Hugging Face tokenizer.json or its "
    "folder, a SentencePiece .model, a .tiktoken file of ranks, or a tiktoken encoding such as cl100k_base"
)
Format = Literal["auto", "text", "tokens", "chat", "mock"]
# prefixes, weights and prefixes in turn, pairs of both, or a file of such words
Blend = FileName | tuple[tuple[float, FileName], ...] | tuple[FileName, ...]
# what only these formats read
FIELDS_OF: dict[str, tuple[str, ...]] = {
    "train": ("tokens",),
    "validation": ("tokens",),
    "test": ("tokens",),
    "split": ("tokens", "mock"),
    "samples": ("tokens", "mock"),
    "validation_fraction": ("text", "chat"),
    "fill_in_middle": ("text", "tokens", "mock"),
    "chat": ("chat",),
    "mask_end_of_document": ("text", "tokens", "mock"),
    "reset_positions": ("text", "tokens", "mock"),
    "reset_attention": ("text", "tokens", "mock"),
}


class FillInMiddleConfig(Config):
    """Documents rearranged as prefix, suffix, middle (2207.14255); tokens are given by id."""

    prefix: int = Field(ge=0)
    """Token before what comes first in the document."""
    middle: int = Field(ge=0)
    """Token before what is to be filled in."""
    suffix: int = Field(ge=0)
    """Token before what comes last."""
    rate: float = Field(default=0.5, ge=0, le=1)
    """Share of the documents that are rearranged."""
    spm_rate: float = Field(default=0.5, ge=0, le=1)
    """Share of those whose suffix is written first."""
    fragment: int | None = None
    """Token between parts of a document, cut one by one."""
    fragment_rate: float | None = Field(default=None, ge=0, le=1)
    """Share of the parts that are cut."""
    characters: bool = True
    """Cut between characters; else between tokens, which is faster."""


class ChatConfig(Config):
    """Conversations, `{"messages": [{"role": ..., "content": ...}]}` a line; answers have loss, the rest none."""

    template: FileName | None = None
    """File of a Jinja chat template, or a tokenizer_config.json that has one; none: ChatML."""
    variables: dict[str, str | bool | int | float] = {}
    """Values of names in the template, as variables.enable_thinking false; bos_token, eos_token and the like are the
    tokenizer's by default."""
    markers: tuple[str, ...] = ()
    """Texts that the template writes and messages may not contain."""
    roles: dict[str, str] = {}
    """What further names of roles mean, as roles.Bob assistant; or themselves."""
    normalize: Literal["tokens", "answers"] = "tokens"
    """What the loss is a mean over: tokens of answers, or answers, whose tokens then weigh 1 together however many they
    are (BLOOMZ, 2211.01786)."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What happens to a conversation longer than a sequence."""
    max_dropped: float = Field(default=0.1, ge=0, le=1)
    """Share of the conversations that may be left out, for all reasons."""


class DataConfig(Config):
    """Text or tokens, tokenizer, sequences and loading."""

    path: Blend = PYTHON_STDLIB
    """Files or folders of UTF-8 text, or prefixes of Megatron's .bin/.idx files (here, gs://, s3://), with weights to
    blend: 0.7 a 0.3 b. python:stdlib is the source of Python's own library."""
    format: Format = "auto"
    """text, tokens (.bin/.idx), chat (JSON lines of conversations) or mock (Megatron's counted tokens); auto: tokens if
    there is a .idx, else text."""
    train: Blend | None = None
    """Prefixes to train on alone, instead of a split of the path."""
    validation: Blend | None = None
    """Prefixes to validate on, beside data.train."""
    test: Blend | None = None
    """Prefixes for the loss at the end, beside data.train."""
    split: str = "969,30,1"
    """Shares of each file to train on, to validate on, to test on (Megatron's)."""
    samples: int | None = Field(default=None, ge=1)
    """Samples that the order is made for; none: those of train.steps (Megatron's)."""
    skip: tuple[tuple[int, int], ...] = ()
    """Samples left out: from the first of each pair to before the second, by their order."""
    tokenizer: FileName = "bytes"
    """bytes, characters (vocabulary from the data), a Hugging Face tokenizer.json, a SentencePiece .model, or
    tiktoken's ranks or encoding."""
    end_of_document: str | None = None
    """Token of the tokenizer that ends a document; by default what its files declare (eos_token), or its special token
    <|endoftext|>, </s> or the like."""
    sequence_length: int = Field(default=256, ge=1)
    """Tokens in a sequence."""
    mask_end_of_document: bool = False
    """Predictions made from the end of a document have no loss (Megatron: eod-mask-loss)."""
    reset_positions: bool = False
    """Positions start again after each end of a document (Megatron: reset-position-ids)."""
    reset_attention: bool = False
    """Tokens see those of their own document only (Megatron: reset-attention-mask)."""
    fill_in_middle: FillInMiddleConfig | None = None
    """Documents with the middle last."""
    chat: ChatConfig = ChatConfig()
    """Conversations."""
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the text, at its end, or of the conversations, kept for validation."""
    cache_directory: FileName | None = None
    """Where token ids and orders are kept; by default $XDG_CACHE_HOME/jaxtron or ~/.cache/jaxtron."""
    workers: int = Field(default=1, ge=1)
    """Threads (of each process) that read batches ahead of the step."""
    processes: int = Field(default=0, ge=0)
    """Processes that read batches; 0: threads of this one."""
    prefetch: int = Field(default=4, ge=1)
    """Batches read ahead of the step; at least as many as workers."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.workers > self.prefetch:
            raise UserError(
                f"data.workers {self.workers} is more than data.prefetch {self.prefetch}, the batches they read ahead; "
                "lower workers or raise prefetch"
            )
        if self.train is not None and self.path != PYTHON_STDLIB:
            raise UserError("data.path and data.train are both given; keep one: data.train has no split")
        if self.train is None and (self.validation is not None or self.test is not None):
            raise UserError("data.validation and data.test need data.train; with data.path give data.split instead")
        if self.format != "auto":
            self.check_format(self.format)
        bounds = [bound for pair in self.skip for bound in pair]
        if bounds != sorted(set(bounds)) or any(bound < 0 for bound in bounds):
            raise UserError(
                f"data.skip {[list(pair) for pair in self.skip]} must be pairs of sample numbers that rise throughout"
            )
        return self

    @property
    def optional_fields(self) -> frozenset[str]:
        """Those of a `TokenBatch` that samples come with: positions of their own, the document of each token."""
        has = {"positions": self.reset_positions, "segments": self.reset_attention}
        return frozenset(name for name, is_there in has.items() if is_there or self.format == "chat")

    def check_format(self, name: str) -> None:
        """`UserError` for a setting that data of this format does not read."""
        for field, formats in FIELDS_OF.items():
            # by value: a saved configuration names every field
            if name not in formats and getattr(self, field) != type(self).model_fields[field].default:
                raise NoEffect(f"data.{field}", getattr(self, field), {"data.format": name})
