"""Text in pieces: joined it is the text of all tokens, never with a broken character, and cut before what stops it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxtron.data.tokenizers import ByteTokenizer, CharacterTokenizer, Tokenizer, load_tokenizer
from jaxtron.generate.settings import SamplingSettings
from jaxtron.generate.streaming import REPLACEMENT, AnswerStream, StopSearch, TextStream, hidden_tokens
from tests.support.tokenizer_files import SAMPLE, write_model, write_ranks

TEXT = "to be, or not to be 🙂日本 — naïve e\u0301 👩‍👩‍👧!\n\n  the  mind"
# of one tokenizer's tokens as of another's
KINDS = ("bytes", "characters", "gpt2", "metaspace", "wordpiece", "sentencepiece", "tiktoken")


def make(kind: str, folder: Path) -> Tokenizer:
    """A small tokenizer of a kind, with a token for the end of a document where it has one."""
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "characters":
        return CharacterTokenizer(TEXT)
    if kind == "sentencepiece":
        return load(write_model(folder / "small.model"))
    if kind == "tiktoken":
        return load(write_ranks(folder / "small.tiktoken"))
    path = folder / f"{kind}.json"
    if kind == "gpt2":
        made = FastTokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>", "<|turn|>"], show_progress=False
        )
        made.train_from_iterator([SAMPLE, TEXT], trainer)
    elif kind == "metaspace":
        # as Llama 2's: bytes for what has no piece, the first space dropped
        pieces = [
            "<unk>",
            "<s>",
            "</s>",
            *(f"<0x{byte:02X}>" for byte in range(256)),
            "▁",
            *"tobernhmidc",
            "▁to",
            "▁be",
        ]
        made = FastTokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, [], byte_fallback=True))
        made.add_special_tokens(["<s>", "</s>"])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        pieces = ["[UNK]", "to", "be", "##s", "not", "##ed", ",", "!", "mind", "n", "'", "t"]
        made = FastTokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece(cleanup=True)
    made.save(str(path))
    return load(path)


def load(path: Path) -> Tokenizer:
    tokenizer = load_tokenizer(str(path))
    assert tokenizer is not None
    return tokenizer


def pieces_of(tokenizer: Tokenizer, ids: list[int], before: list[int] | None = None) -> list[str]:
    stream = TextStream(tokenizer, before=None if before is None else np.array(before, np.int64))
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return make(request.param, tmp_path_factory.mktemp("tokenizer"))


def test_pieces_of_a_text_are_the_text_and_end_in_whole_characters(tokenizer: Tokenizer):
    ids = tokenizer.encode(TEXT if tokenizer.vocab_size > 20 else "to be mind, not").tolist()
    pieces = pieces_of(tokenizer, ids)
    whole = tokenizer.decode(np.array(ids, np.int64))
    assert "".join(pieces) == whole and len([piece for piece in pieces if piece]) > 3
    assert not any(REPLACEMENT in piece for piece in pieces)
    if tokenizer.vocab_size > 20:
        assert whole == TEXT or tokenizer.fingerprint.startswith(("tokenizer.json", "sentencepiece"))


def test_pieces_of_any_tokens_are_the_text_of_all(tokenizer: Tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        # half of the time few tokens, so that bytes that go together meet
        few = [rng.randrange(tokenizer.vocab_size) for _ in range(6)]
        ids = [rng.choice(few) if rng.random() < 0.5 else rng.randrange(tokenizer.vocab_size) for _ in range(30)]
        if any(token < 259 for token in ids) and "�" in tokenizer.decode(np.array(ids)) and has_byte_runs(tokenizer):
            continue
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(np.array(ids, np.int64)), ids


def has_byte_runs(tokenizer: Tokenizer) -> bool:
    """Whether one byte that is no character makes its whole run unreadable, what was fine before it too."""
    return tokenizer.token_id("<0xE6>") is not None and tokenizer.fingerprint.startswith("tokenizer.json")


def test_a_character_of_several_bytes_comes_whole():
    ids = list("🙂日".encode())
    assert pieces_of(ByteTokenizer(), ids) == ["", "", "", "🙂", "", "", "日", ""]


def test_bytes_that_are_no_character_come_out_in_the_end():
    assert pieces_of(ByteTokenizer(), list(b"a\xf0\x9f")) == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]
    # or as soon as it is certain that they are none
    assert pieces_of(ByteTokenizer(), list(b"\xff\xff\xff\xff\xffa"))[:6] == ["", "", "", "�", "�", "���a"]
    assert "".join(pieces_of(ByteTokenizer(), [255] * 100)) == "�" * 100


def test_nothing_is_held_for_ever(tmp_path: Path):
    tokenizer = make("metaspace", tmp_path)
    byte = tokenizer.token_id("<0xFF>")
    assert byte is not None
    pieces = pieces_of(tokenizer, [byte] * 200)
    assert "".join(pieces) == "�" * 200 and max(map(len, pieces)) < 40


def test_text_before_a_byte_that_is_none_stays_as_it_was(tmp_path: Path):
    tokenizer = make("metaspace", tmp_path)
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "日".encode() + b"\xff"]
    ids.append(tokenizer.token_id("t"))
    # the tokenizer itself makes all of the run unreadable
    assert tokenizer.decode(np.array(ids)) == "����t"
    assert "".join(pieces_of(tokenizer, ids)) == "日�t"


def test_a_text_that_goes_on_from_a_prompt_keeps_its_space(tmp_path: Path):
    tokenizer = make("sentencepiece", tmp_path)
    prompt, rest = "to be or", " not to be"
    ids, before = tokenizer.encode(prompt + rest).tolist(), tokenizer.encode(prompt).tolist()
    assert ids[: len(before)] == before
    assert "".join(pieces_of(tokenizer, ids[len(before) :], before)) == rest
    assert "".join(pieces_of(tokenizer, ids[len(before) :])) == rest.lstrip()


def test_a_prompt_that_ends_inside_a_character():
    start, end = "🙂".encode()[:2], "🙂".encode()[2:]
    assert "".join(pieces_of(ByteTokenizer(), list(end + b"a"), list(b"x" + start))) in ("🙂a", "��a")


@pytest.mark.parametrize(
    ("stops", "pieces", "out", "found"),
    [
        (("END",), ["a", "bE", "N", "Dc"], ["a", "b", "", ""], "END"),
        (("END",), ["aE", "N", "X", "END"], ["a", "", "ENX", ""], "END"),
        (("END",), ["EEN", "D"], ["E", ""], "END"),
        (("aab",), ["aa", "ab"], ["", "a"], "aab"),
        (("b", "abc"), ["a", "bc"], ["", ""], "abc"),
        (("b", "abc"), ["a", "b", "c"], ["", "a", ""], "b"),
        (("abc", "b"), ["abc"], [""], "abc"),
        (("\n\n",), ["x\n", "y\n", "\nz"], ["x", "\ny", ""], "\n\n"),
        ((), ["a", "b"], ["a", "b"], None),
        (("日本",), ["日", "日", "本"], ["", "日", ""], "日本"),
    ],
)
def test_a_stop_may_lie_over_pieces_and_nothing_of_it_is_given(stops, pieces, out, found):
    search = StopSearch(stops)
    assert [search.push(piece) for piece in pieces] == out and search.found == found
    assert search.push("more") == ("" if found else "more") and search.finish() == ""


def test_any_cut_of_a_text_gives_what_stands_before_the_first_stop():
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices("ab", k=20))
        stops = tuple("".join(rng.choices("ab", k=rng.randrange(2, 6))) for _ in range(3))
        search, out, rest = StopSearch(stops), "", text
        while rest and search.found is None:
            size = rng.randrange(1, 4)
            out, rest = out + search.push(rest[:size]), rest[size:]
        out += search.finish()
        places = [text.find(stop) for stop in stops if stop in text]
        # a stop that is whole ends the text at once, though one that began before it may have come later
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        assert out == text if not places else text.startswith(out) and len(out) <= min(ends), (text, stops, out)
        assert not any(stop in out for stop in stops)


def answer(tokens: list[int], *, room: int = 100, **settings) -> tuple[str, AnswerStream]:
    stream = AnswerStream(ByteTokenizer(), SamplingSettings(**settings), room=room)
    text = ""
    for token in tokens:
        text += stream.push(token)
        if stream.finish_reason is not None:
            break
    return text, stream


def test_what_ends_an_answer():
    text = list(b"hello world")
    assert answer([*text, 256, 65], eos_token_ids=(256,))[0] == "hello world"
    ended = answer([*text, 256, 65], eos_token_ids=(256,))[1]
    assert (ended.finish_reason, ended.num_tokens) == ("stop", 12)
    assert answer([*text, 256, 65], eos_token_ids=(256,), ignore_eos=True)[0] == "hello worldA"
    assert answer(text, stop_token_ids=(ord("w"),))[0] == "hello "
    cut, ended = answer(text, stop=("o w", "zzz"))
    assert (cut, ended.finish_reason, ended.num_tokens) == ("hell", "stop", 7)
    cut, ended = answer(text, max_new_tokens=3)
    assert (cut, ended.finish_reason, ended.num_tokens) == ("hel", "length", 3)
    assert answer(text, room=5)[0] == "hello" and answer(text, room=5)[1].finish_reason == "length"
    # the last token that there is room for may end it as well
    assert answer([*text[:2], 256], room=3, eos_token_ids=(256,))[1].finish_reason == "stop"
    # a beginning of a stop that never came is text, and so is half of a character
    assert answer(list(b"abc\xf0"), room=4, stop=("bcd", "c�d"))[0] == "abc�"
    assert answer(list(b"ab"), stop=("b",), max_new_tokens=2)[1].finish_reason == "stop"


def test_no_stop_before_the_least_number_of_tokens():
    assert answer(list(b"abcabcabc"), stop=("bc",), min_new_tokens=4)[0] == "abca"
    assert answer(list(b"abcabcabc"), stop=("bc",), min_new_tokens=3)[0] == "abca"
    assert answer(list(b"abcabcabc"), stop=("bc",), min_new_tokens=2)[0] == "ab" + "ca"


def test_special_tokens_are_no_text(tmp_path: Path):
    tokenizer = make("gpt2", tmp_path)
    turn = tokenizer.token_id("<|turn|>")
    assert turn is not None and hidden_tokens(tokenizer) == {turn, tokenizer.end_of_document}
    assert json.loads((tmp_path / "gpt2.json").read_text())["added_tokens"]
    ids = [*tokenizer.encode("to be").tolist(), turn, *tokenizer.encode(" or").tolist()]
    for hidden, wanted in ((frozenset(), "to be<|turn|> or"), (hidden_tokens(tokenizer), "to be or")):
        stream = AnswerStream(tokenizer, SamplingSettings(), room=len(ids), hidden=hidden)
        assert "".join(map(stream.push, ids)) == wanted
