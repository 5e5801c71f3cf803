"""Instruction data: conversations in JSON lines, and their tokens with the answers marked.

A line is an object in one of three forms, told apart by its keys:
`{"messages": [{"role": "user", "content": "..."}, ...]}`,
ShareGPT's `{"conversations": [{"from": "human", "value": "..."}, ...]}` and
Alpaca's `{"instruction": "...", "input": "...", "output": "..."}`, whose input may be missing or empty.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtron.config import UserError
from jaxtron.data.chat_template import ASSISTANT, Message, Piece
from jaxtron.data.packing import PackedSequence
from jaxtron.data.tokenizers import Tokenizer

SHAREGPT_ROLES = {"human": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT, "bard": ASSISTANT}
"""Other names are roles as they are: user, assistant, system, tool ..."""


def read_conversations(path: Path) -> Iterator[tuple[int, list[Message]]]:
    """Line number and messages of each line that is not empty; .gz is unpacked; UserError names file and line."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, parse_conversation(json.loads(line.decode("utf-8")))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; give a readable file") from error
    except EOFError as error:
        raise UserError(f"{path} ends within its compressed data after line {number}; copy it again") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {error}; mend or remove the line") from error


def parse_conversation(line: Any) -> list[Message]:
    """The messages of one object in any of the three forms; ValueError says what is wrong with it."""
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")
    if "messages" in line:
        return _turns(line["messages"], "messages", "role", "content")
    if "conversations" in line:
        turns = _turns(line["conversations"], "conversations", "from", "value")
        return [Message(SHAREGPT_ROLES.get(turn.role, turn.role), turn.content) for turn in turns]
    if "instruction" in line and "output" in line:
        question = [_text(line, "instruction")]
        if line.get("input"):
            question.append(_text(line, "input"))
        return [Message("user", "\n\n".join(question)), Message(ASSISTANT, _text(line, "output"))]
    keys = ", ".join(sorted(line)[:8]) or "no keys"
    raise ValueError(f"neither messages, nor conversations, nor instruction and output, but {keys}")


def encode_conversations(conversations: Sequence[Sequence[Piece]], *, tokenizer: Tokenizer) -> list[PackedSequence]:
    """Ids of each written conversation up to its last answer, and which of them are answers; empty without any."""
    rendered = [_until_the_last_answer(pieces) for pieces in conversations]
    encoded = iter(tokenizer.encode_batch([piece.text for pieces in rendered for piece in pieces]))
    sequences = []
    for pieces in rendered:
        ids = [np.asarray(next(encoded), np.int32) for _ in pieces]
        is_answer = [np.full(len(part), piece.is_answer) for part, piece in zip(ids, pieces, strict=True)]
        sequences.append(
            PackedSequence(
                ids=np.concatenate([np.empty(0, np.int32), *ids]),
                is_answer=np.concatenate([np.empty(0, bool), *is_answer]),
            )
        )
    return sequences


def _until_the_last_answer(pieces: Sequence[Piece]) -> list[Piece]:
    answers = [number for number, piece in enumerate(pieces) if piece.is_answer]
    return [piece for piece in pieces[: answers[-1] + 1] if piece.text] if answers else []


def _turns(turns: Any, name: str, role: str, content: str) -> list[Message]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{name} is not a list of objects")
    return [Message(_text(turn, role), _text(turn, content)) for turn in turns]


def _text(values: dict, key: str) -> str:
    text = values.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{key} is {json.dumps(text)[:40]}, not text")
    # JSON can spell half of a surrogate pair, which is no character
    text.encode("utf-8")
    return text
