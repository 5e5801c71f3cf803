"""Answers by OpenAI's protocol over a real socket, from an engine that knows the alphabet."""

from pathlib import Path

import pytest

from jaxtron.config import UserError
from jaxtron.generate.source import ModelSource
from jaxtron.serve.request import ServeRequest
from jaxtron.serve.run import serve
from tests.serve.conftest import Running, running
from tests.support.fake_engine import FakeEngine, fake_model

CHAT = {"messages": [{"role": "user", "content": "x"}]}


def test_a_completion(letters: Running):
    status, answer = letters.ask("/v1/completions", {"model": "letters", "prompt": "abc", "max_tokens": 5})
    assert status == 200 and answer["object"] == "text_completion" and answer["model"] == "letters"
    assert answer["id"].startswith("cmpl-") and isinstance(answer["created"], int)
    assert answer["choices"] == [{"index": 0, "text": "defgh", "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


def test_the_end_of_a_text_is_a_token_and_no_text(letters: Running):
    _, answer = letters.ask("/v1/completions", {"prompt": "w", "max_tokens": 9})
    assert answer["choices"][0]["text"] == "xyz" and answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 4
    # sixteen tokens where nothing is said, and null says nothing
    _, answer = letters.ask("/v1/completions", {"prompt": "a", "max_tokens": None, "stop": None})
    assert answer["choices"][0]["text"] == "bcdefghijklmnopq"


def test_a_character_of_two_halves_is_one(letters: Running):
    status, answer = letters.ask("/v1/completions", b'{"prompt": "\\ud83d\\ude00a", "max_tokens": 1, "echo": true}')
    assert (status, answer["choices"][0]["text"]) == (200, "\U0001f600ab")


def test_stops_over_tokens_and_several_prompts_and_answers(letters: Running):
    body = {"prompt": ["a", "mn"], "max_tokens": 20, "stop": ["ef", "qr"], "n": 2, "seed": 5}
    _, answer = letters.ask("/v1/completions", body)
    found = [(choice["index"], choice["text"], choice["finish_reason"]) for choice in answer["choices"]]
    assert found == [(0, "bcd", "stop"), (1, "bcd", "stop"), (2, "op", "stop"), (3, "op", "stop")]
    assert answer["usage"]["prompt_tokens"] == 3
    assert sorted(settings.seed for settings in letters.engine.begun[-4:]) == [5, 5, 6, 6]


def test_prompts_may_be_ids(letters: Running):
    for prompt in ([97, 98], [[97, 98]], [[97, 98], [98]]):
        _, answer = letters.ask("/v1/completions", {"prompt": prompt, "max_tokens": 1})
        assert [choice["text"] for choice in answer["choices"]] == ["c"] * len(answer["choices"])


def test_settings_reach_the_engine_by_their_names(letters: Running):
    body = {
        **{"temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "presence_penalty": 1, "logit_bias": {"7": -3}},
        **{"frequency_penalty": 0.5, "repetition_penalty": 1.1, "min_tokens": 2, "stop_token_ids": [104], "seed": -1},
    }
    letters.ask("/v1/completions", body | {"prompt": "a", "max_tokens": 30, "user": "me"})
    found = letters.engine.begun[-1]
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.5, 0.9, 0, 0.1)
    assert (found.presence_penalty, found.frequency_penalty, found.repetition_penalty) == (1, 0.5, 1.1)
    assert (found.min_new_tokens, found.max_new_tokens, found.seed) == (2, 30, 2**64 - 1)
    assert dict(found.logit_bias) == {7: -3} and set(found.ends) == {104, 256}


def test_what_an_evaluation_asks_for(letters: Running):
    """The prompt echoed with its scores, then exactly one token; entry 0 has none; the best beside the chosen."""
    body = {"prompt": [[97, 98, 99, 120], [97, 99]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    status, answer = letters.ask("/v1/completions", body | {"seed": 1234, "model": "letters"})
    assert status == 200
    first, second = (choice["logprobs"] for choice in answer["choices"])
    assert first["tokens"] == ["a", "b", "c", "x", "y"] and first["token_logprobs"] == [None, -0.5, -0.5, -3.0, -0.5]
    assert first["top_logprobs"] == [None, {"b": -0.5}, {"c": -0.5}, {"d": -0.5, "x": -3.0}, {"y": -0.5}]
    assert first["text_offset"] == [0, 1, 2, 3, 4]
    assert second["token_logprobs"] == [None, -3.0, -0.5] and len(second["tokens"]) == 3
    assert [choice["text"] for choice in answer["choices"]] == ["abcxy", "acd"]
    # the continuation "x" of "abc" is not the best, "bc" of "a" is
    greedy = [
        lp == max(top.values()) for lp, top in zip(first["token_logprobs"][1:], first["top_logprobs"][1:], strict=True)
    ]
    assert greedy == [True, True, False, True]


def test_scores_alone_make_no_token(letters: Running):
    body = {"prompt": "abx", "max_tokens": 0, "logprobs": 2, "echo": True, "n": 2}
    _, answer = letters.ask("/v1/completions", body)
    assert [choice["text"] for choice in answer["choices"]] == ["abx", "abx"]
    assert answer["choices"][1]["logprobs"]["token_logprobs"] == [None, -0.5, -3.0]
    assert answer["usage"]["completion_tokens"] == 0
    events = letters.events("/v1/completions", body | {"n": 1})
    assert [event["choices"][0]["text"] for event in events] == ["abx"]
    assert events[0]["choices"][0]["logprobs"]["tokens"] == ["a", "b", "x"]


def test_a_chat(letters: Running):
    status, answer = letters.ask("/v1/chat/completions", CHAT | {"max_tokens": 4})
    assert status == 200 and answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    choice = answer["choices"][0]
    # the prompt ends in a line feed, after which the alphabet begins
    assert choice["message"] == {"role": "assistant", "content": "abcd", "refusal": None}
    written = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert answer["usage"]["prompt_tokens"] == len(written)
    # without a number the answer ends by itself or where there is no room
    _, answer = letters.ask("/v1/chat/completions", CHAT)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == letters.engine.room
    parts = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    _, answer = letters.ask("/v1/chat/completions", {"messages": parts, "max_completion_tokens": 1, "tools": []})
    assert answer["choices"][0]["message"]["content"] == "a"


def test_logprobs_of_a_chat(letters: Running):
    body = CHAT | {"max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    _, answer = letters.ask("/v1/chat/completions", body)
    first = answer["choices"][0]["logprobs"]["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("a", -0.5, [97])
    assert [(one["token"], one["logprob"]) for one in first["top_logprobs"]] == [("a", -0.5), ("b", -1.5)]


@pytest.mark.parametrize("extra", [{}, {"logprobs": 1}, {"echo": True}, {"echo": True, "logprobs": 1}, {"n": 2}])
def test_a_stream_is_the_whole_answer_in_pieces(letters: Running, extra: dict):
    body = {"prompt": ["ab", "m"], "max_tokens": 8, "stop": ["gh"]} | extra
    _, whole = letters.ask("/v1/completions", body)
    events = letters.events("/v1/completions", body | {"stream_options": {"include_usage": True}})
    *pieces, last = events
    assert last["choices"] == [] and last["usage"] == whole["usage"] and len({event["id"] for event in events}) == 1
    for index, choice in enumerate(whole["choices"]):
        own = [event["choices"][0] for event in pieces if event["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert [piece["finish_reason"] for piece in own][-1] == choice["finish_reason"] and len(own) > 3
        assert all(piece["finish_reason"] is None for piece in own[:-1])
        if "logprobs" in extra:
            for name, wanted in choice["logprobs"].items():
                assert [value for piece in own for value in (piece["logprobs"] or {}).get(name, [])] == wanted


def test_a_stream_of_a_chat(letters: Running):
    events = letters.events("/v1/chat/completions", CHAT | {"max_tokens": 3})
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""} and "".join(d.get("content", "") for d in deltas) == "abc"
    assert events[0]["object"] == "chat.completion.chunk" and events[-1]["choices"][0]["finish_reason"] == "length"


def test_who_and_how(letters: Running):
    status, models = letters.ask("/v1/models")
    assert status == 200 and [model["id"] for model in models["data"]] == ["letters"]
    assert models["data"][0]["max_model_len"] == letters.engine.room
    assert letters.ask("/v1/models/letters")[1]["id"] == "letters" and letters.ask("/v1/models/other")[0] == 404
    assert letters.ask("/health") == (200, {"status": "ok"})
    assert letters.ask("/tokenize", {"prompt": "ab"})[1]["tokens"] == [97, 98]
    assert letters.ask("/detokenize", {"tokens": [97, 98, 256]}) == (200, {"prompt": "ab"})
    status, info = letters.ask("/tokenizer_info")
    assert (status, info["eos_token"], info["bos_token"], info["pad_token"]) == (200, "<|endoftext|>", None, None)
    assert "<|im_start|>" in info["chat_template"]


BAD = [
    ("/v1/completions", b"{", 400, None, "not JSON"),
    ("/v1/completions", b"[1]", 400, None, "JSON object"),
    ("/v1/completions", b"\xff{}", 400, None, "not JSON"),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400, None, "not JSON"),
    ("/v1/completions", b"[" * 100_000, 400, None, "not JSON"),
    ("/v1/completions", b'{"prompt": "a \\ud800"}', 400, None, "half a character"),
    ("/v1/completions", b'{"\\uDC00": 1}', 400, None, "half a character"),
    ("/v1/completions", {}, 400, "prompt", "missing"),
    ("/v1/completions", {"prompt": ""}, 400, "prompt", "not empty"),
    ("/v1/completions", {"prompt": []}, 400, "prompt", "not empty"),
    ("/v1/completions", {"prompt": [1, "a"]}, 400, "prompt", "not empty"),
    ("/v1/completions", {"prompt": [True]}, 400, "prompt", "not empty"),
    ("/v1/completions", {"prompt": [257]}, 400, "prompt", "257"),
    ("/v1/completions", {"prompt": "a" * 64}, 400, "prompt", "room"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 64}, 400, "prompt", "room"),
    ("/v1/completions", {"prompt": "a" * 65, "max_tokens": 0, "echo": True, "logprobs": 1}, 400, "prompt", "room"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "1 or more"),
    ("/v1/completions", {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens", "whole"),
    ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature", "from 0"),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature", "number"),
    ("/v1/completions", {"prompt": "a", "top_p": 2}, 400, "top_p", "from 0 to 1"),
    ("/v1/completions", {"prompt": "a", "n": 0}, 400, "n", "1 or more"),
    ("/v1/completions", {"prompt": "a", "n": 1000}, 400, "n", "at most 256"),
    ("/v1/completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs", "20"),
    ("/v1/completions", {"prompt": "a", "stop": 5}, 400, "stop", "list"),
    ("/v1/completions", {"prompt": "a", "stop": [5]}, 400, "stop", "texts"),
    ("/v1/completions", {"prompt": "a", "stop_token_ids": [999]}, 400, "stop_token_ids", "999"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "token id"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"5": "x"}}, 400, "logit_bias", "number"),
    ("/v1/completions", {"prompt": "a", "min_tokens": 5, "max_tokens": 2}, 400, "min_tokens", "more than"),
    ("/v1/completions", {"prompt": "a", "stream": "yes"}, 400, "stream", "true or false"),
    ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
    ("/v1/completions", {"prompt": "a", "best_of": 3}, 400, "best_of", "not offered"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix", "not offered"),
    ("/v1/completions", {"prompt": "a", "temprature": 1}, 400, "temprature", "no field"),
    ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "model", "letters"),
    ("/v1/chat/completions", {}, 400, "messages", "list"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages", "list"),
    ("/v1/chat/completions", {"messages": ["x"]}, 400, "messages", "objects"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages", "content"),
    ("/v1/chat/completions", {"messages": [{"role": 5, "content": "x"}]}, 400, "messages", "role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "<|im_end|>"}]}, 400, "messages", "forge"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages",
        "text",
    ),
    ("/v1/chat/completions", CHAT | {"top_logprobs": 2}, 400, "top_logprobs", "logprobs"),
    ("/v1/chat/completions", CHAT | {"tools": [{}]}, 400, "tools", "not offered"),
    ("/tokenize", {"prompt": 5}, 400, "prompt", "text"),
    ("/detokenize", {"tokens": ["x"]}, 400, "tokens", "ids"),
    ("/nowhere", {}, 404, None, "nothing"),
    ("/v1/completions", None, 405, None, "method"),
]


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "word"), BAD, ids=[str(number) for number in range(len(BAD))]
)
def test_a_bad_request_is_one_line_that_names_its_field(letters: Running, path, body, status, param, word):
    found, answer = letters.ask(path, body)
    error = answer["error"]
    assert (found, error["param"]) == (status, param) and word in error["message"], answer
    assert "\n" not in error["message"] and error["type"] == "invalid_request_error"
    # and the server goes on
    assert letters.ask("/health")[0] == 200


def test_an_address_that_another_has_is_told_before_a_model_is_read(letters: Running):
    request = ServeRequest(ModelSource(Path("nowhere")), port=letters.port)
    with pytest.raises(UserError, match=f"cannot serve at --host 127.0.0.1 --port {letters.port}: .*; give another"):
        serve(request, fake_model(FakeEngine()).configuration)


def test_without_a_template_there_is_no_chat():
    with running(FakeEngine(), chat=False) as found:
        status, answer = found.ask("/v1/chat/completions", CHAT)
        assert status == 400 and "no chat template" in answer["error"]["message"] and answer["error"]["param"] is None
        assert found.ask("/tokenizer_info")[1]["chat_template"] is None


def test_logits_that_are_not_finite_are_an_error_and_the_server_lives():
    with running(FakeEngine()) as found:
        status, answer = found.ask("/v1/completions", {"prompt": "!"})
        assert status == 500 and "diverged" in answer["error"]["message"]
        assert answer["error"]["type"] == "server_error"
        assert found.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})[1]["choices"][0]["text"] == "b"
