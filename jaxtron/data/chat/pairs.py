"""Conversations as pairs: what comes before the last answer, and that."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxtron.config import UserError
from jaxtron.data.chat.conversations import NO_ROLES, read_conversations
from jaxtron.data.chat.template import ASSISTANT


@dataclass(frozen=True)
class TextPair:
    """A text and what is to be written of it, and where they stand."""

    text: str
    answer: str
    place: str


def read_pairs(path: Path, roles: Mapping[str, str] = NO_ROLES) -> Iterator[TextPair]:
    """The pair of each line of a file that is not empty; a `UserError` names the line that is none.

    Turns before the last answer are the text, one after the other with a line's end between.
    """
    for number, conversation in read_conversations(path, roles):
        place, (*before, last) = f"{path}, line {number}", conversation.messages
        if last.role != ASSISTANT or not before:
            raise UserError(
                f"{place}: it has no answer after a text; give pairs, a text and an answer of the assistant"
            )
        yield TextPair("\n".join(message.content for message in before), last.content, place)
