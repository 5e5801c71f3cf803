"""Packed rows of conversations, tokenized once.

A cache entry is a folder named by the hash of what it was made from, written under another name and renamed when whole,
as in `text.py`.
"""

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64, Integer

from jaxtron.config import UserError
from jaxtron.data.chat import encode_conversations, read_conversations
from jaxtron.data.chat_template import ChatMl, ChatTemplate, Message, Piece
from jaxtron.data.packing import PackedSequence, PackedSource
from jaxtron.data.tokenizers import Tokenizer

FORMAT_VERSION = 1
BATCH = 512
"""Conversations that are encoded together."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatCounts:
    """What became of the conversations of the files."""

    read: int
    without_answer: int
    """Dropped: there is no answer to learn from."""
    with_markers: int
    """Dropped: a message contains a marker of the template, which would forge a turn."""
    too_long: int = 0
    """Dropped: longer than a row, and to be dropped then, or cut before the first answer."""
    truncated: int = 0
    """Cut to the length of a row."""


class ChatSource(PackedSource):
    """First-fit rows of whole conversations, weights on answers only; `counts` says what was left out.

    `too_long` says what happens to a conversation of more than `sequence_length` + 1 ids: "drop" or "truncate" it.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        sequence_length: int,
        tokenizer: Tokenizer,
        cache_directory: Path,
        template: ChatTemplate | None = None,
        too_long: Literal["drop", "truncate"] = "drop",
    ):
        if too_long not in ("drop", "truncate"):
            raise UserError(f"conversations that are too long: {too_long!r}; choose drop or truncate")
        entry = _open_entry(files, tokenizer, ChatMl() if template is None else template, cache_directory)
        limit = sequence_length + 1
        is_long = entry.lengths > limit
        is_kept = ~is_long if too_long == "drop" else entry.first_answers < limit
        self.counts = replace(entry.counts, too_long=int((~is_kept).sum()), truncated=int((is_long & is_kept).sum()))
        self.fingerprint = entry.fingerprint
        kept = np.flatnonzero(is_kept)
        if not len(kept):
            raise UserError(
                f"no conversation of {', '.join(map(str, files))} is left of {self.counts.read}: {self.counts}; "
                "raise the sequence length or give other files"
            )
        super().__init__(_Kept(entry, kept, np.minimum(entry.lengths[kept], limit)), sequence_length=sequence_length)


@dataclass(frozen=True)
class _Entry:
    """Every conversation with an answer, as memory-mapped arrays."""

    ids: Integer[np.ndarray, "T"]
    is_answer: Bool[np.ndarray, "T"]
    lengths: Int64[np.ndarray, "N"]
    starts: Int64[np.ndarray, "N"]
    first_answers: Int64[np.ndarray, "N"]
    """The place of the first id to predict in each conversation, at least 1."""
    counts: ChatCounts
    fingerprint: str


class _Kept:
    """Some conversations of an entry, some of them cut."""

    def __init__(self, entry: _Entry, numbers: Int64[np.ndarray, "K"], lengths: Int64[np.ndarray, "K"]):
        self.lengths = lengths
        self._entry = entry
        self._numbers = numbers

    def __getitem__(self, index: int) -> PackedSequence:
        start = int(self._entry.starts[self._numbers[index]])
        end = start + int(self.lengths[index])
        return PackedSequence(self._entry.ids[start:end].astype(np.int32), self._entry.is_answer[start:end])


def _open_entry(files: Sequence[Path], tokenizer: Tokenizer, template: ChatTemplate, cache_directory: Path) -> _Entry:
    """The conversations from the cache, put there first if need be."""
    try:
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; give readable JSON lines") from error
    key = json.dumps(["chat", FORMAT_VERSION, tokenizer.fingerprint, template.fingerprint, stats])
    entry = cache_directory / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not entry.is_dir():
        logger.info("tokenizing %d files of conversations into %s", len(files), entry)
        try:
            _write_entry(entry, files, tokenizer, template)
        except OSError as error:
            raise UserError(
                f"cannot write the token cache in {cache_directory}: {error.strerror or error}; "
                "give a writable folder with room"
            ) from error
    return _read_entry(entry)


def _write_entry(entry: Path, files: Sequence[Path], tokenizer: Tokenizer, template: ChatTemplate) -> None:
    partial = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        description = _write_tokens(partial, files, tokenizer, template)
        (partial / "description.json").write_text(json.dumps(description), encoding="utf-8")
        try:
            partial.rename(entry)
        except OSError:
            # another process was first, and its entry is the same as ours
            if not entry.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tokens(folder: Path, files: Sequence[Path], tokenizer: Tokenizer, template: ChatTemplate) -> dict:
    """Write the ids, answers, lengths and first answers; what describes them is returned."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    digest, lengths, first_answers = hashlib.sha256(), [], []
    read = without_answer = with_markers = 0
    with (folder / "ids.bin").open("wb") as ids_file, (folder / "answers.bin").open("wb") as answers_file:
        for file in files:
            conversations = read_conversations(file)
            while batch := list(islice(conversations, BATCH)):
                honest = [(line, turns) for line, turns in batch if not _has_marker(turns, template.markers)]
                read, with_markers = read + len(batch), with_markers + len(batch) - len(honest)
                pieces = [_render(file, line, turns, template) for line, turns in honest]
                for sequence in encode_conversations(pieces, tokenizer=tokenizer):
                    if not sequence.is_answer[1:].any():
                        without_answer += 1
                        continue
                    ids, answers = sequence.ids.astype(dtype).tobytes(), sequence.is_answer.tobytes()
                    ids_file.write(ids)
                    answers_file.write(answers)
                    digest.update(ids + answers)
                    lengths.append(len(sequence.ids))
                    first_answers.append(1 + int(np.argmax(sequence.is_answer[1:])))
    np.save(folder / "lengths.npy", np.array(lengths, np.int64))
    np.save(folder / "first_answers.npy", np.array(first_answers, np.int64))
    digest.update(np.array(lengths, "<i8").tobytes())
    counts = ChatCounts(read=read, without_answer=without_answer, with_markers=with_markers)
    return {"dtype": dtype.str, "fingerprint": digest.hexdigest(), "counts": asdict(counts)}


def _render(file: Path, line: int, messages: Sequence[Message], template: ChatTemplate) -> list[Piece]:
    try:
        return template.render(messages)
    except ValueError as error:
        raise UserError(f"{file}, line {line}: {error}") from error


def _has_marker(messages: Sequence[Message], markers: Sequence[str]) -> bool:
    return any(marker in text for message in messages for text in (message.role, message.content) for marker in markers)


def _read_entry(entry: Path) -> _Entry:
    try:
        description = json.loads((entry / "description.json").read_text(encoding="utf-8"))
        lengths, first_answers = np.load(entry / "lengths.npy"), np.load(entry / "first_answers.npy")
        ids = _map(entry / "ids.bin", np.dtype(description["dtype"]))
        is_answer = _map(entry / "answers.bin", np.dtype(bool))
        if not len(ids) == len(is_answer) == lengths.sum():
            raise UserError(f"{len(ids)} ids, {len(is_answer)} marks, but {lengths.sum()} in all conversations")
        counts = ChatCounts(**description["counts"])
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"the token cache {entry} is damaged ({error}); delete that folder and start again") from error
    return _Entry(
        ids=ids,
        is_answer=is_answer,
        lengths=lengths,
        starts=np.cumsum(lengths) - lengths,
        first_answers=first_answers,
        counts=counts,
        fingerprint=description["fingerprint"],
    )


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """A plain view of the mapped file: slices of a memmap are several times slower."""
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)
