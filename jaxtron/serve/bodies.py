"""Bodies of requests: what may be in them, and the settings that they mean."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtron.config import UserError
from jaxtron.generate.settings import MOST_LOGPROBS, read_settings
from jaxtron.serve.errors import ApiError
from jaxtron.words import NO_TEXT, is_whole_text

# fields of sampling by the names that they have in a body
SAMPLING = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")},
    **{name: name for name in ("presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "seed")},
    **{name: name for name in ("ignore_eos", "stop_token_ids", "stop", "logit_bias")},
    "min_tokens": "min_new_tokens",
}
# what says something of the client and changes no answer
IGNORED = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "priority request_id parallel_tool_calls".split()
)
# what is not offered, with the values that ask for nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "reasoning_effort": (),
}
COMMON = {"model", "n", "stream", "stream_options", "skip_special_tokens", "max_tokens", "logprobs", *SAMPLING}
COMPLETION = COMMON | {"prompt", "echo", "add_special_tokens"}
CHAT = COMMON | {"messages", "max_completion_tokens", "top_logprobs"}
MOST_SEQUENCES = 256
DEFAULT_TOKENS = 16
# how JSON may have half a character, which is whole beside another
HALF = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class AskedText:
    """What the body of a completion or of a chat asks for, checked but for what only the model knows."""

    is_chat: bool
    prompts: tuple[str | tuple[int, ...], ...] = ()
    """Of a completion: texts or ids."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """Of a chat."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    max_tokens: int | None = None
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool = True


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body is; an `ApiError` for any other."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object")
    if HALF.search(body) and not is_whole_text(json.dumps(found, ensure_ascii=False)):
        # no answer could repeat it
        raise ApiError(400, f"the body {NO_TEXT}")
    # null asks for the default
    return {name: value for name, value in found.items() if value is not None}


def read_completion(body: Mapping[str, Any]) -> AskedText:
    """What `/v1/completions` is asked for."""
    given = _known(body, COMPLETION)
    prompts = _prompts(given)
    echo, n = _switch(given, "echo", False), _count(given, "n", 1, 1)
    if len(prompts) * n > MOST_SEQUENCES:
        raise ApiError(400, f"prompt and n ask for {len(prompts) * n} answers: at most {MOST_SEQUENCES}", param="n")
    logprobs = {"logprobs": _count(given, "logprobs", 0, 0, MOST_LOGPROBS)} if "logprobs" in given else {}
    return AskedText(
        is_chat=False,
        prompts=prompts,
        sampling=_sampling(given) | logprobs,
        n=n,
        # scoring alone makes no token
        max_tokens=_count(given, "max_tokens", DEFAULT_TOKENS, 0 if echo else 1),
        echo=echo,
        add_special_tokens=_switch(given, "add_special_tokens", True),
        **_shared(given),
    )


def read_chat(body: Mapping[str, Any]) -> AskedText:
    """What `/v1/chat/completions` is asked for."""
    given = _known(body, CHAT)
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise ApiError(400, "messages must be a list of objects with role and content", param="messages")
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise ApiError(400, "max_tokens and max_completion_tokens say the same: keep one", param="max_tokens")
    name = "max_tokens" if "max_tokens" in given else "max_completion_tokens"
    n = _count(given, "n", 1, 1, MOST_SEQUENCES)
    if "top_logprobs" in given and not _switch(given, "logprobs", False):
        raise ApiError(400, "top_logprobs has no effect without logprobs: true", param="top_logprobs")
    logprobs = {}
    if _switch(given, "logprobs", False):
        logprobs = {"logprobs": _count(given, "top_logprobs", 0, 0, MOST_LOGPROBS)}
    return AskedText(
        is_chat=True,
        messages=tuple(_message(number, message) for number, message in enumerate(messages)),
        sampling=_sampling(given) | logprobs,
        n=n,
        max_tokens=_count(given, name, 0, 1) if name in given else None,
        **_shared(given),
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _known(body: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """The fields that mean something."""
    for name, value in body.items():
        if name in known or name in IGNORED:
            continue
        if name not in NEUTRAL:
            raise ApiError(400, f"{name} is no field of this request", param=name, code="unknown_field")
        if value not in NEUTRAL[name]:
            raise ApiError(400, f"{name} is not offered: leave it out", param=name, code="not_offered")
    return {name: value for name, value in body.items() if name in known}


def _prompts(given: Mapping[str, Any]) -> tuple[str | tuple[int, ...], ...]:
    if "prompt" not in given:
        raise ApiError(400, "prompt is missing", param="prompt")
    prompt = given["prompt"]
    several = prompt if isinstance(prompt, list) and prompt and not is_id(prompt[0]) else [prompt]
    found: list[str | tuple[int, ...]] = []
    for one in several:
        if isinstance(one, str) and one:
            found.append(one)
        elif isinstance(one, list) and one and all(map(is_id, one)):
            found.append(tuple(one))
        else:
            raise ApiError(400, "prompt must be a text, token ids, or a list of either, not empty", param="prompt")
    return tuple(found)


def is_id(value: Any) -> bool:
    """Whether a value of JSON may be a token's id."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _message(number: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is a text; parts of text are joined."""
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ApiError(400, f"messages[{number}].content has a part that is no text", param="messages")
        content = "".join(part["text"] for part in content)
    return {name: value for name, value in message.items() if value is not None} | {"content": content}


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    found = {SAMPLING[name]: value for name, value in given.items() if name in SAMPLING}
    if isinstance(found.get("stop"), str):
        found["stop"] = [found["stop"]]
    for name in ("stop", "stop_token_ids"):
        if name in found:
            if not isinstance(found[name], list):
                raise ApiError(400, f"{name} must be a list", param=name)
            # an empty text stops nothing
            found[name] = tuple(value for value in found[name] if value != "")
    if found.get("top_k") == -1:
        found["top_k"] = 0
    if "logit_bias" in found:
        found["logit_bias"] = _biases(found["logit_bias"])
    try:
        read_settings(found)
    except UserError as error:
        raise setting_error(error) from None
    return found


def setting_error(error: UserError) -> ApiError:
    """An error of settings or prompts as an answer: its first word is the field, if it is one."""
    word, _, rest = str(error).partition(" ")
    name = word.rstrip(":").partition("[")[0]
    known = {setting: field for field, setting in SAMPLING.items()} | {"max_new_tokens": "max_tokens"}
    if name not in known and name not in COMPLETION | CHAT:
        return ApiError(400, str(error))
    code = "context_length_exceeded" if "room for" in rest else None
    return ApiError(400, f"{known.get(name, word)} {rest}", param=known.get(name, name), code=code)


def _biases(value: Any) -> dict[int, Any]:
    if not isinstance(value, dict) or not all(token.isdecimal() and len(token) < 10 for token in value):
        raise ApiError(400, "logit_bias must be numbers by token id", param="logit_bias")
    return {int(token): bias for token, bias in value.items()}


def _shared(given: Mapping[str, Any]) -> dict[str, Any]:
    stream = _switch(given, "stream", False)
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or not set(options) <= {"include_usage", "include_obfuscation"}:
        raise ApiError(400, "stream_options may have include_usage", param="stream_options")
    if options and not stream:
        raise ApiError(400, "stream_options has no effect without stream: true", param="stream_options")
    usage = options.get("include_usage") or False
    if not isinstance(usage, bool):
        raise ApiError(400, "stream_options.include_usage must be true or false", param="stream_options")
    special = _switch(given, "skip_special_tokens", True)
    return {"stream": stream, "include_usage": usage, "skip_special_tokens": special}


def _switch(given: Mapping[str, Any], name: str, default: bool) -> bool:
    value = given.get(name, default)
    if not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false", param=name)
    return value


def _count(given: Mapping[str, Any], name: str, default: int, least: int, most: int = 2**31 - 1) -> int:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        wanted = f"{least} or more" if most == 2**31 - 1 else f"from {least} to {most}"
        raise ApiError(400, f"{name} must be a whole number, {wanted}", param=name)
    return value
