"""SentencePiece models and tiktoken ranks: made here small, read as a user names them."""

import base64
import sys

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public as openai_public

from jaxtron.config import UserError
from jaxtron.data.tokenizer_models import ENCODING_NAMES, PATTERNS, SentencePieceTokenizer, TiktokenTokenizer
from jaxtron.data.tokenizers import Tokenizer, load_tokenizer
from tests.support.tokenizer_files import write_model, write_ranks

EVERY_BYTE = "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
TEXT = "to be or not to be: Grüße 世界 🙂"


def test_sentencepiece(tmp_path):
    tokenizer = load_tokenizer(str(write_model(tmp_path / "m.model")))
    assert isinstance(tokenizer, SentencePieceTokenizer) and isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and len(ids) < len(TEXT.encode()) and ids.max() < tokenizer.vocab_size == 320
    # the library's usual ids: unknown 0, begin 1, end 2; none of the first two is put before a text
    assert (tokenizer.end_of_document, tokenizer.pad) == (2, None) and not {0, 1, 2} & set(ids.tolist())
    assert tokenizer.decode(np.array([*ids, 2, 999, -1])) == TEXT
    batch = tokenizer.encode_batch([TEXT, "", "to"])
    assert [row.tolist() for row in batch] == [ids.tolist(), [], tokenizer.encode("to").tolist()]


def test_sentencepiece_ends_and_pads(tmp_path):
    padded = write_model(tmp_path / "padded.model", pad_id=3, user_defined_symbols=["<stop>"])
    assert (SentencePieceTokenizer(padded).end_of_document, SentencePieceTokenizer(padded).pad) == (2, 3)
    named = SentencePieceTokenizer(padded, end_of_document="<stop>")
    assert named.decode(np.array([named.end_of_document])) == "" and named.end_of_document == 4
    assert named.fingerprint != SentencePieceTokenizer(padded).fingerprint
    # a pad that is asked for as the end of documents is no pad any more
    assert SentencePieceTokenizer(padded, end_of_document="<pad>").pad is None
    assert SentencePieceTokenizer(write_model(tmp_path / "no.model", eos_id=-1)).end_of_document is None
    with pytest.raises(UserError, match="has no token '<nothing>'; set the end of document to one of its 320 pieces"):
        SentencePieceTokenizer(padded, end_of_document="<nothing>")


def test_tiktoken_ranks(tmp_path):
    path = write_ranks(tmp_path / "r.tiktoken")
    tokenizer = load_tokenizer(str(path))
    assert isinstance(tokenizer, TiktokenTokenizer) and isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and len(ids) < len(TEXT.encode())
    num_ranks = path.read_bytes().count(b"\n")
    assert (tokenizer.end_of_document, tokenizer.vocab_size, tokenizer.pad) == (num_ranks, num_ranks + 1, None)
    assert tokenizer.decode(np.array([*ids, num_ranks, 9999, 2**40, -1])) == TEXT
    # text that spells the end of a document is text
    assert num_ranks not in tokenizer.encode("<|endoftext|>") and tokenizer.decode(tokenizer.encode("<|x|>")) == "<|x|>"
    batch = tokenizer.encode_batch([TEXT, "", "to"])
    assert [row.tolist() for row in batch] == [ids.tolist(), [], tokenizer.encode("to").tolist()]


def test_the_pattern_after_the_name_decides_the_words(tmp_path):
    """`1234` falls into threes with the newer patterns, and not with GPT-2's."""
    path = write_ranks(tmp_path / "r.tiktoken", merges=(b"12", b"34", b"1234"))
    lengths = {name: len(load_tokenizer(f"{path}:{name}").encode("1234")) for name in PATTERNS}
    assert lengths == {"gpt2": 1, "cl100k_base": 3, "o200k_base": 3}
    assert len({load_tokenizer(f"{path}:{name}").fingerprint for name in PATTERNS}) == 3
    assert load_tokenizer(str(path)).fingerprint == load_tokenizer(f"{path}:cl100k_base").fingerprint
    with pytest.raises(UserError, match="unknown pattern 'gpt5' after .*r.tiktoken; give one of gpt2 cl100k_base"):
        load_tokenizer(f"{path}:gpt5")


def test_names_and_patterns_are_tiktoken_s(monkeypatch):
    assert ENCODING_NAMES == frozenset(tiktoken.list_encoding_names())
    # what would be downloaded, which the patterns do not depend on
    for name in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, name, lambda *arguments, **options: {})
    assert {name: getattr(openai_public, name)()["pat_str"] for name in PATTERNS} == PATTERNS


def test_an_encoding_that_cannot_be_downloaded(tmp_path, monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="cannot download its encoding cl100k_base .ConnectionError.; connect once"):
        load_tokenizer("cl100k_base")


def test_an_encoding_that_is_there(monkeypatch):
    """The library's own, made without the network: ids above its ranks are its special tokens."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    special = {"<|endoftext|>": 300, "<|other|>": 301}
    encoding = tiktoken.Encoding("gpt2", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.end_of_document, tokenizer.vocab_size) == (300, 302)
    assert load_tokenizer("gpt2", end_of_document="<|other|>").end_of_document == 301
    assert tokenizer.decode(np.array([97, 280, 300, 98])) == "ab"
    with pytest.raises(UserError, match="gpt2 has no token '<s>'; set the end of document to one of <|endoftext|>"):
        load_tokenizer("gpt2", end_of_document="<s>")


def test_files_that_are_no_tokenizer(tmp_path):
    (tmp_path / "m.model").write_text("rubbish")
    with pytest.raises(UserError, match="m.model is not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "m.model"))
    for name in ("none.model", "none.tiktoken"):
        with pytest.raises(UserError, match=f"cannot read the tokenizer .*{name}: No such file"):
            load_tokenizer(str(tmp_path / name))
    for content, message in (
        ("YQ== 0\nrubbish\n", "line 2 is b'rubbish', not the base64 of a token and its rank"),
        ("YQ== x\n", "line 1 is"),
        ("", "has no ranks"),
        # whole lines, but not all: cut where a line ends
        ("YQ== 0\nYg== 1\n", "damaged: it has no rank for the byte 0x00"),
        (EVERY_BYTE + "dG8= 255\n", "damaged: b'to' has the rank 255, which b'\\\\xff' has"),
        (EVERY_BYTE + "dG8= -1\n", "damaged: b'to' has the rank -1;"),
        (EVERY_BYTE + "YQ== 300\n", "damaged: line 257 has b'a' again"),
    ):
        (tmp_path / "r.tiktoken").write_text(content)
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(tmp_path / "r.tiktoken"))


@pytest.mark.parametrize(("name", "package"), [("m.model", "sentencepiece"), ("gpt2", "tiktoken")])
def test_a_missing_package_is_named(name, package, tmp_path, monkeypatch):
    (tmp_path / "m.model").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'{name} needs the package {package} .* pip install "jaxtron\[{package}\]"'):
        load_tokenizer(name)
