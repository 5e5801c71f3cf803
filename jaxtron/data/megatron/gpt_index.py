"""The order in which Megatron's GPT training reads a token file.

Sequences of the file are shuffled within each epoch and laid end to end (the document index); that row is cut into
samples wherever the length says (the sample index); the samples are shuffled (the shuffle index). All three follow
from the lengths, the seed and the settings, and equal Megatron's.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Integer

from jaxtron.config import UserError
from jaxtron.data.megatron import compiled
from jaxtron.data.megatron.indexed import IndexedReader
from jaxtron.data.megatron.splits import split_ranges

# sequences handled at once: what is worked on stays in a core's cache
CHUNK = 1 << 17
INT32_MAX = 2**31 - 1
# tokens below which a quotient in float64 is exact
EXACT = 2**53
# samples a document from which on compiled loops write a row, or several, for every document
LONG, LONGER = 0.12, 0.6
# below this part of an epoch, the last one is shuffled for itself
SEPARATE_FINAL_EPOCH = 0.80


@dataclass(frozen=True)
class GPTIndex:
    """Sample i is number j = `shuffle[i]`: tokens from `samples[j]` to `samples[j + 1]`, rows of (position, offset).

    A position counts in `documents`, which has numbers of the file's sequences; an offset is in tokens.
    """

    documents: Int32[np.ndarray, "D"]
    samples: Integer[np.ndarray, "Bounds 2"]
    shuffle: Integer[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.shuffle)


@dataclass(frozen=True)
class Epochs:
    """How often the sequences are gone through; `separate` samples come before a final epoch shuffled for itself."""

    count: int
    separate: int | None


def build_gpt_index(
    lengths: Int32[np.ndarray, "S"],
    sequences: range,
    *,
    sequence_length: int,
    samples: int | None,
    seed: int,
    extra_token: bool = True,
    drop_last_partial: bool = True,
    name: str = "the data",
) -> GPTIndex:
    """The order of at least `samples` samples, or of one epoch for None, over some sequences of a file.

    `extra_token`: a sample shares its last token, which is only a target, with the next one. Without
    `drop_last_partial` the tokens that do not fill a sample make a short one; their number is then rounded in float32,
    as Megatron does, so beyond 2^24 tokens some may be missing or empty. UserError where there are no tokens, and
    for a seed that NumPy does not take.
    """
    if not 0 <= seed < 2**32 or sequence_length < 1 or (samples is not None and samples < 0):
        raise UserError(
            f"seed {seed}, sequence length {sequence_length}, samples {samples}: the seed is 0 to {2**32 - 1}, the "
            "length at least 1, the samples at least 0"
        )
    extra = int(extra_token)
    # a length travels with its sequence through the shuffle: looking lengths up afterwards takes longer than all the
    # rest of the sample index; NumPy also shuffles 64-bit elements faster than 32-bit ones, in the same order
    packed = lengths[sequences.start : sequences.stop].astype(np.int64)
    num_tokens = int(packed.sum())
    if not num_tokens:
        raise UserError(f"{name} has no tokens in the {len(sequences)} sequences of this split; give it more")
    packed <<= 32
    packed |= np.arange(sequences.start, sequences.stop, dtype=np.int32)
    epochs = count_epochs(num_tokens, sequence_length=sequence_length, samples=samples, extra=extra)
    random = np.random.RandomState(seed)
    packed = _shuffled_epochs(packed, epochs, random)
    usable = epochs.count * num_tokens - extra
    num_samples = _num_samples(usable, sequence_length=sequence_length, drop_last_partial=drop_last_partial)
    return GPTIndex(
        documents=packed.astype(np.int32),
        samples=_sample_index(packed, sequence_length=sequence_length, extra=extra, num_samples=num_samples),
        shuffle=_shuffle_index(num_samples, epochs, random),
    )


def order_digest(prefix: str, *, sequence_length: int, samples: int, seed: int, split: str) -> dict:
    """What proves that an order is Megatron's: rows and SHA-256 of the train split's three indices.

    Values are hashed as little-endian int64; `samples` 0 means one epoch.
    """
    reader = IndexedReader(prefix)
    index = build_gpt_index(
        reader.lengths,
        split_ranges(split, len(reader))[0],
        sequence_length=sequence_length,
        samples=samples or None,
        seed=seed,
        name=prefix,
    )
    arrays = {"document_index": index.documents, "sample_index": index.samples, "shuffle_index": index.shuffle}
    return {name: {"length": len(values), "sha256": _sha256(values)} for name, values in arrays.items()}


def count_epochs(num_tokens: int, *, sequence_length: int, samples: int | None, extra: int = 1) -> Epochs:
    """The epochs that so many samples take, all that their number has to say about the order."""
    if samples is None:
        return Epochs(count=1, separate=None)
    count = max(-(-(samples * sequence_length + extra) // num_tokens), 1)
    before_last = ((count - 1) * num_tokens - extra) // sequence_length
    in_one = (num_tokens - extra) // sequence_length
    separate = count > 1 and samples - before_last < int(SEPARATE_FINAL_EPOCH * in_one)
    return Epochs(count=count, separate=before_last if separate else None)


def _num_samples(num_targets: int, *, sequence_length: int, drop_last_partial: bool) -> int:
    if drop_last_partial:
        return num_targets // sequence_length
    return math.ceil(np.float32(num_targets) / np.float32(sequence_length))


def _shuffled_epochs(
    packed: Integer[np.ndarray, "S"], epochs: Epochs, random: np.random.RandomState
) -> Integer[np.ndarray, "D"]:
    """All epochs shuffled together, or all but the last and then the last."""
    repeated = np.tile(packed, epochs.count) if epochs.count > 1 else packed
    last = len(repeated) if epochs.separate is None else len(repeated) - len(packed)
    for part in (repeated[:last], repeated[last:]) if epochs.separate is not None else (repeated,):
        random.shuffle(part)
    return repeated


def _sample_index(
    packed: Integer[np.ndarray, "D"], *, sequence_length: int, extra: int, num_samples: int
) -> Integer[np.ndarray, "Bounds 2"]:
    """Where each sample starts, and the last one ends; `packed` has lengths in the upper half.

    Sample k ends in the first sequence that holds token k * sequence_length + extra of the row, even as its last.
    Where the tokens do not suffice, it ends with the last sequence.
    """
    dtype = np.int32 if len(packed) <= INT32_MAX else np.int64
    rows = np.empty((num_samples + 1, 2), dtype)
    if len(packed) >= compiled.LEAST_DOCUMENTS and _compiled_rows(packed, sequence_length, extra, rows):
        return rows
    rows[0] = 0
    done, base = 0, 0
    for first in range(0, len(packed), CHUNK):
        lengths = packed[first : first + CHUNK] >> 32
        ends = np.cumsum(lengths)
        until = min((base + int(ends[-1]) - extra) // sequence_length, num_samples)
        if until > done:
            # from here on, tokens are counted from the beginning of the chunk
            targets = np.arange(
                (done + 1) * sequence_length - base, until * sequence_length - base + 1, sequence_length
            )
            if 4 * len(targets) < len(lengths):
                position = np.searchsorted(ends, targets + extra)
            else:
                closed = np.clip((ends + (base - extra - done * sequence_length)) // sequence_length, 0, until - done)
                position = np.repeat(np.arange(len(lengths)), np.diff(closed, prepend=0))
            rows[done + 1 : until + 1, 0] = position + first
            rows[done + 1 : until + 1, 1] = targets - (ends - lengths)[position]
            done = until
        base += int(ends[-1])
    rows[done + 1 :] = len(packed) - 1, int(packed[-1] >> 32) - extra
    return rows


def _compiled_rows(
    packed: Integer[np.ndarray, "D"], sequence_length: int, extra: int, rows: Integer[np.ndarray, "Bounds 2"]
) -> bool:
    """Fills rows by a compiled loop, whichever is fastest; False where there is none."""
    if rows.dtype != np.int32 or len(rows) * sequence_length + (1 << 31) > EXACT:
        return False
    share = len(rows) / len(packed)
    loop = compiled.cut_documents if share < LONG else compiled.cut_long if share < LONGER else compiled.cut_longer
    return compiled.run(loop, packed, sequence_length, extra, rows.reshape(-1).view(np.int64))


def _shuffle_index(num_samples: int, epochs: Epochs, random: np.random.RandomState) -> Integer[np.ndarray, "N"]:
    dtype = np.uint32 if num_samples < 2**32 - 2 else np.int64
    index = np.arange(num_samples, dtype=dtype)
    if epochs.separate is None:
        random.shuffle(index)
    else:
        for part in (index[: epochs.separate], index[epochs.separate :]):
            random.shuffle(part)
    return index


def _sha256(values: Integer[np.ndarray, "..."]) -> str:
    digest = hashlib.sha256()
    for first in range(0, len(values), CHUNK):
        digest.update(values[first : first + CHUNK].astype("<i8").tobytes())
    return digest.hexdigest()
