"""From the data settings to samples of sentences: Megatron's files of sentences, or text whose lines are sentences.

Samples and their order are Megatron's (`mapping.py`); what a sample is made of its sentences, a family says.
"""

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, Integer

from jaxtron.config import NoEffect, UserError
from jaxtron.data.config import DataConfig
from jaxtron.data.dataset import Data, load_data_tokenizer, needs_tokens
from jaxtron.data.files.data_path import read_data_path
from jaxtron.data.files.reader import check_text, find_files, read_document
from jaxtron.data.files.storage import cache_root
from jaxtron.data.masked.mapping import LONGEST_SENTENCE, build_mapping
from jaxtron.data.megatron.blend import component_samples
from jaxtron.data.megatron.gpt_source import SPLITS, BlendedSource
from jaxtron.data.megatron.index_cache import cached_arrays, lengths_digest
from jaxtron.data.megatron.indexed import IndexedReader, IndexedWriter, token_dtype
from jaxtron.data.megatron.splits import split_ranges
from jaxtron.data.source import NO_SAMPLES, Source
from jaxtron.data.tokenizers import Tokenizer

FORMAT_VERSION = 1
# what samples of sentences do not read of the data's settings
UNREAD = ("fill_in_middle", "chat", "mask_end_of_document", "reset_positions", "reset_attention")
# sentences encoded at once
BATCH = 10_000

logger = logging.getLogger(__name__)


class SentenceRows(NamedTuple):
    """Which sentences of a file make up each sample: a mapping of `build_mapping`, and the documents they are of."""

    reader: IndexedReader
    rows: Integer[np.ndarray, "Samples 3"]
    documents: Int64[np.ndarray, "D"]
    """First sentence of each document, and where the last one ends."""


@dataclass(frozen=True)
class SentenceSamples:
    """How a family makes samples of sentences."""

    family: str
    """`model.family`, for messages."""
    max_length: int
    """Tokens of text that a sample has room for."""
    min_sentences: int
    """Of a sample: 2 where it is a pair."""
    short_probability: float
    """Share of the samples that are made shorter."""
    make: Callable[[SentenceRows, Tokenizer], Source]
    """What gives the samples; it must pickle."""
    identity: str = ""
    """What else of the settings changes them."""


class SentenceSource:
    """Samples of some documents of one file, those of Megatron in its order; at least `samples` of them, or one epoch.

    `fingerprint` is equal for sources of the same samples in the same order, as far as lengths of sentences tell.
    """

    def __init__(
        self,
        reader: IndexedReader,
        documents: Int64[np.ndarray, "D"],
        tokenizer: Tokenizer,
        how: SentenceSamples,
        *,
        seed: int,
        samples: int | None,
        cache_directory: Path | None,
    ) -> None:
        if reader.dtype.kind not in "iu":
            raise UserError(f"{reader.prefix}.bin has {reader.dtype.name}, which are no token ids; give another prefix")
        settings: dict[str, Any] = {
            "max_length": how.max_length,
            "min_sentences": how.min_sentences,
            "short_probability": how.short_probability,
            "seed": seed,
            "num_samples": samples,
            "num_epochs": None if samples is not None else 1,
        }
        # offsets of documents as they are: the rows name sentences of the whole file
        lengths = hashlib.sha256((lengths_digest(reader.lengths) + documents.tobytes().hex()).encode()).hexdigest()

        def build() -> dict[str, np.ndarray]:
            return {"rows": build_mapping(documents, reader.lengths, **settings)}

        rows = cached_arrays(cache_directory, {"kind": "sentences", "lengths": lengths, **settings}, build)["rows"]
        self._source = how.make(SentenceRows(reader, rows, documents), tokenizer)
        self.sequence_length = self._source.sequence_length
        identity = json.dumps([lengths, reader.dtype.str, settings, how.identity])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return self._source[index]


def open_sentences(config: DataConfig, how: SentenceSamples, *, seed: int, train_samples: int | None) -> Data:
    """The data that the settings name as samples of sentences; `UserError` for bad input.

    Of files of sentences (`preprocess --split-sentences`) documents are split by `data.split`; of text each line is a
    sentence and each file a document, of which the last share is for validation.
    """
    for name in UNREAD:
        # by value: a saved configuration names every field
        if getattr(config, name) != type(config).model_fields[name].default:
            raise NoEffect(f"data.{name}", getattr(config, name), {"model.family": how.family}, "leave it out")
    if config.format not in ("auto", "text", "tokens"):
        raise UserError(
            f"data.format {config.format} has no sentences, which model.family {how.family} reads; give text or tokens"
        )
    tokenizer = load_data_tokenizer(config)
    make = _of_files if needs_tokens(config) else _of_text
    config.check_format("tokens" if needs_tokens(config) else "text")
    return make(config, how, tokenizer, seed, config.samples or train_samples)


def _of_files(config: DataConfig, how: SentenceSamples, tokenizer: Tokenizer, seed: int, samples: int | None) -> Data:
    blends = {"train": config.train, "validation": config.validation, "test": config.test}
    sources: dict[str, SentenceSource | BlendedSource] = {}
    for part in SPLITS:
        blend = config.path if config.train is None else blends[part]
        split = config.split if config.train is None else ",".join("1" if name == part else "0" for name in SPLITS)
        if blend is None or not len(split_ranges(split, 1_000_000)[SPLITS.index(part)]):
            continue
        path = read_data_path(blend, "data.path" if config.train is None else f"data.{part}")
        # beside training each is looked at now and then: all that there is, without weights
        weights, needed = (path.weights, samples) if part == "train" else (None, None)
        found = _blend(path.prefixes(), weights, split, part, how, tokenizer, seed, needed, config)
        if found is not None:
            sources[part] = found
    if "train" not in sources:
        raise UserError(f"data.split {config.split!r} has no share to train on; give it one, such as 969,30,1")
    return Data(
        config=config,
        seed=seed,
        train=sources["train"],
        validation=sources.get("validation", NO_SAMPLES),
        test=sources.get("test", NO_SAMPLES),
        tokenizer=tokenizer,
        fingerprint=sources["train"].fingerprint,
        is_ordered=True,
    )


def _blend(
    prefixes: Sequence[str],
    weights: Sequence[float] | None,
    split: str,
    part: str,
    how: SentenceSamples,
    tokenizer: Tokenizer,
    seed: int,
    samples: int | None,
    config: DataConfig,
) -> SentenceSource | BlendedSource | None:
    """One part of the split of each file, blended by weight where there are any; None where no document is in it."""
    cache = cache_root(config.cache_directory)
    needed: Sequence[int | None] = [samples if len(prefixes) == 1 else None] * len(prefixes)
    if weights is not None:
        if samples is None:
            raise UserError("a blend by weight has no end of its own; set data.samples, or leave weights out")
        needed = component_samples(weights, samples)
    sources = []
    for prefix, count in zip(prefixes, needed, strict=True):
        reader = IndexedReader(prefix, str(cache))
        share = split_ranges(split, len(reader.documents) - 1)[SPLITS.index(part)]
        if part != "train" and not _has_sample(reader, share, how):
            logger.info("%s has no document of %d sentences for %s", prefix, how.min_sentences, part)
            continue
        documents = reader.documents[share.start : share.stop + 1]
        sources.append(
            SentenceSource(reader, documents, tokenizer, how, seed=seed, samples=count, cache_directory=cache)
        )
    if len(sources) < 2 and weights is None:
        return sources[0] if sources else None
    return BlendedSource(sources, weights=weights, samples=samples, index_directory=cache)


def _has_sample(reader: IndexedReader, share: range, how: SentenceSamples) -> bool:
    """Whether a document of these can make one: with sentences enough, and none too long among several."""
    starts = reader.documents
    for number in share:
        lengths = reader.lengths[starts[number] : starts[number + 1]]
        if len(lengths) >= how.min_sentences and (len(lengths) == 1 or lengths.max() <= LONGEST_SENTENCE):
            return True
    return False


def _of_text(config: DataConfig, how: SentenceSamples, tokenizer: Tokenizer, seed: int, samples: int | None) -> Data:
    cache = cache_root(config.cache_directory)
    files = find_files(read_data_path(config.path, "data.path").files(), cache=cache)
    if config.format == "auto":
        check_text(files)
    reader = sentence_file(files, tokenizer, cache)
    train, validation = _cut(reader, config.validation_fraction)
    given = {"seed": seed, "cache_directory": cache}
    source = SentenceSource(reader, train, tokenizer, how, samples=samples, **given)
    found: Source = NO_SAMPLES
    if len(validation) > 1:
        found = SentenceSource(reader, validation, tokenizer, how, samples=None, **given)
    content = Path(f"{reader.prefix}.json").read_text(encoding="utf-8")
    return Data(
        config=config,
        seed=seed,
        train=source,
        validation=found,
        tokenizer=tokenizer,
        fingerprint=hashlib.sha256(f"{content} {source.fingerprint}".encode()).hexdigest(),
        is_ordered=True,
    )


def _cut(reader: IndexedReader, fraction: float) -> tuple[Int64[np.ndarray, "Train"], Int64[np.ndarray, "Validation"]]:
    """Bounds of documents with the first of all tokens, and with the last; one is cut in two between sentences."""
    bounds = reader.documents
    ends = np.cumsum(reader.lengths, dtype=np.int64)
    cut = int(np.searchsorted(ends, ends[-1] * (1 - fraction)))
    cut = len(ends) if fraction == 0 else min(cut, len(ends) - 1)
    here = np.array([cut], bounds.dtype)
    train = np.concatenate([bounds[bounds < cut], here])
    return train, np.concatenate([here, bounds[bounds > cut]])


def sentence_file(files: Sequence[Path], tokenizer: Tokenizer, cache: Path) -> IndexedReader:
    """Lines of text files as a file of sentences, each file a document, kept in the cache.

    Lines of white space are none; one of more than 512 tokens is several sentences, for Megatron leaves out a document
    that has a longer one.
    """
    described = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = json.dumps({"version": FORMAT_VERSION, "tokenizer": tokenizer.fingerprint, "files": described})
    entry = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.sentences"
    if not entry.is_dir():
        logger.info("tokenizing the lines of %d files into %s", len(files), entry)
        partial = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.partial")
        try:
            partial.mkdir(parents=True)
            try:
                _write(str(partial / "sentences"), files, tokenizer)
                _publish(partial, entry)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise UserError(
                f"cannot write the token cache in {entry.parent}: {error.strerror or error}; set "
                "--data.cache_directory to a writable folder with room"
            ) from error
    reader = IndexedReader(str(entry / "sentences"))
    if not len(reader):
        raise UserError(f"no line of text in {files[0]}{' and others' if len(files) > 1 else ''}; give files with text")
    return reader


def _write(prefix: str, files: Sequence[Path], tokenizer: Tokenizer) -> None:
    digest = hashlib.sha256()
    with IndexedWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
        for file in files:
            lines = [line for line in read_document(file).splitlines() if line.strip()]
            for first in range(0, len(lines), BATCH):
                for ids in tokenizer.encode_batch(lines[first : first + BATCH]):
                    digest.update(ids.astype("<i4").tobytes() + b"\n")
                    for start in range(0, len(ids), LONGEST_SENTENCE):
                        writer.add_item(ids[start : start + LONGEST_SENTENCE])
            writer.end_document()
    Path(f"{prefix}.json").write_text(json.dumps({"tokens": digest.hexdigest()}), encoding="utf-8")


def _publish(partial: Path, entry: Path) -> None:
    try:
        partial.rename(entry)
    except OSError:
        # another process was first, and its entry is the same as ours
        if not entry.is_dir():
            raise
