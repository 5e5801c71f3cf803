"""Samples of Megatron's token files in Megatron's order: one file, or a blend of several."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Shaped

from jaxtron.config import UserError
from jaxtron.data.batch import TokenBatch
from jaxtron.data.megatron.blend import component_samples
from jaxtron.data.megatron.boundaries import Boundaries, make_sample
from jaxtron.data.megatron.gpt_index import count_epochs
from jaxtron.data.megatron.index_cache import cached_blend, cached_gpt_index, lengths_digest
from jaxtron.data.megatron.indexed import IndexedReader
from jaxtron.data.megatron.splits import split_ranges
from jaxtron.data.source import Source
from jaxtron.words import plural

SPLITS = ("train", "validation", "test")
NO_BOUNDARIES = Boundaries()


@runtime_checkable
class Reader(Protocol):
    """What a source needs of an `IndexedReader`."""

    prefix: str
    dtype: np.dtype
    lengths: Int32[np.ndarray, "N"]

    def __len__(self) -> int: ...

    def get_parts(self, parts: Sequence[tuple[int, int, int | None]]) -> list[Shaped[np.ndarray, "T"]]: ...


@runtime_checkable
class OrderedSource(Source, Protocol):
    """A source whose samples are in the order of training."""

    @property
    def fingerprint(self) -> str:
        """Equal for sources of the same samples in the same order."""
        ...


class GPTSource:
    """The samples of some sequences of one file; sample i is the i-th that Megatron trains on.

    `samples` is how many are needed at least, None for one epoch; the other settings are those of `build_gpt_index`.
    An id below 0 or not below `vocab_size` is a UserError when its sample is read. `fingerprint` is equal for sources
    of the same samples in the same order, as far as the lengths of the sequences tell.
    """

    def __init__(
        self,
        reader: Reader,
        sequences: range,
        *,
        sequence_length: int,
        samples: int | None,
        seed: int,
        boundaries: Boundaries = NO_BOUNDARIES,
        vocab_size: int | None = None,
        extra_token: bool = True,
        drop_last_partial: bool = True,
        index_directory: Path | None = None,
    ):
        if reader.dtype.kind not in "iu":
            raise UserError(f"{reader.prefix}.bin has {reader.dtype.name}, which are no token ids; give another prefix")
        self.sequence_length = sequence_length
        self._reader = reader
        self._boundaries = boundaries
        self._extra = int(extra_token)
        self._most = (vocab_size or 2**31) - 1
        settings = {
            "sequence_length": sequence_length,
            "samples": samples,
            "seed": seed,
            "extra_token": extra_token,
            "drop_last_partial": drop_last_partial,
        }
        self.index = cached_gpt_index(
            reader.lengths, sequences, directory=index_directory, name=reader.prefix, **settings
        )
        num_tokens = int(reader.lengths[sequences.start : sequences.stop].sum(dtype=np.int64))
        if not len(self):
            raise UserError(
                f"{reader.prefix} has {plural(num_tokens, 'token')} in this split, too few for one sample of "
                f"{sequence_length} + {self._extra}; give more, or lower the sequence length"
            )
        # the same epochs are the same order, however many of their samples are asked for
        epochs = count_epochs(num_tokens, sequence_length=sequence_length, samples=samples, extra=self._extra)
        order = {**settings, "samples": [epochs.count, epochs.separate]}
        identity = [lengths_digest(reader.lengths), reader.dtype.str, sequences.start, sequences.stop, order]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> TokenBatch:
        return make_sample(self.text(index), sequence_length=self.sequence_length, boundaries=self._boundaries)

    def text(self, index: int) -> Int32[np.ndarray, "T"]:
        """The tokens of a sample, the extra one included; IndexError outside the source."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self._reader.prefix}")
        parts = self._parts(index)
        found = self._reader.get_parts(parts)
        text = np.concatenate(found)
        if len(text) and (text.min() < 0 or text.max() > self._most):
            self._refuse(parts, found)
        return text.astype(np.int32)

    def _parts(self, index: int) -> list[tuple[int, int, int | None]]:
        """Which tokens make a sample: sequence, offset and length, None for all."""
        row = int(self.index.shuffle[index])
        (first, start), (last, stop) = self.index.samples[row : row + 2].tolist()
        stop += self._extra
        # a last sequence without tokens leaves an offset of -1
        start = max(start, 0)
        sequences = self.index.documents[first : last + 1].tolist()
        if first == last:
            return [(sequences[0], start, max(stop - start, 0))]
        between = [(sequence, 0, None) for sequence in sequences[1:-1]]
        return [(sequences[0], start, None), *between, (sequences[-1], 0, stop)]

    def _refuse(self, parts: list[tuple[int, int, int | None]], found: list[Shaped[np.ndarray, "T"]]) -> None:
        for (sequence, offset, _), tokens in zip(parts, found, strict=True):
            wrong = np.flatnonzero((tokens < 0) | (tokens > self._most))
            if len(wrong):
                place = offset + int(wrong[0])
                raise UserError(
                    f"{self._reader.prefix}.bin has the id {tokens[wrong[0]]} at token {place} of sequence {sequence}, "
                    f"but ids here are 0 to {self._most}; give the tokenizer that made the file, or make it again"
                )


class BlendedSource:
    """Several sources as one.

    With weights, `samples` places are filled from each source by its weight; without, each source gives all it has,
    or the first `samples` of all, in shares of its length.
    """

    def __init__(
        self,
        sources: Sequence[OrderedSource],
        *,
        weights: Sequence[float] | None,
        samples: int | None,
        index_directory: Path | None = None,
    ):
        if weights is not None and samples is None:
            raise UserError("a blend by weight has no end of its own; give the number of samples, or leave weights out")
        if weights is not None and len(weights) != len(sources):
            raise UserError(f"{len(weights)} weights for {len(sources)} data paths; give one for each")
        sizes = [len(source) for source in sources]
        if weights is None and samples is not None:
            weights, samples = [float(size) for size in sizes], min(samples, sum(sizes))
        self._sources = sources
        self.sequence_length = sources[0].sequence_length
        self.blend = cached_blend(
            weights=None if weights is None else list(weights),
            sizes=sizes if weights is None else None,
            samples=samples,
            directory=index_directory,
        )
        asked = np.bincount(self.blend.datasets, minlength=len(sizes)).tolist()
        for number, (need, size) in enumerate(zip(asked, sizes, strict=True)):
            if need > size:
                raise UserError(
                    f"the blend asks data path {number} for {need} samples, but it has {size}; give it more samples "
                    "(a surplus), or a lower weight"
                )
        # a longer blend by weight begins with the shorter one
        identity = [source.fingerprint for source in sources], list(weights or [])
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.blend)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in a blend")
        return self._sources[self.blend.datasets[index]][int(self.blend.samples[index])]


def open_blend(
    prefixes: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    split: str,
    part: str,
    sequence_length: int,
    samples: int | None,
    seed: int,
    boundaries: Boundaries = NO_BOUNDARIES,
    vocab_size: int | None = None,
    drop_last_partial: bool = True,
    cache_directory: Path | None = None,
) -> GPTSource | BlendedSource:
    """One part ("train", "validation" or "test") of the split of each prefix, blended by weight where there are any.

    `cache_directory` keeps indices and remote files; without it indices are in memory. UserError for bad input.
    """
    if weights is not None and samples is None:
        raise UserError("a blend by weight has no end of its own; give the number of samples, or leave weights out")
    if weights is not None and samples is not None:
        needed = component_samples(weights, samples)
    else:
        # without weights several paths give all they have
        needed = [samples if len(prefixes) == 1 else None] * len(prefixes)
    sources = []
    for prefix, count in zip(prefixes, needed, strict=True):
        reader = IndexedReader(prefix, None if cache_directory is None else str(cache_directory))
        sources.append(
            GPTSource(
                reader,
                split_ranges(split, len(reader))[SPLITS.index(part)],
                sequence_length=sequence_length,
                samples=count,
                seed=seed,
                boundaries=boundaries,
                vocab_size=vocab_size,
                drop_last_partial=drop_last_partial,
                index_directory=cache_directory,
            )
        )
    if len(sources) == 1 and weights is None:
        return sources[0]
    return BlendedSource(sources, weights=weights, samples=samples, index_directory=cache_directory)
