"""From the data settings to samples, their tokenizer and the loader."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from jaxtron.config import UserError
from jaxtron.data.config import DataConfig
from jaxtron.data.files import find_files
from jaxtron.data.loader import Loader, LocalRows
from jaxtron.data.source import Source, WindowSource
from jaxtron.data.text import open_tokens
from jaxtron.data.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Data:
    """Everything a run reads.

    `fingerprint` is equal for two runs exactly when sample number i has the same tokens and place in the order in both,
    so that a position saved by one means the same in the other.
    """

    config: DataConfig
    seed: int
    train: Source
    validation: Source
    tokenizer: Tokenizer
    fingerprint: str

    def train_loader(self, *, batch_size: Callable[[int], int], local_rows: LocalRows, position: int = 0) -> Loader:
        """Batches of the training part, as the settings say; the arguments are those of `Loader`."""
        return Loader(
            self.train,
            seed=self.seed,
            batch_size=batch_size,
            local_rows=local_rows,
            position=position,
            workers=self.config.workers,
            prefetch=self.config.prefetch,
        )


def open_data(config: DataConfig, *, seed: int) -> Data:
    """The data that the settings name, tokenized now unless the cache has it; UserError for bad input."""
    paths = (config.path,) if isinstance(config.path, str) else config.path
    if not paths or not all(paths):
        raise UserError("--data.path is empty; give files or folders of text")
    stream = open_tokens(
        find_files(paths),
        tokenizer=load_tokenizer(config.tokenizer, end_of_document=config.end_of_document),
        cache_directory=_cache_directory(config),
    )
    train, validation = _split(stream.tokens, config)
    identity = f"{stream.fingerprint} {config.sequence_length} {len(train)} {seed}"
    return Data(
        config=config,
        seed=seed,
        train=WindowSource(train, sequence_length=config.sequence_length, pad_last=False),
        validation=WindowSource(validation, sequence_length=config.sequence_length, pad_last=True),
        tokenizer=stream.tokenizer,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
    )


def _split(
    tokens: Integer[np.ndarray, "T"], config: DataConfig
) -> tuple[Integer[np.ndarray, "Train"], Integer[np.ndarray, "Validation"]]:
    """The first part to train on and the last to validate on."""
    num_train = int(len(tokens) * (1 - config.validation_fraction))
    num_validation = len(tokens) - num_train
    if num_train <= config.sequence_length:
        raise UserError(
            f"the data has {len(tokens)} tokens, {num_train} of them to train on, but one sample needs "
            f"{config.sequence_length + 1}; give more text or lower --data.sequence_length"
        )
    if config.validation_fraction > 0 and num_validation < 2:
        raise UserError(
            f"--data.validation_fraction {config.validation_fraction} of {len(tokens)} tokens leaves {num_validation} "
            "to validate on, but 2 are needed; raise it, or set it to 0 for no validation"
        )
    return tokens[:num_train], tokens[num_train:]


def _cache_directory(config: DataConfig) -> Path:
    if config.cache_directory is not None:
        return Path(config.cache_directory).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxtron"
