"""Short sequences packed into rows of one length: first fit, whole sequences only, none seeing another."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Integer

from jaxtron.config import UserError
from jaxtron.data.batch import TokenBatch

# what a loss over answers is a mean over
Normalize = Literal["tokens", "answers"]


@dataclass(frozen=True)
class Packing:
    """Which sequences each row holds: row r is `items[starts[r] : starts[r + 1]]`, in the order they were placed."""

    items: Int64[np.ndarray, "N"]
    starts: Int64[np.ndarray, "Rows1"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> Int64[np.ndarray, "K"]:
        """Numbers of the sequences in one row."""
        return self.items[self.starts[index] : self.starts[index + 1]]


def pack_first_fit(lengths: Integer[np.ndarray, "N"], capacity: int, *, decreasing: bool = True) -> Packing:
    """Each sequence into the first row that has room for it, a new one where none has; ValueError for longer ones.

    `decreasing` places longer sequences first, which wastes less (at most 11/9 of the fewest rows and one, where plain
    first fit may take 17/10) but puts alike lengths together. Time grows as N log(rows).
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 0 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"sequences of {lengths.min()} to {lengths.max()} tokens do not go into rows of {capacity}")
    order = np.argsort(-lengths, kind="stable") if decreasing else np.arange(len(lengths))
    rows = np.empty(len(lengths), np.int64)
    rows[order] = _first_rows(lengths[order].tolist(), capacity)
    # stable: within a row as placed
    by_row = order[np.argsort(rows[order], kind="stable")]
    counts = np.bincount(rows)
    return Packing(items=by_row, starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def _first_rows(lengths: list[int], capacity: int) -> list[int]:
    """The row of each sequence, in the order given.

    A binary tree whose leaves are the rows' room and whose nodes the most room below them finds the first row that fits
    by going left wherever there is enough.
    """
    # a row is opened only for what fits in none before it, so that any two together hold more than one can
    most_rows = min(2 * (sum(lengths) // max(capacity, 1)) + 1, max(len(lengths), 1))
    leaves = 1 << (most_rows - 1).bit_length()
    room = [capacity] * (2 * leaves)
    rows = []
    for length in lengths:
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        rows.append(node - leaves)
        left = room[node] - length
        room[node] = left
        while node > 1:
            other = room[node ^ 1]
            node >>= 1
            left = left if left > other else other
            if room[node] == left:
                break
            room[node] = left
    return rows


@dataclass(frozen=True)
class PackedSequence:
    """A whole sequence: ids, and which of them the model is to write."""

    ids: Int32[np.ndarray, "N"]
    is_answer: Bool[np.ndarray, "N"]


@runtime_checkable
class Sequences(Protocol):
    """Sequences by number, read in any order by several threads at once; `lengths` are in ids."""

    @property
    def lengths(self) -> Int64[np.ndarray, "N"]: ...

    def __getitem__(self, index: int) -> PackedSequence: ...


def answer_weights(is_answer: Bool[np.ndarray, "N"], normalize: Normalize) -> Float32[np.ndarray, "N"]:
    """Weights of a sequence's predictions: 1 in answers, 0 outside; or of each run of answer the share of one token."""
    if normalize == "tokens" or not is_answer.any():
        return is_answer.astype(np.float32)
    edges = np.flatnonzero(np.diff(is_answer, prepend=False, append=False))
    lengths = edges[1::2] - edges[::2]
    weights = np.zeros(len(is_answer), np.float32)
    weights[is_answer] = np.repeat(1 / lengths, lengths)
    return weights


def pack_row(
    sequences: list[PackedSequence], sequence_length: int, *, pad: int = 0, normalize: Normalize = "tokens"
) -> TokenBatch:
    """One row: each sequence predicts its own ids from the second on, so it takes one place less than it has ids.

    Weights are those of `answer_weights` where the id predicted is an answer. Positions start again at 0 in each
    sequence; segments count the sequences from 0, and the padding, of weight 0, is a segment of its own.
    """
    tokens, targets = np.full((2, sequence_length), pad, np.int32)
    weights = np.zeros(sequence_length, np.float32)
    positions, segments = np.zeros((2, sequence_length), np.int32)
    start = 0
    for number, sequence in enumerate(sequences):
        end = start + max(len(sequence.ids) - 1, 0)
        assert end <= sequence_length, f"{end} tokens in a row of {sequence_length}"
        tokens[start:end], targets[start:end] = sequence.ids[:-1], sequence.ids[1:]
        weights[start:end] = answer_weights(sequence.is_answer[1:], normalize)
        positions[start:end], segments[start:end] = np.arange(end - start), number
        start = end
    positions[start:], segments[start:] = np.arange(sequence_length - start), len(sequences)
    return TokenBatch(tokens=tokens, targets=targets, weights=weights, positions=positions, segments=segments)


class PackedSource:
    """Rows of whole sequences; a sequence may have at most `sequence_length` + 1 ids.

    `density` is the share of places that are not padding.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        sequence_length: int,
        decreasing: bool = True,
        pad: int = 0,
        normalize: Normalize = "tokens",
    ):
        places = np.maximum(sequences.lengths - 1, 0)
        if len(places) and places.max() > sequence_length:
            raise UserError(
                f"a sequence of {places.max() + 1} tokens does not go into rows of {sequence_length}; "
                "raise the sequence length, or cut or drop what is longer"
            )
        self.sequence_length = sequence_length
        self.packing = pack_first_fit(places, sequence_length, decreasing=decreasing)
        self.density = float(places.sum()) / max(len(self.packing) * sequence_length, 1)
        self._sequences = sequences
        self._pad = pad
        self._normalize: Normalize = normalize

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, index: int) -> TokenBatch:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        sequences = [self._sequences[number] for number in self.packing.row(index).tolist()]
        return pack_row(sequences, self.sequence_length, pad=self._pad, normalize=self._normalize)
