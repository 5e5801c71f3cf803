"""From the data settings to samples, their tokenizer and the loader."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from jaxtron.config import UserError
from jaxtron.data.chat.source import Conversations
from jaxtron.data.chat.template import open_template
from jaxtron.data.config import DataConfig
from jaxtron.data.files.data_path import DataPath, read_data_path
from jaxtron.data.files.reader import check_text, find_files
from jaxtron.data.files.storage import cache_root
from jaxtron.data.loader import BatchSize, Loader, LocalRows
from jaxtron.data.megatron.boundaries import Boundaries
from jaxtron.data.megatron.fill_in_middle import FillInMiddle, FillInMiddleSource
from jaxtron.data.megatron.gpt_source import SPLITS, BlendedSource, GPTSource, open_blend
from jaxtron.data.megatron.indexed import IndexedReader
from jaxtron.data.megatron.mock import MockReader
from jaxtron.data.megatron.splits import split_ranges
from jaxtron.data.source import NO_SAMPLES, Source
from jaxtron.data.text import open_tokens
from jaxtron.data.tokenizers import Tokenizer, load_tokenizer
from jaxtron.data.window_source import WindowSource
from jaxtron.words import plural

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Everything a run reads.

    `fingerprint` is equal for two runs exactly when sample number i has the same tokens and place in the order in both,
    so that a position saved by one means the same in the other. `is_ordered`: samples are numbered in the order of
    training; else they are shuffled anew each epoch. `notes` are lines to print before training.
    """

    config: DataConfig
    seed: int
    train: Source
    validation: Source
    tokenizer: Tokenizer
    fingerprint: str
    test: Source = field(default=NO_SAMPLES)
    is_ordered: bool = False
    notes: tuple[str, ...] = ()

    def train_loader(self, *, batch_size: BatchSize, local_rows: LocalRows, position: int = 0) -> Loader:
        """Batches of the training part, as the settings say; the arguments are those of `Loader`."""
        return Loader(
            self.train,
            seed=None if self.is_ordered else self.seed,
            batch_size=batch_size,
            local_rows=local_rows,
            position=position,
            skip=self.config.skip,
            workers=self.config.workers,
            processes=self.config.processes,
            prefetch=self.config.prefetch,
        )


def open_data(config: DataConfig, *, seed: int, train_samples: int | None = None) -> Data:
    """The data that the settings name, tokenized now unless the cache has it; UserError for bad input.

    `train_samples` is how many the run trains on, by which Megatron orders its epochs (none: one epoch).
    """
    name = _format(config)
    config.check_format(name)
    return {"text": _open_text, "tokens": _open_tokens, "mock": _open_tokens, "chat": _open_chat}[name](
        config, seed, config.samples or train_samples
    )


def wrapped(data: Data, wrap: Callable[[Source], Source]) -> Data:
    """The same with samples made of each of its own."""
    parts = {name: wrap(getattr(data, name)) for name in ("train", "validation", "test")}
    return replace(data, **parts)


def needs_tokens(config: DataConfig) -> bool:
    """Whether the settings name Megatron's files, and not text."""
    return _format(config) == "tokens"


def _format(config: DataConfig) -> str:
    if config.format != "auto":
        return config.format
    if config.train is not None:
        return "tokens"
    return "tokens" if read_data_path(config.path, "data.path").is_tokens else "text"


def _open_text(config: DataConfig, seed: int, _samples: int | None) -> Data:
    cache = cache_root(config.cache_directory)
    files = find_files(read_data_path(config.path, "data.path").files(), cache=cache)
    if config.format == "auto":
        check_text(files)
    tokenizer = load_tokenizer(config.tokenizer, end_of_document=config.end_of_document)
    if tokenizer is not None and tokenizer.end_of_document is None and len(files) > 1:
        logger.warning(
            "the tokenizer %s has no end of document, so documents follow one another unmarked; name its token with "
            "--data.end_of_document",
            config.tokenizer,
        )
    stream = open_tokens(files, tokenizer=tokenizer, cache_directory=cache)
    train, validation = _split(stream.tokens, config)
    boundaries = _source_boundaries(config, stream.tokenizer)
    source_settings = {"sequence_length": config.sequence_length, "boundaries": boundaries}
    identity = f"{stream.fingerprint} {config.sequence_length} {len(train)} {seed}"
    return Data(
        config=config,
        seed=seed,
        train=_filled(WindowSource(train, pad_last=False, **source_settings), config, seed, stream.tokenizer),
        validation=_filled(WindowSource(validation, pad_last=True, **source_settings), config, seed, stream.tokenizer),
        tokenizer=stream.tokenizer,
        fingerprint=_identity(identity, config),
    )


def _open_tokens(config: DataConfig, seed: int, samples: int | None) -> Data:
    """Megatron's files, samples and order."""
    tokenizer = load_data_tokenizer(config)
    blends = {"train": config.train, "validation": config.validation, "test": config.test}
    sources: dict[str, Source] = {}
    identity = ""
    if config.train is None and not len(split_ranges(config.split, 1_000_000)[0]):
        raise UserError(f"data.split {config.split!r} has no share to train on; give it one, such as 969,30,1")
    for part in SPLITS:
        blend = config.path if config.train is None else blends[part]
        split = config.split if config.train is None else ",".join("1" if name == part else "0" for name in SPLITS)
        if blend is None or not len(split_ranges(split, 1_000_000)[SPLITS.index(part)]):
            sources[part] = NO_SAMPLES
            continue
        path = read_data_path(blend, "data.path" if config.train is None else f"data.{part}")
        found = _open_part(config, path, split, part, samples if part == "train" else None, seed, tokenizer)
        sources[part] = NO_SAMPLES if found is None else _filled(found, config, seed, tokenizer)
        if part == "train" and found is not None:
            identity = found.fingerprint
    return Data(
        config=config,
        seed=seed,
        train=sources["train"],
        validation=sources["validation"],
        test=sources["test"],
        tokenizer=tokenizer,
        fingerprint=_identity(identity, config),
        is_ordered=True,
    )


def _open_part(
    config: DataConfig, path: DataPath, split: str, part: str, samples: int | None, seed: int, tokenizer: Tokenizer
) -> GPTSource | BlendedSource | None:
    """One part of a split; None where a part that is not trained on makes no sample."""
    settings = {
        "sequence_length": config.sequence_length,
        "samples": samples,
        "seed": seed,
        "boundaries": _source_boundaries(config, tokenizer),
        "vocab_size": tokenizer.vocab_size,
    }
    if config.format == "mock":
        if tokenizer.end_of_document is None:
            raise UserError(f"mock data end documents, and the {config.tokenizer} tokenizer has no token for it")
        reader = MockReader(vocab_size=tokenizer.vocab_size, end_of_document=tokenizer.end_of_document)
        return GPTSource(reader, split_ranges(split, len(reader))[SPLITS.index(part)], **settings)
    cache = cache_root(config.cache_directory)
    prefixes, weights = path.prefixes(), path.weights
    if part != "train":
        # looked at only now and then: all that each has, without weights
        prefixes = [prefix for prefix in prefixes if _has_sample(prefix, split, part, config, cache)]
        weights = None
        if not prefixes:
            return None
    return open_blend(prefixes, weights, split=split, part=part, cache_directory=cache, **settings)


def _has_sample(prefix: str, split: str, part: str, config: DataConfig, cache_directory: Path) -> bool:
    """Whether a part of the file makes one sample; it is said where it does not."""
    lengths = IndexedReader(prefix, str(cache_directory)).lengths
    share = split_ranges(split, len(lengths))[SPLITS.index(part)]
    count = int(lengths[share.start : share.stop].sum(dtype=np.int64))
    if count <= config.sequence_length:
        # nobody asked for the thousandth to test on, which a small corpus never has
        is_asked = part != "test" or split != type(config).model_fields["split"].default
        level = logging.WARNING if is_asked else logging.INFO
        few = plural(count, "token")
        logger.log(level, "%s has %s for %s, too few for a sample: there is none of it", prefix, few, part)
    return count > config.sequence_length


def _open_chat(config: DataConfig, seed: int, _samples: int | None) -> Data:
    tokenizer = load_data_tokenizer(config)
    talks = Conversations(
        find_files(read_data_path(config.path, "data.path").files(), cache=cache_root(config.cache_directory)),
        sequence_length=config.sequence_length,
        tokenizer=tokenizer,
        cache_directory=cache_root(config.cache_directory),
        template=open_template(config.chat, tokenizer),
        roles=config.chat.roles,
        too_long=config.chat.too_long,
        max_dropped=config.chat.max_dropped,
    )
    train, validation = talks.split(config.validation_fraction, config.chat.normalize)
    return Data(
        config=config,
        seed=seed,
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        fingerprint=_identity(f"{talks.fingerprint} {config.validation_fraction} {seed}", config),
        notes=tuple(talks.counts.lines()),
    )


def load_data_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that the settings name, which must have a vocabulary of its own."""
    tokenizer = load_tokenizer(config.tokenizer, end_of_document=config.end_of_document)
    if tokenizer is None:
        raise UserError("data.tokenizer characters makes its vocabulary from text: give the tokenizer of these tokens")
    return tokenizer


def _boundaries(config: DataConfig, tokenizer: Tokenizer) -> Boundaries:
    return Boundaries(
        tokenizer.end_of_document,
        mask_loss=config.mask_end_of_document,
        reset_positions=config.reset_positions,
        reset_attention=config.reset_attention,
    )


def _source_boundaries(config: DataConfig, tokenizer: Tokenizer) -> Boundaries:
    """Those of a source, which leaves them alone where the middle of documents moves afterwards."""
    return Boundaries() if config.fill_in_middle else _boundaries(config, tokenizer)


def _filled(source: Source, config: DataConfig, seed: int, tokenizer: Tokenizer) -> Source:
    asked = config.fill_in_middle
    if asked is None:
        return source
    settings = FillInMiddle(end_of_document=tokenizer.end_of_document, **asked.model_dump(exclude={"characters"}))
    boundaries = _boundaries(config, tokenizer)
    cutter = tokenizer if asked.characters else None
    return FillInMiddleSource(source, settings, seed=seed, boundaries=boundaries, tokenizer=cutter)


def _identity(text: str, config: DataConfig) -> str:
    """A hash of what the samples are, with the settings that change them; skipped ones keep their number."""
    changed = [config.mask_end_of_document, config.reset_positions, config.reset_attention, config.fill_in_middle]
    return hashlib.sha256((text if not any(changed) else f"{text} {changed}").encode()).hexdigest()


def _split(
    tokens: Integer[np.ndarray, "T"], config: DataConfig
) -> tuple[Integer[np.ndarray, "Train"], Integer[np.ndarray, "Validation"]]:
    """The first part to train on and the last to validate on."""
    num_train = int(len(tokens) * (1 - config.validation_fraction))
    num_validation = len(tokens) - num_train
    if num_train <= config.sequence_length:
        raise UserError(
            f"the data has {plural(len(tokens), 'token')}, {num_train:,} of them to train on beside "
            f"data.validation_fraction {config.validation_fraction}, but one sample needs "
            f"{config.sequence_length + 1:,}; give more text, or lower "
            "data.validation_fraction or --data.sequence_length"
        )
    if config.validation_fraction > 0 and num_validation < 2:
        raise UserError(
            f"--data.validation_fraction {config.validation_fraction} of {len(tokens):,} tokens leaves "
            f"{num_validation:,} to validate on, but 2 are needed; raise it, or set it to 0 for no validation"
        )
    return tokens[:num_train], tokens[num_train:]
