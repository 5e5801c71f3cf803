"""Paths as a user may give them: forms of text, runs and caches beside it, blends, and the word that is wrong."""

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from jaxtron.config import UserError, dump
from jaxtron.data.chat.conversations import read_conversations
from jaxtron.data.config import DataConfig
from jaxtron.data.dataset import open_data
from jaxtron.data.megatron.indexed import IndexedWriter
from jaxtron.run.configuration import Configuration

LINES = b'{"text": "one"}\n{"text": "two"}\n'
TALK = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Short names."""
    monkeypatch.chdir(tmp_path)


def make(*path, **settings):
    given = {"path": list(path), "sequence_length": 4, "cache_directory": "cache"} | settings
    return open_data(DataConfig.model_validate(given), seed=0, train_samples=12)


def text_of(data):
    """All that is trained on."""
    return "".join(data.tokenizer.decode(data.train[index].tokens) for index in range(len(data.train)))


def write_tokens(prefix, first, documents=30):
    """Documents of five ids that no other file has, each ended."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            writer.add_item([first, first + 1, first + 2, first + 3, first + 4, 256])
            writer.end_document()


def firsts(source):
    """Which files the samples of a source are from."""
    return {int(token) // 10 * 10 for index in range(len(source)) for token in source[index].tokens if token < 256}


@pytest.mark.parametrize(
    "name", ["a.jsonl", "A.JSONL", "a.jsonlines", "a.jsonl.1", "part-00000", "a.json", "a.jsonl.gz"]
)
def test_json_lines_are_not_trained_on_as_text(name):
    Path(name).write_bytes(gzip.compress(LINES * 9) if name.endswith(".gz") else LINES * 9)
    with pytest.raises(UserError, match=f"{name} is JSON lines, not text: --data.format chat .*jaxtron.preprocess"):
        make(name)
    # unless one says so
    assert '{"text": "one"}' in text_of(make(name, format="text"))


def test_what_only_looks_like_json_lines_is_text():
    """A repository of code has objects in a line of their own."""
    Path("code").mkdir()
    for name, content in (
        ("package.json", '{"name": "x"}\n'),
        ("pretty.json", '{\n "a": 1\n}\n'),
        ("b.js.map", '{"version": 3}\n'),
        ("c.py", '{"a": 1}\nprint(1)\nprint(2)\n'),
    ):
        Path("code", name).write_text(content)
    assert text_of(make("code", validation_fraction=0.1)).startswith('{"version": 3}\n{"a": 1}')


def test_parquet_and_archives_are_named():
    Path("a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="a.parquet is Parquet, not text: make token files"):
        make("a.parquet")
    Path("a.zip").write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match="a.zip is a zip archive, which is not read; unpack it"):
        make("a.zip")


def test_text_is_decompressed_and_its_mark_is_no_text():
    text = "to be or not to be that is the question"
    Path("a.txt.xz").write_bytes(lzma.compress(text.encode()))
    Path("a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert text_of(make("a.txt.xz")) == text_of(make("a.txt")) == text[: len(text_of(make("a.txt")))] != ""


def test_conversations_with_a_mark_and_in_every_form():
    line = json.dumps(TALK).encode()
    Path("a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
    Path("b.JSONL.XZ").write_bytes(lzma.compress(line + b"\n" + line + b"\n"))
    numbers = [[number for number, _ in read_conversations(Path(name))] for name in ("a.jsonl", "b.JSONL.XZ")]
    assert numbers == [[1, 3], [1, 2]]
    for content, message in ((b"[\n {}\n]", "a.json line 1 is the start of one JSON value"), (b"PAR1", "Parquet")):
        Path("a.json").write_bytes(content)
        Path("part").write_bytes(content)
        with pytest.raises(UserError, match=message):
            list(read_conversations(Path("part" if message == "Parquet" else "a.json")))


def test_a_run_and_a_cache_inside_the_data_are_no_data(caplog):
    """As a second run, or the first that is resumed, meets them."""
    Path("data").mkdir()
    Path("data/a.txt").write_text("to be or not to be " * 9)
    first = make("data", cache_directory="data/cache")
    Path("data/runs/one/checkpoints/4").mkdir(parents=True)
    Path("data/runs/one/checkpoints/4/state").write_bytes(b"\0\1")
    Path("data/runs/one/config.yaml").write_text(dump(Configuration()))
    Path("data/runs/one/metrics.jsonl").write_text('{"step": 1}\n')
    again = make("data", cache_directory="data/cache")
    assert again.fingerprint == first.fingerprint and len(again.train) == len(first.train)
    assert "data: a training run, " in caplog.text and "data/runs/one" in caplog.text
    # as a shell writes data/*
    assert (
        make(*map(str, sorted(Path("data").iterdir())), cache_directory="data/cache").fingerprint == first.fingerprint
    )
    # another cache, for the old one is still there
    assert make("data", cache_directory="elsewhere").fingerprint == first.fingerprint
    with pytest.raises(UserError, match="data/runs/one is a training run, not data; give the folder of its text"):
        make("data/runs/one")
    # a folder that only has such names is data
    Path("data/runs/one/config.yaml").write_text("a: 1\n")
    Path("data/runs/one/metrics.jsonl").unlink()
    Path("data/runs/one/checkpoints/4/state").write_bytes(b"text")
    assert make("data", cache_directory="data/cache").fingerprint != first.fingerprint


def test_a_folder_of_token_files_tells_their_prefix():
    Path("corpus").mkdir()
    write_tokens("corpus/a", 10)
    with pytest.raises(
        UserError, match="has token files, not text; --data.path takes their prefix, such as .*corpus/a$"
    ):
        make("corpus")


@pytest.mark.parametrize(
    ("path", "train", "validation"),
    [
        (["2024", "b", "c"], {10, 20, 30}, {10, 20, 30}),
        (["./2024", "b"], {10, 20}, {10, 20}),
        (["0.5", "2024", "0.5", "b"], {10, 20}, {10, 20}),
        (["2024.0", "b"], {20}, {20}),
        (["b", "2024"], {10, 20}, {10, 20}),
        (["inf", "b"], {20, 40}, {20, 40}),
        ([[0.5, "2024"], [0.5, "c"]], {10, 30}, {10, 30}),
    ],
    ids=str,
)
def test_a_blend_is_read_in_one_way(path, train, validation):
    for name, first in (("2024", 10), ("b", 20), ("c", 30), ("inf", 40)):
        write_tokens(name, first)
    data = make(*path, split="8,2,0")
    assert (firsts(data.train), firsts(data.validation)) == (train, validation)


def test_a_blend_of_parts_is_read_in_the_same_way():
    for name, first in (("2024", 10), ("2025", 20), ("c", 30)):
        write_tokens(name, first)
    parts = {"train": [[0.5, "2024"], [0.5, "2025"]], "validation": ["0.5", "2024", "0.5", "2025"], "test": ["c"]}
    settings = {"sequence_length": 4, "cache_directory": "cache", **parts}
    data = open_data(DataConfig.model_validate(settings), seed=0, train_samples=12)
    assert [firsts(source) for source in (data.train, data.validation, data.test)] == [{10, 20}, {10, 20}, {30}]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (["0.7", "alpha", "0.3", "bravox"], "data.path: no token files bravox.bin and bravox.idx; did you mean bravo?"),
        (["0.7", "alphax", "0.3", "bravo"], "data.path: no token files alphax.bin and alphax.idx; did you mean alpha?"),
        (["0.7", "alphax", "0.3", "bravox"], "data.path: no token files alphax.bin"),
        (["alpha", "bravox", "bravo"], "no token files bravox.bin and bravox.idx; did you mean bravo?"),
        (
            ["folder/alpha", "folder/zulu"],
            "no token files folder/zulu.bin and folder/zulu.idx; give the prefix of a pair",
        ),
        (["0.7", "alpha", "x", "bravo"], "data.path: 'x' is not a weight, but others of the data paths are"),
        (["0.7", "alpha", "0", "bravo"], "numbers above 0; leave 0 out"),
        (["alpha", "text.txt"], "data.path: text.txt is no token file; make a pair with python -m jaxtron.preprocess"),
        (["0.5", "text.txt"], "data.path: only token files have weights, and text.txt is none; leave 0.5 out, or make"),
        (["0.7", "alpha", "0.3", "text.txt"], "data.path: text.txt is no token file"),
        (["0.7", "alpha", "0.3"], "data.path: 0.3 at the end is a weight that has no prefix after it; give weights"),
        (["alpha", "0.7", "bravo", "0.3"], "data.path: 0.3 at the end is a weight that has no prefix after it"),
        (["alpha", "0.7", "bravo"], "data.path: 0.7 is a weight, but not every prefix has one before it"),
        (["2024"], "no such file or folder 2024"),
        (["alpha", "lonely.bin"], "lonely.bin has no lonely.idx beside it; make a pair"),
        (["7", "bravo"], "data.path: 7 is a weight here, and the prefix of 7.idx; write ./7 for the prefix or 7.0000"),
        (["text.txt", "textx.txt"], "no such file or folder textx.txt"),
        ([], "--data.path is empty"),
    ],
    ids=str,
)
def test_the_word_that_is_wrong_is_named(path, message):
    Path("folder").mkdir()
    for name in ("alpha", "bravo", "7", "folder/alpha"):
        write_tokens(name, 10)
    for name in ("text.txt", "lonely.bin"):
        Path(name).write_text("some text")
    with pytest.raises(UserError) as error:
        make(*path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_weights_are_for_token_files_only():
    Path("a.txt").write_text("to be or not to be " * 9)
    for form in ("text", "chat"):
        with pytest.raises(
            UserError, match="data.path: only token files have weights, and a.txt is none; leave 0.7 out"
        ):
            make("0.7", "a.txt", format=form)
    # a folder may be named like a number
    Path("2024").mkdir()
    Path("2024/b.txt").write_text("that is the question " * 9)
    assert "question" in text_of(make("2024", "a.txt"))


def test_a_file_given_twice_is_read_twice_and_said(caplog):
    Path("a.txt").write_text("to be or not to be " * 9)
    assert len(make("a.txt", "a.txt").train) > len(make("a.txt").train)
    assert "given more than once, and read as often" in caplog.text


def test_documents_without_an_end_are_said(caplog):
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("to be to be " * 9)
    words = {"to": 0, "be": 1, "[UNK]": 2}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    Path("tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}})
    )
    make("a.txt", "b.txt", tokenizer="tokenizer.json")
    assert "tokenizer.json has no end of document, so documents follow one another unmarked" in caplog.text
