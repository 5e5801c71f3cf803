"""Megatron's mock data: documents of random lengths whose tokens count upwards."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

NUM_DOCUMENTS = 100_000


class MockReader:
    """Reads like an `IndexedReader`: 1, 2, 3, ... modulo the vocabulary size, then the end of the document."""

    def __init__(self, *, vocab_size: int, end_of_document: int):
        self.prefix = "mock data"
        self.vocab_size = vocab_size
        self.end_of_document = end_of_document
        self.dtype = np.dtype(np.int32)
        self.lengths = np.random.default_rng(seed=0).integers(1, 4096, NUM_DOCUMENTS, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def get_parts(self, parts: Sequence[tuple[int, int, int | None]]) -> list[Int32[np.ndarray, "T"]]:
        """`get` of several (index, offset, length)."""
        return [self.get(*part) for part in parts]

    def get(self, index: int, offset: int = 0, length: int | None = None) -> Int32[np.ndarray, "T"]:
        """Tokens of one document from `offset` on, `length` of them or all; IndexError outside it."""
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"document {index} of {len(self.lengths)} in {self.prefix}")
        size = int(self.lengths[index])
        stop = size if length is None else offset + length
        if not 0 <= offset <= stop <= size:
            raise IndexError(f"tokens {offset} to {stop} of document {index} with {size} in {self.prefix}")
        tokens = (np.arange(offset, stop, dtype=np.int32) + 1) % self.vocab_size
        if stop == size and stop > offset:
            tokens[-1] = self.end_of_document
        return tokens
