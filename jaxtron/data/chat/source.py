"""Rows of whole conversations to train on and to validate on, and what was left out of them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64

from jaxtron.config import UserError
from jaxtron.data.chat.cache import UNKNOWN_ROLE, ChatEntry, Reason, open_entry
from jaxtron.data.chat.conversations import NO_ROLES
from jaxtron.data.chat.template import ChatMl, ChatTemplate
from jaxtron.data.packing import Normalize, PackedSequence, PackedSource
from jaxtron.data.source import NO_SAMPLES, Source
from jaxtron.data.tokenizers import Tokenizer
from jaxtron.words import either

KEYS_SHOWN, SHOWN = 20, 60
LONGER = "longer than"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatCounts:
    """What became of the conversations of the files."""

    read: int
    left_out: Mapping[str, Reason]
    """By the reason."""
    truncated: int
    """Cut to the length of a row."""
    unread: Mapping[str, int]
    """Lines that have a key which nothing reads, by key."""

    @property
    def dropped(self) -> int:
        """Conversations left out."""
        return sum(reason.count for reason in self.left_out.values())

    def reasons(self) -> list[str]:
        """Why conversations were left out, most first."""
        most_first = sorted(self.left_out.items(), key=lambda item: -item[1].count)
        return [f"{found.count:,} {reason} ({found.first})" for reason, found in most_first]

    def lines(self) -> list[str]:
        """What a user wants to know before training."""
        lines = [f"conversations: {self.read:,} read, {self.read - self.dropped:,} kept"]
        if self.truncated:
            lines[0] += f", {self.truncated:,} of them cut to the length of a sequence"
        lines += [f"left out: {reason}" for reason in self.reasons()]
        if self.unread:
            most_first = sorted(self.unread.items(), key=lambda item: (-item[1], item[0]))
            keys = ", ".join(f"{' '.join(key.split())[:SHOWN]} ({count:,})" for key, count in most_first[:KEYS_SHOWN])
            keys += f" and {len(most_first) - KEYS_SHOWN:,} more" if len(most_first) > KEYS_SHOWN else ""
            lines.append(f"keys that nothing reads, and lines that have them: {keys}")
        return lines


class Conversations:
    """All conversations of the files that fit into rows of `sequence_length`; `split` packs them.

    `too_long` says what happens to a conversation of more than `sequence_length` + 1 ids: "drop" or "truncate" it.
    `UserError` if more than a share `max_dropped` of the conversations is left out, for whatever reasons.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        sequence_length: int,
        tokenizer: Tokenizer,
        cache_directory: Path,
        template: ChatTemplate | None = None,
        roles: Mapping[str, str] = NO_ROLES,
        too_long: Literal["drop", "truncate"] = "drop",
        max_dropped: float = 1.0,
    ):
        assert too_long in ("drop", "truncate")
        self._sequence_length = sequence_length
        self._entry = open_entry(
            files,
            tokenizer=tokenizer,
            template=ChatMl() if template is None else template,
            roles=roles,
            cache_directory=cache_directory,
        )
        limit = sequence_length + 1
        is_long = self._entry.lengths > limit
        is_kept = ~is_long if too_long == "drop" else self._entry.first_answers < limit
        self._lengths = np.minimum(self._entry.lengths, limit)
        self._kept = np.flatnonzero(is_kept)
        self.counts = ChatCounts(
            read=self._entry.read,
            left_out={**self._entry.left_out, **_too_long(self._entry, ~is_kept, too_long, sequence_length)},
            truncated=int((is_long & is_kept).sum()),
            unread=self._entry.unread,
        )
        self.fingerprint = f"{self._entry.fingerprint} {sequence_length} {too_long}"
        for line in self.counts.lines():
            logger.info("%s", line)
        _check_dropped(self.counts, max_dropped, files)

    def split(self, validation_fraction: float, normalize: Normalize = "tokens") -> tuple[Source, Source]:
        """Rows to train on, and rows to validate on: conversations are divided first, then packed, each part by itself.

        What a conversation says decides where it goes, so that validation has conversations of all lengths from all
        over the files, whatever their order, the tokenizer and the seed; and none that is trained on too. `normalize`
        is what their loss is a mean over.
        """
        kept = self._kept
        num_validation = round(len(kept) * validation_fraction)
        digests = self._entry.digests[kept]
        order = np.argsort(digests, kind="stable")
        if 0 < num_validation < len(kept):
            # conversations that say the same stay together
            ordered = digests[order]
            num_validation = int(np.searchsorted(ordered, ordered[num_validation]))
        if num_validation == len(kept) or (validation_fraction and not num_validation):
            raise UserError(
                f"{len(kept):,} conversations, {len(np.unique(digests)):,} different, are too few to keep "
                f"data.validation_fraction {validation_fraction} of them for validation; give more, or set "
                "--data.validation_fraction 0"
            )
        validation, train = np.sort(kept[order[:num_validation]]), np.sort(kept[order[num_validation:]])
        return self._pack(train, normalize), self._pack(validation, normalize) if num_validation else NO_SAMPLES

    def _pack(self, numbers: Int64[np.ndarray, "K"], normalize: Normalize) -> PackedSource:
        kept = _Kept(self._entry, numbers, self._lengths[numbers])
        return PackedSource(kept, sequence_length=self._sequence_length, normalize=normalize)


def _too_long(entry: ChatEntry, is_dropped: np.ndarray, too_long: str, sequence_length: int) -> dict[str, Reason]:
    if not is_dropped.any():
        return {}
    what = LONGER if too_long == "drop" else "whose first answer is beyond"
    longest = f"the longest has {entry.lengths[is_dropped].max():,} tokens"
    return {f"{what} data.sequence_length {sequence_length}": Reason(int(is_dropped.sum()), longest)}


def _check_dropped(counts: ChatCounts, max_dropped: float, files: Sequence[Path]) -> None:
    if not counts.read:
        raise UserError(f"no conversation in {', '.join(map(str, files))}; give JSON lines of conversations")
    if counts.dropped < counts.read and counts.dropped <= max_dropped * counts.read:
        return
    advice = either(_mends(counts))
    more = "" if counts.dropped == counts.read else f", more than data.chat.max_dropped {max_dropped}"
    left_out = "1 conversation is" if counts.dropped == 1 else f"{counts.dropped:,} conversations are"
    raise UserError(f"{left_out} left out of {counts.read:,}{more}: {'; '.join(counts.reasons())}: {advice}")


def _mends(counts: ChatCounts) -> list[str]:
    """What a user can do about all the reasons, each way once."""
    mends = []
    too_long = [reason for reason in counts.left_out if "data.sequence_length" in reason]
    if len(too_long) + (UNKNOWN_ROLE in counts.left_out) < len(counts.left_out):
        mends.append("mend the lines")
    if UNKNOWN_ROLE in counts.left_out:
        mends.append("say what a role means with --data.chat.roles.NAME user (or assistant, ...)")
    if too_long:
        mends.append("raise --data.sequence_length")
    if any(reason.startswith(LONGER) for reason in too_long):
        mends.append("set --data.chat.too_long truncate")
    if counts.dropped < counts.read:
        # a share with two digits that allows it
        share = -(-100 * counts.dropped // counts.read) / 100
        mends.append(f"allow it with --data.chat.max_dropped {share}")
    return mends


class _Kept:
    """Some conversations of an entry, some of them cut."""

    def __init__(self, entry: ChatEntry, numbers: Int64[np.ndarray, "K"], lengths: Int64[np.ndarray, "K"]):
        self.lengths = lengths
        self._entry = entry
        self._numbers = numbers

    def __getitem__(self, index: int) -> PackedSequence:
        start = int(self._entry.starts[self._numbers[index]])
        end = start + int(self.lengths[index])
        return PackedSequence(self._entry.ids[start:end].astype(np.int32), self._entry.is_answer[start:end])
