"""Outputs that grow on disk and survive a kill: a work folder beside the output, and a journal of what is done in it.

The folder has for each key the tokens (`KEY.bin`, as they will be), the length of each sequence (`KEY.lengths`, int32)
and the number of sequences of each document (`KEY.sequences`, int32). The journal says how long these files were when
it was written, and up to where the input was read; what was appended later is cut off when work goes on.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from jaxtron.command import place_advice
from jaxtron.config import UserError
from jaxtron.data.megatron.indexed import CODES, HEADER, MAGIC, VERSION
from jaxtron.preprocess.encode import EncodedKey
from jaxtron.preprocess.inputs import Position

FORMAT_VERSION = 2
JOURNAL = "journal.json"
PARTS = ("bin", "lengths", "sequences")
# elements of an index written at once
BLOCK = 1 << 20


@dataclass(frozen=True)
class Journal:
    """What is done: the input's position and bytes, sizes of all files in PARTS order key by key, and counts."""

    position: Position = Position()
    consumed: int = 0
    sizes: list[int] = field(default_factory=list)
    documents: int = 0
    text_bytes: int = 0
    damaged: int = 0
    complete: bool = False


class WorkFolder:
    """The unfinished output of one command, `PREFIX.HASH.partial`; the hash is of all that decides the output.

    A context manager: one process at a time holds it. `outputs` maps each key to the prefix of its finished pair.
    `UserError` where it is held by another process, the disk cannot be written, or a pair is there already that
    `overwrite` does not allow to replace. Work that ends before anything is done leaves nothing behind.
    """

    def __init__(
        self, output: str, identity: Any, *, outputs: dict[str, str], dtype: np.dtype, overwrite: bool = False
    ):
        digest = hashlib.sha256(json.dumps([FORMAT_VERSION, identity]).encode()).hexdigest()[:12]
        self.folder = Path(f"{output}.{digest}.partial")
        self._nothing = self.journal = Journal(sizes=[0] * len(PARTS) * len(outputs))
        self._outputs, self._dtype, self._overwrite = outputs, dtype, overwrite
        self._paths = [self.folder / f"{number}.{part}" for number in range(len(outputs)) for part in PARTS]
        self._files: list[BinaryIO] = []
        self._open = ExitStack()

    def __enter__(self) -> "WorkFolder":
        self._new_folders = [path for path in (self.folder, *self.folder.parents) if not os.path.exists(path)]
        try:
            # what is complete may have been named in part
            if not (self._overwrite or self._saved().complete):
                refuse_existing(self._outputs.values())
            self.folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as opened:
                lock = opened.enter_context((self.folder / "lock").open("wb"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.exists(lock.name) or not os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
                    # finished, and removed, since it was opened
                    raise BlockingIOError
                self._restore(opened)
                self._open = opened.pop_all()
        except BlockingIOError:
            raise UserError(f"another process is writing {self.folder}; wait for it, or stop it and go on") from None
        except OSError as error:
            if self.folder in self._new_folders:
                self.discard()
            raise self._unwritable(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if error is not None and self.journal == self._nothing:
            self.discard()
        try:
            self._open.close()
        except OSError as failure:
            raise self._unwritable(failure) from failure

    def discard(self) -> None:
        """Removes the folder, and those made to hold it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self._new_folders[1:]:
            with suppress(OSError):
                # only where it is empty
                path.rmdir()

    def append(self, keys: Sequence[EncodedKey], **changes: Any) -> None:
        """Adds documents to each key's files, and only then changes what the journal says."""
        arrays = [array for key in keys for array in (key.ids, key.lengths, key.sequences)]
        try:
            for file, array in zip(self._files, arrays, strict=True):
                file.write(array.data)
            # at once: an interrupt may come before or after, never half way
            self.journal = replace(self.journal, sizes=[file.tell() for file in self._files], **changes)
        except OSError as error:
            raise self._unwritable(error) from error

    def save(self) -> None:
        """Puts on disk what was appended, and then the journal that says so."""
        try:
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
            self._write_journal()
        except OSError as error:
            raise self._unwritable(error) from error

    def finish(self) -> None:
        """Gives every pair its name and removes the folder."""
        try:
            if not self.journal.complete:
                self.save()
                if not self._overwrite:
                    refuse_existing(self._outputs.values())
                for number in range(len(self._outputs)):
                    self._write_index(number)
                self.journal = replace(self.journal, complete=True)
                self._write_journal()
            for number, prefix in enumerate(self._outputs.values()):
                self._publish(number, prefix)
            shutil.rmtree(self.folder)
        except OSError as error:
            raise self._unwritable(error) from error

    def _publish(self, number: int, prefix: str) -> None:
        tokens, index = self.folder / f"{number}.bin", self.folder / f"{number}.idx"
        # a reader needs both files: without the old .idx no moment pairs new tokens with old places
        if tokens.exists():
            Path(f"{prefix}.idx").unlink(missing_ok=True)
            os.replace(tokens, f"{prefix}.bin")
        # where an earlier process was killed between the two, only this one is left to do
        if index.exists():
            os.replace(index, f"{prefix}.idx")

    def _restore(self, opened: ExitStack) -> None:
        """The state of the journal, or a new one, and the files as long as it says."""
        self.journal = self._saved()
        if self.journal.complete:
            return
        for path, size in zip(self._paths, self.journal.sizes, strict=True):
            file = opened.enter_context(path.open("ab", buffering=1 << 20))
            self._files.append(file)
            if file.tell() < size:
                raise UserError(f"{path} has {file.tell()} bytes of {size} written; delete that folder and start again")
            file.truncate(size)
            file.seek(size)

    def _saved(self) -> Journal:
        """What the journal says, which may be nothing yet."""
        try:
            saved = json.loads((self.folder / JOURNAL).read_text(encoding="utf-8"))
            return Journal(**{**saved, "position": Position(**saved["position"])})
        except (FileNotFoundError, NotADirectoryError):
            return self._nothing
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{self.folder / JOURNAL} is damaged ({error}); delete that folder and start again"
            ) from error

    def _write_journal(self) -> None:
        aside = self.folder / f"{JOURNAL}.partial"
        with aside.open("w", encoding="utf-8") as file:
            json.dump(asdict(self.journal), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.folder / JOURNAL)

    def _write_index(self, number: int) -> None:
        """The .idx of one key, block by block."""
        lengths, sequences = (self._read(number, part) for part in PARTS[1:])
        with (self.folder / f"{number}.idx").open("wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, CODES[self._dtype], len(lengths), len(sequences) + 1))
            index.write(lengths.data)
            _write_sums(index, lengths, self._dtype.itemsize, with_last=False)
            _write_sums(index, sequences, 1, with_last=True)
            index.flush()
            os.fsync(index.fileno())

    def _read(self, number: int, part: str) -> np.ndarray:
        path = self.folder / f"{number}.{part}"
        # an empty file cannot be mapped
        return np.asarray(np.memmap(path, "<i4", mode="r")) if path.stat().st_size else np.empty(0, "<i4")

    def _unwritable(self, error: OSError) -> UserError:
        above = next((path for path in self.folder.parents if os.path.isfile(path)), None)
        what = error.strerror or error if above is None else f"{above} is a file, not a folder"
        return UserError(f"cannot write {self.folder}: {what}; {place_advice(error, '--output')}, and run again")


def refuse_existing(prefixes: Iterable[str]) -> None:
    """UserError if one of the files of these pairs is there."""
    for prefix in prefixes:
        there = [path for path in (f"{prefix}.bin", f"{prefix}.idx") if os.path.lexists(path)]
        if there:
            raise UserError(
                f"{' and '.join(there)} {'is' if len(there) == 1 else 'are'} there already; choose another --output, "
                "or replace with --overwrite"
            )


def _write_sums(file: BinaryIO, counts: np.ndarray, unit: int, *, with_last: bool) -> None:
    """Sums of all counts before each one, times the unit, as int64; `with_last` that of all of them too."""
    total = 0
    for first in range(0, len(counts), BLOCK):
        ends = total + np.cumsum(counts[first : first + BLOCK], dtype="<i8") * unit
        file.write(np.concatenate([[total], ends[:-1]]).astype("<i8").data)
        total = int(ends[-1])
    if with_last:
        file.write(np.array([total], "<i8").data)
