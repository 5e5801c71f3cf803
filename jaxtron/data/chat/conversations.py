"""Instruction data: conversations in JSON lines.

A line is an object in one of three forms, told apart by its keys:
`{"messages": [{"role": "user", "content": "..."}, ...]}`,
ShareGPT's `{"conversations": [{"from": "human", "value": "..."}, ...]}` and
Alpaca's `{"instruction": "...", "input": "...", "output": "..."}`, whose input may be missing or empty, with the turns
before it in `history`, a list of pairs of question and answer.

Beside any of them may be `system` (a first turn), and `tools`, `documents` and `chat_template_kwargs` (names for the
template). A turn with `weight` 0, or `train` false, has no loss. A key whose value is null is as good as missing.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtron.config import UserError
from jaxtron.data.chat.template import ASSISTANT, Conversation, Message
from jaxtron.data.files.reader import read_lines

NO_ROLES: Mapping[str, str] = {}
ROLES = {
    **{name: name for name in ("system", "developer", "user", ASSISTANT, "tool", "function", "ipython")},
    **{"human": "user", "prompter": "user", "observation": "tool", "function_call": ASSISTANT},
    **{name: ASSISTANT for name in ("gpt", "chatgpt", "bing", "bard", "model", "bot", "ai")},
}
"""Who speaks, by the names in use, in any case."""
WEIGHTS = ("weight", "train")
FOR_TEMPLATES = ("tools", "documents")


def read_conversations(path: Path, roles: Mapping[str, str] = NO_ROLES) -> Iterator[tuple[int, Conversation]]:
    """Line number and conversation of each line that is not empty; decompressed; UserError names file and line."""
    number, is_first = 0, True
    try:
        for number, line in read_lines(path):
            if line.strip():
                yield number, parse_conversation(json.loads(line.decode("utf-8")), roles)
                is_first = False
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; give a readable file") from error
    except UserError:
        raise
    except json.JSONDecodeError as error:
        mend = "train on text with --data.format text, or give JSON lines" if is_first else "mend or remove the line"
        raise UserError(f"{path}, line {number}: not JSON: {error.msg} at character {error.colno}; {mend}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8: {error.reason}; convert it to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: {error}; mend or remove the line") from error


def parse_conversation(line: Any, roles: Mapping[str, str] = NO_ROLES) -> Conversation:
    """One object in any of the three forms; ValueError says what is wrong with it.

    `roles` are names of roles beside ROLES, and what they stand for; a name in neither stays as it is.
    """
    if isinstance(line, list):
        raise ValueError("a JSON array, not an object: write one conversation a line (jq -c '.[]')")
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")
    left = {key: value for key, value in line.items() if value is not None}
    messages, unread = _take_messages(left)
    messages = [_with_known_role(message, roles) for message in messages]
    system = left.pop("system", "")
    if not isinstance(system, str):
        raise ValueError(f"system is {json.dumps(system)[:40]}, not text")
    own = next((message.content for message in messages if message.role == "system"), None)
    if system and own not in (None, _checked(system)):
        raise ValueError("it has system beside another system message; keep one")
    if system and own is None:
        messages.insert(0, Message("system", _checked(system)))
    extras = {name: left.pop(name) for name in FOR_TEMPLATES if name in left}
    given = left.pop("chat_template_kwargs", {})
    if not isinstance(given, dict):
        raise ValueError(f"chat_template_kwargs is {json.dumps(given)[:40]}, not an object")
    return Conversation(messages, {**extras, **given}, (*left, *unread))


def _take_messages(left: dict[str, Any]) -> tuple[list[Message], list[str]]:
    """Takes the turns out of a line; and what of them has no effect."""
    if "messages" in left:
        return _turns(left.pop("messages"), "messages", "role", "content")
    if "conversations" in left:
        return _turns(left.pop("conversations"), "conversations", "from", "value")
    if "instruction" in left and "output" in left:
        question = [_text(left, "instruction")]
        if left.get("input"):
            question.append(_text(left, "input"))
        messages = [
            *_history(left.pop("history", [])),
            Message("user", "\n\n".join(question)),
            Message(ASSISTANT, _text(left, "output")),
        ]
        for key in ("instruction", "input", "output"):
            left.pop(key, None)
        return messages, []
    keys = ", ".join(sorted(left)[:8]) or "no keys"
    raise ValueError(f"neither messages, nor conversations, nor instruction and output, but {keys}")


def _turns(turns: Any, name: str, role: str, content: str) -> tuple[list[Message], list[str]]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{name} is not a list of objects")
    messages, unread = [], []
    for turn in turns:
        left = {key: value for key, value in turn.items() if value is not None and key not in (role, content)}
        weights = {_weight(left.pop(key), key) for key in WEIGHTS if key in left}
        if len(weights) > 1:
            raise ValueError("weight and train say different things; keep one")
        speaker = _text(turn, role)
        if True in weights and ROLES.get(speaker.lower()) not in (ASSISTANT, None):
            unread.append("weight 1 of a turn that is no answer")
        # a turn may be nothing but calls of tools
        text = "" if turn.get(content) is None and left.get("tool_calls") else _content(turn, content)
        messages.append(Message(speaker, text, False not in weights, left))
    return messages, unread


def _history(pairs: Any) -> Iterator[Message]:
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("history is not a list of pairs of question and answer")
    for question, answer in pairs:
        yield Message("user", _text({"a question in history": question}, "a question in history"))
        yield Message(ASSISTANT, _text({"an answer in history": answer}, "an answer in history"))


def _with_known_role(message: Message, roles: Mapping[str, str]) -> Message:
    name = message.role
    role = roles.get(name) or ROLES.get(name.lower(), name)
    return Message(role, message.content, message.is_learned, message.extras)


def _weight(value: Any, key: str) -> bool:
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise ValueError(f"{key} is {json.dumps(value)[:40]}, not 0 or 1")
    return bool(value)


def _content(turn: dict, key: str) -> str:
    """Text, or the text of a list of parts `{"type": "text", "text": "..."}`."""
    parts = turn.get(key)
    if not isinstance(parts, list):
        return _text(turn, key)
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise ValueError(f"{key} has parts that are not text")
    return "".join(_text(part, "text") for part in parts)


def _text(values: dict, key: str) -> str:
    text = values.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{key} is {json.dumps(text)[:40]}, not text")
    return _checked(text)


def _checked(text: str) -> str:
    # JSON can spell half of a surrogate pair, which is no character
    text.encode("utf-8")
    return text
