"""Conversations as token ids on disk, tokenized once.

A cache entry is a folder named by the hash of what it was made from, written under another name and renamed when whole,
as in `text.py`.
"""

import hashlib
import json
import logging
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt64

from jaxtron.config import UserError
from jaxtron.data.chat.conversations import ROLES, read_conversations
from jaxtron.data.chat.template import ChatTemplate, Conversation, Piece, Refusal
from jaxtron.data.chat.tokens import encode_conversations, tokens_to_insert
from jaxtron.data.tokenizers import Tokenizer

FORMAT_VERSION = 3
BATCH = 512
"""Conversations that are encoded together."""
SHOWN = 300
"""Characters of the first conversation that was left out for a reason."""

NO_ANSWER = "without an answer to learn"
FORGED = "with a marker of the template in a message"
UNKNOWN_ROLE = "with a turn of an unknown role (name it in data.chat.roles)"
UNWRITTEN_CALLS = "with calls of tools, which the template does not write"
REFUSED = "that the template refuses"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reason:
    """How many conversations were left out for a reason, and the first of them."""

    count: int
    first: str


@dataclass(frozen=True)
class ChatEntry:
    """Every conversation with an answer, as memory-mapped arrays; and what is not among them."""

    ids: Integer[np.ndarray, "T"]
    is_answer: Bool[np.ndarray, "T"]
    lengths: Int64[np.ndarray, "N"]
    starts: Int64[np.ndarray, "N"]
    first_answers: Int64[np.ndarray, "N"]
    """The place of the first id to predict in each conversation, at least 1."""
    digests: UInt64[np.ndarray, "N"]
    """Of what was said: equal for conversations that are equal, whatever the tokenizer and the template."""
    read: int
    """Conversations in the files."""
    left_out: Mapping[str, Reason]
    unread: Mapping[str, int]
    """Lines that have a key which nothing reads, by key."""
    fingerprint: str


def open_entry(
    files: Sequence[Path],
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    roles: Mapping[str, str],
    cache_directory: Path,
) -> ChatEntry:
    """The conversations from the cache, put there first if need be."""
    try:
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; give readable JSON lines") from error
    tokens = tokens_to_insert(template.tokens, tokenizer)
    made_from = [tokenizer.fingerprint, template.fingerprint, sorted(tokens.items()), sorted(roles.items()), stats]
    key = json.dumps(["chat", FORMAT_VERSION, *made_from])
    entry = cache_directory / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not entry.is_dir():
        logger.info("tokenizing %d files of conversations into %s", len(files), entry)
        try:
            _write_entry(entry, files, _Writer(tokenizer, template, tokens, roles))
        except OSError as error:
            raise UserError(
                f"cannot write the token cache in {cache_directory}: {error.strerror or error}; "
                "give a writable folder with room"
            ) from error
    return _read_entry(entry)


def _write_entry(entry: Path, files: Sequence[Path], writer: "_Writer") -> None:
    partial = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        description = writer.write(partial, files)
        description["files"] = {path.name: _checksum(path) for path in sorted(partial.iterdir())}
        (partial / "description.json").write_text(json.dumps(description), encoding="utf-8")
        try:
            partial.rename(entry)
        except OSError:
            # another process was first, and its entry is the same as ours
            if not entry.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Writer:
    """From files to arrays in a folder, and what was left out on the way."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, tokens: Mapping[str, int], roles: Mapping[str, str]
    ):
        self._tokenizer = tokenizer
        self._template = template
        self._tokens = tokens
        self._roles = roles
        self._known_roles = {*ROLES.values(), *roles.values()}
        self._read = 0
        self._left_out: dict[str, Reason] = {}
        self._unread: Counter[str] = Counter()

    def write(self, folder: Path, files: Sequence[Path]) -> dict:
        """Writes the ids, answers, lengths, first answers and digests; what describes them is returned."""
        dtype = np.dtype("<u2" if self._tokenizer.vocab_size <= 2**16 else "<u4")
        digest, lengths, first_answers, digests = hashlib.sha256(), [], [], []
        with (folder / "ids.bin").open("wb") as ids_file, (folder / "answers.bin").open("wb") as answers_file:
            for file in files:
                conversations = read_conversations(file, self._roles)
                while batch := list(islice(conversations, BATCH)):
                    places = [f"{file}, line {line}" for line, _ in batch]
                    written = self._render([conversation for _, conversation in batch], places)
                    pieces = [pieces for _, _, pieces in written]
                    sequences = encode_conversations(pieces, tokenizer=self._tokenizer, tokens=self._tokens)
                    for (place, conversation, _), sequence in zip(written, sequences, strict=True):
                        if not sequence.is_answer[1:].any():
                            self._leave_out(NO_ANSWER, place)
                            continue
                        ids, answers = sequence.ids.astype(dtype).tobytes(), sequence.is_answer.tobytes()
                        ids_file.write(ids)
                        answers_file.write(answers)
                        digest.update(ids + answers)
                        lengths.append(len(sequence.ids))
                        first_answers.append(1 + int(np.argmax(sequence.is_answer[1:])))
                        digests.append(_digest(conversation))
        np.save(folder / "lengths.npy", np.array(lengths, np.int64))
        np.save(folder / "first_answers.npy", np.array(first_answers, np.int64))
        np.save(folder / "digests.npy", np.array(digests, np.uint64))
        digest.update(np.array(lengths, "<i8").tobytes() + np.array(digests, "<u8").tobytes())
        return {
            "dtype": dtype.str,
            "fingerprint": digest.hexdigest(),
            "read": self._read,
            "left_out": {reason: [found.count, found.first] for reason, found in self._left_out.items()},
            "unread": dict(self._unread),
        }

    def _render(
        self, conversations: Sequence[Conversation], places: Sequence[str]
    ) -> list[tuple[str, Conversation, list[Piece]]]:
        """Those that can be written, in pieces, with the places they come from."""
        written = []
        for conversation, place in zip(conversations, places, strict=True):
            self._read += 1
            self._unread.update(self._unread_keys(conversation))
            if trouble := self._trouble(conversation):
                reason, what = trouble
                self._leave_out(reason, f"{place}: {what}")
                continue
            try:
                pieces = self._template.render(conversation)
                # what came for the template may have half a character, as JSON can spell it
                "".join(piece.text for piece in pieces).encode("utf-8")
                written.append((place, conversation, pieces))
            except Refusal as error:
                self._leave_out(REFUSED, f"{place}: {error}")
            except (UserError, UnicodeEncodeError) as error:
                raise UserError(f"{place}: {error}") from error
        return written

    def _trouble(self, conversation: Conversation) -> tuple[str, str] | None:
        """Why a conversation cannot be written, and what in it is the matter."""
        for message in conversation.messages:
            if message.role not in self._known_roles:
                return UNKNOWN_ROLE, message.role
            for marker in self._template.markers:
                if marker in message.role or marker in message.content:
                    return FORGED, marker
            if message.extras.get("tool_calls") and not self._template.reads("tool_calls"):
                return UNWRITTEN_CALLS, message.role
        return None

    def _unread_keys(self, conversation: Conversation) -> set[str]:
        given = {*conversation.extras, *(key for message in conversation.messages for key in message.extras)}
        return {*conversation.unread, *(key for key in given if not self._template.reads(key))}

    def _leave_out(self, reason: str, first: str) -> None:
        shown = " ".join(first.split())
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]} ..."
        found = self._left_out.get(reason, Reason(0, shown))
        self._left_out[reason] = Reason(found.count + 1, found.first)


def _digest(conversation: Conversation) -> int:
    said = json.dumps([[message.role, message.content] for message in conversation.messages])
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")


def _read_entry(entry: Path) -> ChatEntry:
    try:
        description = json.loads((entry / "description.json").read_text(encoding="utf-8"))
        for name, digest in description["files"].items():
            if _checksum(entry / name) != digest:
                raise UserError(f"{name} is not as it was written")
        lengths, first_answers = np.load(entry / "lengths.npy"), np.load(entry / "first_answers.npy")
        ids = _map(entry / "ids.bin", np.dtype(description["dtype"]))
        is_answer = _map(entry / "answers.bin", np.dtype(bool))
        if not len(ids) == len(is_answer) == lengths.sum():
            raise UserError(f"{len(ids)} ids, {len(is_answer)} marks, but {lengths.sum()} in all conversations")
        return ChatEntry(
            ids=ids,
            is_answer=is_answer,
            lengths=lengths,
            starts=np.cumsum(lengths) - lengths,
            first_answers=first_answers,
            digests=np.load(entry / "digests.npy"),
            read=description["read"],
            left_out={reason: Reason(*found) for reason, found in description["left_out"].items()},
            unread=description["unread"],
            fingerprint=description["fingerprint"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise UserError(f"the token cache {entry} is damaged ({error}); delete that folder and start again") from error


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """A plain view of the mapped file: slices of a memmap are several times slower."""
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)
