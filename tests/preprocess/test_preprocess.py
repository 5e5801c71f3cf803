"""The command that makes token files: formats, naming, order, sentences, merging and inspecting."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

import jaxtron.preprocess.inputs as inputs
from jaxtron.data.megatron.gpt_index import order_digest
from jaxtron.data.megatron.indexed import IndexedReader
from jaxtron.data.tokenizers import HuggingFaceTokenizer
from tests.support.token_runs import (
    END,
    documents_of,
    run,
    same_files,
    texts,
    texts_of,
    write_bpe,
    write_lines,
    write_parquet,
)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few lines, so that small files make many."""
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 500)
    monkeypatch.setattr(inputs, "PARQUET_ROWS", 3)


def test_as_a_user_types_it(tmp_path):
    """Two workers in processes of their own; a file is a key's pair, and nothing else is left."""
    given = texts(300)
    bpe = write_bpe(tmp_path / "tokenizer.json", given)
    write_lines(tmp_path / "in.jsonl", given)
    flags = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer", str(bpe), "--append-eod"]
    command = [sys.executable, "-m", "jaxtron", "preprocess", *flags, "--output", str(tmp_path / "out")]
    done = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "300 documents" in done.stdout and f"written   {tmp_path / 'out'}.bin and .idx" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.bin", "out.idx", "tokenizer.json"]
    tokenizer = HuggingFaceTokenizer(bpe)
    assert documents_of(tmp_path / "out") == [[[*tokenizer.encode(text), tokenizer.end_of_document]] for text in given]
    assert IndexedReader(str(tmp_path / "out")).dtype == np.uint16
    assert run(*flags, "--output", tmp_path / "one").code == 0
    assert same_files(tmp_path / "out", tmp_path / "one")


def test_bytes_of_the_format(tmp_path):
    """Megatron's layout, written out: two documents and an empty one between them, without ends of documents."""
    write_lines(tmp_path / "in.jsonl", ["abc", "", "de"])
    assert run("--input", tmp_path / "in.jsonl", "--tokenizer", "bytes", "--output", tmp_path / "out").code == 0
    assert (tmp_path / "out.bin").read_bytes() == np.array([*b"abcde"], "<u2").tobytes()
    expected = b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + bytes([8]) + np.array([2, 4], "<u8").tobytes()
    expected += np.array([3, 2], "<i4").tobytes() + np.array([0, 6], "<i8").tobytes()
    assert (tmp_path / "out.idx").read_bytes() == expected + np.array([0, 1, 1, 2], "<i8").tobytes()


def test_an_empty_document_gets_no_end(tmp_path):
    write_lines(tmp_path / "in.jsonl", ["", "a", ""])
    run("--input", tmp_path / "in.jsonl", "--tokenizer", "bytes", "--output", tmp_path / "out", "--append-eod")
    assert documents_of(tmp_path / "out") == [[], [[97, END]], []]


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_every_format_gives_the_same_files(suffix, tmp_path, small_chunks):
    given = texts(80)
    write_lines(tmp_path / f"in.jsonl{suffix}", given)
    run("--input", tmp_path / f"in.jsonl{suffix}", "--tokenizer", "bytes", "--output", tmp_path / "out")
    assert texts_of(tmp_path / "out") == given


def test_frames_and_members_one_after_the_other(tmp_path):
    """What `cat a.zst b.zst` gives, and the same with gzip; also lines that end in the middle of a frame."""
    for suffix in (".gz", ".bz2", ".xz", ".zst"):
        first = write_lines(tmp_path / f"a.jsonl{suffix}", ["one", "two"]).read_bytes()
        second = write_lines(tmp_path / f"b.jsonl{suffix}", ["three"]).read_bytes()
        (tmp_path / f"c.jsonl{suffix}").write_bytes(first + second)
        run("--input", tmp_path / f"c.jsonl{suffix}", "--tokenizer", "bytes", "--output", tmp_path / f"out{suffix}")
        assert texts_of(tmp_path / f"out{suffix}") == ["one", "two", "three"]


def test_parquet_by_row_groups(tmp_path, small_chunks):
    given = texts(50)
    write_parquet(tmp_path / "in.parquet", {"id": list(range(50)), "text": given}, row_group_size=7)
    run("--input", tmp_path / "in.parquet", "--tokenizer", "bytes", "--output", tmp_path / "out")
    assert texts_of(tmp_path / "out") == given


def test_files_in_the_order_given_and_folders_in_path_order(tmp_path, small_chunks):
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "x.txt").write_text("one document\nof two lines\r\n", newline="")
    (folder / ".hidden").write_text("no")
    (folder / "empty.md").touch()
    write_lines(folder / "a.json", ["from the folder"])
    last = write_lines(tmp_path / "0.jsonl", ["first"])
    run("--input", last, folder, last, "--tokenizer", "bytes", "--output", tmp_path / "out")
    assert texts_of(tmp_path / "out") == [
        "first",
        "from the folder",
        "one document\nof two lines\r\n",
        "",
        "first",
    ]


def test_the_last_line_needs_no_end_and_a_line_may_be_longer_than_a_chunk(tmp_path, small_chunks):
    given = ["a" * 5000, "b", "c" * 499, "d" * 2000]
    path = write_lines(tmp_path / "in.jsonl", given)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n").rstrip())
    run("--input", path, "--tokenizer", "bytes", "--output", tmp_path / "out")
    assert texts_of(tmp_path / "out") == given


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_several_keys_are_named_as_megatron_names_them(kind, tmp_path):
    rows = {"text": ["a", "b"], "title": ["T", ""]}
    path = tmp_path / f"in.{kind}"
    if kind == "parquet":
        write_parquet(path, rows)
    else:
        write_lines(path, [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)])
    flags = ("--input", path, "--tokenizer", "bytes", "--output", tmp_path / "out")
    done = run(*flags, "--json-key", "text", "title")
    assert "out_text_document.bin and .idx" in done.out and not (tmp_path / "out.bin").exists()
    assert documents_of(tmp_path / "out_text_document") == [[[97]], [[98]]]
    assert documents_of(tmp_path / "out_title_document") == [[[84]], []]
    run(*flags, "--json-key", "text", "title", "--split-sentences")
    assert (tmp_path / "out_title_sentence.idx").exists()
    run(*flags, "--json-key", "title")
    assert documents_of(tmp_path / "out") == [[[84]], []]


def test_a_sentence_is_a_sequence_and_the_end_follows_the_last(tmp_path):
    write_lines(tmp_path / "in.jsonl", ["Dr. Smith paid $3.5. He left!\n\nWhy? ", " \n", "One"])
    flags = ("--input", tmp_path / "in.jsonl", "--tokenizer", "bytes", "--split-sentences", "--append-eod")
    assert run(*flags, "--output", tmp_path / "out").code == 0
    sentences = ["Dr. Smith paid $3.5.", "He left!", "Why?"]
    assert documents_of(tmp_path / "out") == [
        [[*sentences[0].encode()], [*sentences[1].encode()], [*sentences[2].encode(), END]],
        [],
        [[*b"One", END]],
    ]


def test_sentences_of_a_language_and_of_a_long_paragraph(tmp_path):
    given = ["Das ist z. B. gut. Ja.", "word " * 20_000]
    write_lines(tmp_path / "in.jsonl", given)
    flags = (
        "--input",
        tmp_path / "in.jsonl",
        "--tokenizer",
        "bytes",
        "--split-sentences",
        "--output",
        tmp_path / "out",
    )
    assert run(*flags, "--language", "de").code == 0
    short, long = documents_of(tmp_path / "out")
    assert [bytes(sentence).decode() for sentence in short] == ["Das ist z. B. gut.", "Ja."]
    assert " ".join(bytes(sentence).decode() for sentence in long) == given[1].strip() and len(long) > 1


def test_several_workers_give_the_bytes_of_one(tmp_path, small_chunks):
    given = [text for text in texts(600)] + ["", "x" * 4000]
    write_lines(tmp_path / "in.jsonl", given)
    flags = ("--input", tmp_path / "in.jsonl", "--tokenizer", "bytes", "--append-eod")
    assert run(*flags, "--output", tmp_path / "three", "--workers", "3").code == 0
    assert run(*flags, "--output", tmp_path / "one").code == 0
    assert same_files(tmp_path / "three", tmp_path / "one") and texts_of(tmp_path / "one") == given


def test_large_vocabularies_take_32_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtron.data.tokenizers.ByteTokenizer.vocab_size", 65_500)
    write_lines(tmp_path / "in.jsonl", ["ab"])
    run("--input", tmp_path / "in.jsonl", "--tokenizer", "bytes", "--output", tmp_path / "out")
    assert (tmp_path / "out.bin").read_bytes() == np.array([97, 98], "<i4").tobytes()


def test_merging_is_reading_one_after_the_other(tmp_path):
    a, b = texts(5), ["", *texts(4, seed=1)]
    for name, given in (("a", a), ("b", b), ("all", [*b, *a, *b])):
        write_lines(tmp_path / f"{name}.jsonl", given)
        run("--input", tmp_path / f"{name}.jsonl", "--tokenizer", "bytes", "--output", tmp_path / name)
    names = [tmp_path / name for name in "bab"]
    assert run("merge", "--input", *names, "--output", tmp_path / "merged").code == 0
    assert same_files(tmp_path / "merged", tmp_path / "all")
    done = run("merge", "--input", tmp_path / "a", tmp_path / "nowhere", "--output", tmp_path / "merged", "--overwrite")
    assert done.code == 2 and "nowhere.idx" in done.err and done.err.count("\n") == 1
    assert same_files(tmp_path / "merged", tmp_path / "all")


def test_inspecting(tmp_path):
    write_lines(tmp_path / "in.jsonl", ["Grüße", "", "ab"])
    run("--input", tmp_path / "in.jsonl", "--tokenizer", "bytes", "--output", tmp_path / "out", "--append-eod")
    done = run("inspect", tmp_path / "out", "--json", "--tokenizer", "bytes", "--tokens", 9)
    found = json.loads(done.out)
    sizes = {kind: (tmp_path / f"out.{kind}").stat().st_size for kind in ("bin", "idx")}
    assert found == {
        "prefix": str(tmp_path / "out"),
        "bin_bytes": sizes["bin"],
        "idx_bytes": sizes["idx"],
        "dtype": "uint16",
        "multimodal": False,
        "documents": 3,
        "empty_documents": 1,
        "sequences": 2,
        "tokens": 11,
        "shortest_sequence": 3,
        "longest_sequence": 8,
        "first_ids": [*"Grüße".encode(), END, 97],
        "first_text": "Grüßea",
    }
    text = run("inspect", tmp_path / "out").out
    assert "documents         3\n" in text and "first text" not in text
    (tmp_path / "out.bin").write_bytes(b"12")
    damaged = run("inspect", tmp_path / "out")
    assert damaged.code == 2 and "out.bin ends too early" in damaged.err and damaged.out == ""


def test_the_order_that_is_printed_is_the_library_s(tmp_path):
    write_lines(tmp_path / "in.jsonl", texts(40))
    run("--input", tmp_path / "in.jsonl", "--tokenizer", "bytes", "--output", tmp_path / "out", "--append-eod")
    flags = ("--sequence-length", 16, "--samples", 0, "--seed", 1234, "--split", "9,1,0")
    printed = json.loads(run("order", tmp_path / "out", *flags, "--json").out)
    expected = order_digest(str(tmp_path / "out"), sequence_length=16, samples=0, seed=1234, split="9,1,0")
    assert printed == expected and printed["document_index"]["length"] == 36
    shuffled = np.arange(36, dtype=np.int64)
    np.random.RandomState(1234).shuffle(shuffled)
    assert printed["document_index"]["sha256"] == hashlib.sha256(shuffled.astype("<i8").tobytes()).hexdigest()
    assert printed["sample_index"]["sha256"] in run("order", tmp_path / "out", *flags).out


def test_a_list_given_in_parts_is_whole(tmp_path):
    one, two = (write_lines(tmp_path / f"{name}.jsonl", [name]) for name in ("one", "two"))
    run("--input", one, "--tokenizer", "bytes", "--input", two, "--output", tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["one", "two"]
