"""Megatron's token files: `PREFIX.bin` has the tokens of every sequence, `PREFIX.idx` where each one lies.

The .idx, little-endian and without gaps: magic (9 bytes), version (uint64), dtype code (uint8), number of sequences N
(uint64), number of document bounds D (uint64), lengths in tokens (int32[N]), byte offsets into the .bin (int64[N]),
the sequence that each document starts with and N at the end (int64[D]), and for multimodal data modes (int8[N]).
"""

import os
import struct
import uuid
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int8, Int32, Int64, Shaped, UInt8

from jaxtron.command import FULL
from jaxtron.config import UserError
from jaxtron.data.files.file_kind import INDEX_MAGIC as MAGIC
from jaxtron.data.files.storage import cache_root, local_copy, open_bytes
from jaxtron.words import plural

VERSION = 1
DTYPES = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# magic, version, dtype code, sequences, document bounds
HEADER = struct.Struct("<9sQBQQ")
# elements checked at once: bounds the memory of opening a file
CHUNK = 1 << 20
# bytes of another file appended at once
COPIED = 1 << 24


def token_dtype(vocab_size: int | None) -> np.dtype:
    """What Megatron stores ids below `vocab_size` in: uint16 below 65500 entries, else int32."""
    return np.dtype("<u2") if vocab_size is not None and vocab_size < 65500 else np.dtype("<i4")


class IndexedReader:
    """Sequences of token ids by number; safe for several threads.

    Both files are memory-mapped; of a remote prefix (`gs://...`) the .idx is copied below the cache directory first,
    and the .bin is read by ranges.

    Everything the .idx says is checked on opening; `UserError` names the file and the byte that is wrong.

    `lengths` are in tokens, `pointers` in bytes of the .bin; document d is the sequences `documents[d]` up to
    `documents[d + 1]`; `modes` is None for plain text.
    """

    lengths: Int32[np.ndarray, "N"]
    pointers: Int64[np.ndarray, "N"]
    documents: Int64[np.ndarray, "D"]
    modes: Int8[np.ndarray, "N"] | None

    def __init__(self, prefix: str, cache_directory: str | None = None):
        self.prefix = prefix
        self.cache_directory = cache_directory
        index_path = f"{prefix}.idx"
        (index,) = _whole(local_copy(index_path, cache_root(cache_directory)))
        self.dtype, num_sequences, num_documents, multimodal = _read_header(index_path, index)
        starts = HEADER.size + np.cumsum([0, 4 * num_sequences, 8 * num_sequences, 8 * num_documents])

        def field(number: int, dtype: str, length: int) -> np.ndarray:
            return np.frombuffer(index, dtype, count=length, offset=int(starts[number]))

        self.lengths = field(0, "<i4", num_sequences)
        self.pointers = field(1, "<i8", num_sequences)
        self.documents = field(2, "<i8", num_documents)
        self.modes = field(3, "i1", num_sequences) if multimodal else None
        num_bytes = self._check_sequences(index_path, starts)
        self._check_documents(index_path, int(starts[2]))
        self.tokens = open_bytes(f"{prefix}.bin")
        if self.tokens.size != num_bytes:
            what = "ends too early" if self.tokens.size < num_bytes else "goes on too long"
            raise UserError(
                f"{self.tokens.name} {what}: it has {plural(self.tokens.size, 'byte')}, but its .idx "
                f"speaks of {num_bytes:,}; copy or make both files again"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self):
        # another process maps the files itself
        return IndexedReader, (self.prefix, self.cache_directory)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> Shaped[np.ndarray, "T"]:
        """Tokens of one sequence from `offset` on, `length` of them or all; read-only; IndexError outside it."""
        return self.get_parts([(index, offset, length)])[0]

    def get_parts(self, parts: Sequence[tuple[int, int, int | None]]) -> list[Shaped[np.ndarray, "T"]]:
        """`get` of several (index, offset, length), which a remote file gives in one go."""
        return [found.view(self.dtype) for found in self.tokens.read([self._range(*part) for part in parts])]

    def _range(self, index: int, offset: int, length: int | None) -> tuple[int, int]:
        """Where the bytes of tokens lie in the .bin."""
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"sequence {index} of {len(self.lengths)} in {self.prefix}")
        available = int(self.lengths[index]) - offset
        length = available if length is None else length
        if not 0 <= length <= available or offset < 0:
            raise IndexError(
                f"tokens {offset} to {offset + length} of sequence {index} with {self.lengths[index]} in {self.prefix}"
            )
        start = int(self.pointers[index]) + offset * self.dtype.itemsize
        return start, start + length * self.dtype.itemsize

    def _check_sequences(self, path: str, starts: Int64[np.ndarray, "4"]) -> int:
        """Bytes of all sequences; raises unless each has a length and they lie one after the other."""
        expected = 0
        for first in range(0, len(self.lengths), CHUNK):
            lengths, pointers = self.lengths[first : first + CHUNK], self.pointers[first : first + CHUNK]
            if lengths.min() < 0:
                wrong = int(np.argmax(lengths < 0))
                at = int(starts[0]) + 4 * (first + wrong)
                raise _damaged(path, at, f"the length of sequence {first + wrong} is {lengths[wrong]}")
            ends = expected + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            right = np.concatenate([[expected], ends[:-1]])
            if not np.array_equal(pointers, right):
                wrong = int(np.argmax(pointers != right))
                at = int(starts[1]) + 8 * (first + wrong)
                raise _damaged(
                    path,
                    at,
                    f"sequence {first + wrong} begins at byte {pointers[wrong]} of the .bin, but those before it "
                    f"end at byte {right[wrong]}",
                )
            expected = int(ends[-1])
        return expected

    def _check_documents(self, path: str, start: int) -> None:
        """Raises unless the documents are all sequences in order."""
        bounds = self.documents
        if bounds[0] != 0:
            raise _damaged(path, start, f"the first document starts with sequence {bounds[0]}, not 0")
        for first in range(0, len(bounds) - 1, CHUNK):
            part = bounds[first : first + CHUNK + 1]
            falls = part[1:] < part[:-1]
            if falls.any():
                wrong = first + 1 + int(np.argmax(falls))
                raise _damaged(
                    path,
                    start + 8 * wrong,
                    f"document bound {wrong} is {bounds[wrong]}, less than {bounds[wrong - 1]} before it",
                )
        if bounds[-1] != len(self):
            last = len(bounds) - 1
            raise _damaged(
                path, start + 8 * last, f"the last document ends at sequence {bounds[-1]}, but there are {len(self)}"
            )


class IndexedWriter:
    """Writes a pair of files; a context manager: both appear whole when it ends well, and neither otherwise.

    A sequence is added by `add_item`, a document ends with `end_document`, and whole files are appended by `add_index`.
    `UserError` for ids that the dtype cannot hold and for files that cannot be written.
    """

    def __init__(self, prefix: str, dtype: Any, multimodal: bool = False):
        self.prefix = prefix
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            names = ", ".join(known.name for known in DTYPES.values())
            raise UserError(f"{prefix}.bin cannot hold {self.dtype.name}; its types are {names}")
        self.multimodal = multimodal
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._modes = array("b")
        self._aside = f".{uuid.uuid4().hex}.partial"
        self._output: BinaryIO | None = None

    def __enter__(self) -> "IndexedWriter":
        try:
            self._output = open(f"{self.prefix}.bin{self._aside}", "wb", buffering=1 << 20)
        except OSError as error:
            raise self._unwritable(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        assert self._output is not None
        try:
            with self._output as output:
                if kind is None:
                    self._finish(output)
        except OSError as failure:
            raise self._unwritable(failure) from failure
        finally:
            for name in ("bin", "idx"):
                Path(f"{self.prefix}.{name}{self._aside}").unlink(missing_ok=True)

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return sum(self._lengths)

    def add_item(self, ids: Shaped[np.ndarray, "T"] | Sequence[int], mode: int = 0) -> None:
        """Adds one sequence, which may be empty; a mode other than 0 is for multimodal files."""
        given = np.asarray(ids)
        tokens = given if len(given) else np.empty(0, self.dtype)
        if tokens.dtype != self.dtype:
            tokens = tokens.astype(self.dtype)
            if not np.array_equal(tokens, given):
                wrong = given[np.argmax(tokens != given)]
                raise UserError(
                    f"{self.prefix}.bin: the id {wrong} of sequence {len(self._lengths)} does not fit "
                    f"{self.dtype.name}; give the right vocabulary size or a wider type"
                )
        if mode and not self.multimodal:
            raise UserError(f"{self.prefix}.bin: a sequence of mode {mode} needs a multimodal file")
        self._write(tokens)
        self._lengths.append(len(tokens))
        self._modes.append(mode)

    def end_document(self) -> None:
        """The sequences since the last document, if any, are a document."""
        self._documents.append(len(self._lengths))

    def add_index(self, prefix: str) -> None:
        """Adds every document of another pair of files, which must be alike in dtype and modes."""
        other = IndexedReader(prefix)
        for name, ours, theirs in (
            ("dtype", self.dtype.name, other.dtype.name),
            ("multimodal", self.multimodal, other.modes is not None or (self.multimodal and not len(other))),
        ):
            if ours != theirs:
                raise UserError(f"{prefix}.idx has {name} {theirs}, but {self.prefix}.idx {ours}; make them alike")
        shift = len(self._lengths)
        self._lengths.frombytes(other.lengths.astype(np.intc).tobytes())
        self._documents.frombytes((other.documents[1:] + shift).astype(np.int64).tobytes())
        self._modes.frombytes(bytes(len(other)) if other.modes is None else other.modes.tobytes())
        for start in range(0, other.tokens.size, COPIED):
            self._write(*other.tokens.read([(start, min(start + COPIED, other.tokens.size))]))

    def _open_output(self) -> BinaryIO:
        assert self._output is not None, "an IndexedWriter is a context manager: with IndexedWriter(...) as writer"
        return self._output

    def _write(self, tokens: Shaped[np.ndarray, "T"]) -> None:
        try:
            self._open_output().write(np.ascontiguousarray(tokens).data)
        except OSError as error:
            raise self._unwritable(error) from error

    def _finish(self, output: BinaryIO) -> None:
        lengths = np.frombuffer(self._lengths, np.intc).astype("<i4")
        if self._documents[-1] != len(lengths):
            rest = len(lengths) - self._documents[-1]
            raise ValueError(f"{self.prefix}: {rest} sequences come after the last end_document")
        sizes = lengths.astype("<i8") * self.dtype.itemsize
        pointers = np.cumsum(sizes, dtype="<i8") - sizes
        with open(f"{self.prefix}.idx{self._aside}", "wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(lengths), len(self._documents)))
            index.write(lengths.tobytes())
            index.write(pointers.tobytes())
            index.write(np.frombuffer(self._documents, np.int64).astype("<i8").tobytes())
            index.write(self._modes.tobytes() if self.multimodal else b"")
            _to_disk(index)
        _to_disk(output)
        # a reader needs both files: without the old .idx no moment pairs new tokens with old places
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        os.replace(output.name, f"{self.prefix}.bin")
        os.replace(index.name, f"{self.prefix}.idx")

    def _unwritable(self, error: OSError) -> UserError:
        mend = "make room" if error.errno in FULL else "choose a folder that can be written"
        return UserError(f"cannot write {self.prefix}.bin and .idx: {error.strerror or error}; {mend}")


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _whole(path: str) -> list[UInt8[np.ndarray, "B"]]:
    content = open_bytes(path)
    return content.read([(0, content.size)])


def _read_header(path: str, index: np.ndarray) -> tuple[np.dtype, int, int, bool]:
    """Type of the tokens, number of sequences and document bounds, and whether modes follow."""
    if len(index) < HEADER.size:
        raise _damaged(path, len(index), f"it ends within the header of {HEADER.size} bytes")
    magic, version, code, num_sequences, num_documents = HEADER.unpack(index[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise UserError(f"{path} is no Megatron index: it starts with {magic!r}, not {MAGIC!r}; give another PREFIX")
    if version != VERSION:
        raise _damaged(path, 9, f"the version is {version}, not {VERSION}")
    if code not in DTYPES:
        raise _damaged(path, 17, f"the type of the tokens is {code}, not 1 to 8")
    if num_documents < 1:
        raise _damaged(path, 26, "there is no document bound, but the first is always 0")
    size = HEADER.size + 12 * num_sequences + 8 * num_documents
    if len(index) not in (size, size + num_sequences):
        raise _damaged(
            path,
            min(len(index), size),
            f"{plural(num_sequences, 'sequence')} and {plural(num_documents, 'document bound')} need {size:,} bytes "
            f"({size + num_sequences:,} with modes), but it has {len(index):,}",
        )
    return DTYPES[code], num_sequences, num_documents, len(index) > size


def _damaged(path: str, offset: int, what: str) -> UserError:
    return UserError(f"{path} is damaged at byte {offset}: {what}; copy or make it again")
