"""The token cache: what it holds, when it is made anew, and two processes that make it at once."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import jaxtron.data.text as text
from jaxtron.config import UserError
from jaxtron.data.text import open_tokens
from jaxtron.data.tokenizers import ByteTokenizer


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    paths[0].write_text("first ")
    paths[1].write_text("sécond")
    return paths


class WideTokenizer(ByteTokenizer):
    """Ids beyond 16 bits."""

    vocab_size = 70_000
    fingerprint = "wide"

    def encode(self, text):
        return super().encode(text) + np.int64(69_000)


def test_documents_are_followed_by_their_end(files, tmp_path):
    stream = open_tokens(files, tokenizer=ByteTokenizer(), cache_directory=tmp_path / "cache")
    assert stream.tokens.tolist() == [*b"first ", 256, *"sécond".encode(), 256]
    assert stream.tokens.dtype == np.uint16


def test_characters_share_one_vocabulary_and_have_no_ends(files, tmp_path):
    for _ in range(2):  # made, then read from the cache
        stream = open_tokens(files, tokenizer=None, cache_directory=tmp_path / "cache")
        assert stream.tokenizer.vocab_size == len(set("first sécond"))
        assert stream.tokenizer.decode(stream.tokens) == "first sécond"


def test_large_vocabularies_take_32_bits(files, tmp_path):
    stream = open_tokens(files, tokenizer=WideTokenizer(), cache_directory=tmp_path / "cache")
    assert stream.tokens.dtype == np.uint32
    assert stream.tokens[0] == 69_000 + ord("f")


def test_the_cache_is_reused_until_something_changes(files, tmp_path, monkeypatch):
    written = []
    write_tokens = text._write_tokens
    monkeypatch.setattr(text, "_write_tokens", lambda *arguments: written.append(1) or write_tokens(*arguments))
    cache = tmp_path / "cache"
    first = open_tokens(files, tokenizer=ByteTokenizer(), cache_directory=cache)
    again = open_tokens(files, tokenizer=ByteTokenizer(), cache_directory=cache)
    assert len(written) == 1 and again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(first.tokens, again.tokens)
    os.utime(files[0], ns=(0, 0))
    touched = open_tokens(files, tokenizer=ByteTokenizer(), cache_directory=cache)
    assert len(written) == 2 and touched.fingerprint == first.fingerprint
    files[0].write_text("other ")
    changed = open_tokens(files, tokenizer=ByteTokenizer(), cache_directory=cache)
    assert len(written) == 3 and changed.fingerprint != first.fingerprint
    open_tokens(files, tokenizer=None, cache_directory=cache)
    assert len(written) == 4


def test_a_failure_half_way_leaves_nothing_behind(files, tmp_path):
    files[1].write_bytes(b"bad \xff")
    with pytest.raises(UserError, match="two.txt is not UTF-8 text: byte 0xff at offset 4"):
        open_tokens(files, tokenizer=ByteTokenizer(), cache_directory=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_writers_that_race_all_get_the_whole_entry(files, tmp_path, monkeypatch):
    """Every thread has found no entry, and written its own, before any of them publishes."""
    barrier = threading.Barrier(4)
    publish, streams = text._publish, []
    monkeypatch.setattr(text, "_publish", lambda *arguments: barrier.wait(20) is None or publish(*arguments))

    def run():
        streams.append(open_tokens(files, tokenizer=ByteTokenizer(), cache_directory=tmp_path / "cache"))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [stream.tokens.tolist() for stream in streams] == [[*b"first ", 256, *"sécond".encode(), 256]] * 4
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_two_processes_at_once_share_one_entry(tmp_path):
    (tmp_path / "text").write_text("to be or not to be\n" * 100_000)
    program = (
        "import sys; from jaxtron.data.config import DataConfig; from jaxtron.data.dataset import open_data; "
        "print(open_data(DataConfig(path=sys.argv[1], cache_directory=sys.argv[2]), seed=0).fingerprint)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "text"), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert printed[0] == printed[1] != ""
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_damaged_entry_is_reported(files, tmp_path):
    open_tokens(files, tokenizer=ByteTokenizer(), cache_directory=tmp_path / "cache")
    (tokens,) = (tmp_path / "cache").glob(f"*/{text.TOKENS_FILE}")
    tokens.write_bytes(b"123")
    with pytest.raises(UserError, match=r"is damaged \(tokens.bin has 3 bytes, not 30\); delete that folder"):
        open_tokens(files, tokenizer=ByteTokenizer(), cache_directory=tmp_path / "cache")
    (tokens.parent / text.DESCRIPTION_FILE).unlink()
    with pytest.raises(UserError, match="is damaged .*; delete that folder and start again"):
        open_tokens(files, tokenizer=ByteTokenizer(), cache_directory=tmp_path / "cache")


def test_an_unwritable_cache_directory_is_one_clear_line(files, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the token cache in .*file/cache: .*; set --data.cache_directory"):
        open_tokens(files, tokenizer=ByteTokenizer(), cache_directory=tmp_path / "file" / "cache")
