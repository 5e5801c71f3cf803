"""What preprocess takes a file for and leaves out, what it refuses before any work, and what it never replaces."""

import fcntl
import io
import json
import os
import tarfile
import zipfile

import pyarrow
import pytest

import jaxtron.preprocess.inputs as inputs
import jaxtron.preprocess.work as work
from jaxtron import interrupts
from jaxtron.curate.__main__ import main as curate_main
from jaxtron.data.megatron.indexed import IndexedWriter
from tests.support.token_runs import (
    COMPRESS,
    documents_of,
    run,
    same_files,
    texts,
    texts_of,
    write_lines,
    write_parquet,
)

LINES = b'{"text": "one"}\n{"text": "two"}\n'
MARK = b"\xef\xbb\xbf"


def short(value):
    """Names of tests that do not hold compressed bytes."""
    return f"{len(value)} of them" if isinstance(value, bytes | list) else str(value)[:40]


def tokens(tmp_path, *arguments, output="out"):
    """The command's end, with the bytes tokenizer."""
    return run(*arguments, "--tokenizer", "bytes", "--output", tmp_path / output)


@pytest.mark.parametrize(
    ("name", "content", "kind", "documents"),
    [
        ("A.JSONL", LINES, "JSON lines (by name)", ["one", "two"]),
        ("a.jsonlines", LINES, "JSON lines (by name)", ["one", "two"]),
        ("a.ndjson", LINES, "JSON lines (by name)", ["one", "two"]),
        ("a.Json.GZ", COMPRESS[".gz"](LINES), "JSON lines (by name)", ["one", "two"]),
        ("a.jsonl.BZ2", COMPRESS[".bz2"](LINES), "JSON lines (by name)", ["one", "two"]),
        ("a.jsonl.xz", COMPRESS[".xz"](LINES), "JSON lines (by name)", ["one", "two"]),
        ("part-00000", LINES, "JSON lines (by content)", ["one", "two"]),
        ("a.jsonl.1", LINES, "JSON lines (by content)", ["one", "two"]),
        ("part-00000", b'{"text": "one"}', "JSON lines (by content)", ["one"]),
        ("part-00000", MARK + b'\n{"text": "o"}\r\n\r\n{"text": "t"}\r\n', "JSON lines (by content)", ["o", "t"]),
        ("part-00000", b'{"text": "' + b"a" * 100_000 + b'"}\n' + LINES, "JSON lines (by content)", None),
        ("part-00000", COMPRESS[".zst"](LINES), "JSON lines (by content)", ["one", "two"]),
        ("part-00000.gz", COMPRESS[".gz"](LINES), "JSON lines (by content)", ["one", "two"]),
        ("A.TXT", LINES, "text, one document a file (by name)", [LINES.decode()]),
        ("notes.md", b"{not json}\n", "text, one document a file (by name)", ["{not json}\n"]),
        ("README", b"one\ntwo\n", "text, one document a file (by content)", ["one\ntwo\n"]),
        ("a.js.map", b'{"version": 3}\n', "text, one document a file (by content)", ['{"version": 3}\n']),
        ("a.py", b'{"a": 1}\nx = 1\ny = 2\n', "text, one document a file (by content)", None),
        ("a.txt", MARK + b"one\r\n", "text, one document a file (by name)", ["one\r\n"]),
        ("a.txt.bz2", COMPRESS[".bz2"](b"one"), "text, one document a file (by name)", ["one"]),
    ],
    ids=short,
)
def test_what_a_file_is_taken_for(name, content, kind, documents, tmp_path):
    (tmp_path / name).write_bytes(content)
    done = tokens(tmp_path, "--input", tmp_path / name)
    assert done.code == 0 and f"read as   {kind}: {name}\n" in done.out, done
    assert documents is None or texts_of(tmp_path / "out") == documents


def test_parquet_by_any_name(tmp_path):
    for name, by in (("a.PARQUET", "name"), ("part-00000", "content")):
        path = write_parquet(tmp_path / name, {"text": ["one", "two"]})
        done = tokens(tmp_path, "--input", path, output=name + "-out")
        assert f"Parquet (by {by}): {name}" in done.out and texts_of(tmp_path / f"{name}-out") == ["one", "two"]


def test_a_row_that_is_not_utf8_is_one_damaged_row(tmp_path):
    """Parquet does not check its strings; a null and a whole string beside one that is cut keep their meaning."""
    cut = pyarrow.array([b"\xc3", None, b"b"], "binary").view("string")
    path = write_parquet(tmp_path / "in.parquet", {"text": cut})
    assert f"{path} row 1: 'text' is a binary value, not a string" in tokens(tmp_path, "--input", path).err
    done = tokens(tmp_path, "--input", path, "--skip-damaged")
    assert f"{path} row 2: 'text' is a null" in done.err and texts_of(tmp_path / "out") == ["b"]


def test_the_key_tells_a_single_line(tmp_path):
    (tmp_path / "part-00000").write_text('{"body": "one"}\n')
    assert "JSON lines (by content)" in tokens(tmp_path, "--input", tmp_path / "part-00000", "--json-key", "body").out
    assert texts_of(tmp_path / "out") == ["one"]


def archive(ending):
    file = io.BytesIO()
    if ending == "zip":
        with zipfile.ZipFile(file, "w") as written:
            written.writestr("a", "text")
    else:
        with tarfile.open(fileobj=file, mode="w") as written:
            written.addfile(tarfile.TarInfo("a"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ZIP", b"", "is a zip archive, which is not read; unpack it"),
        ("part-00000", archive("zip"), "is a zip archive"),
        ("part-00000", archive("tar"), "is a tar archive"),
        ("a.tar.gz", b"", "is a tar archive"),
        ("a.jsonl.lz4", b"", "is compressed with lz4, which is not read; decompress it, or use .gz, .bz2, .xz or .zst"),
        ("a.parquet.gz", b"", "is Parquet compressed once more"),
        ("a.txt", "one".encode("utf-16"), "UTF-16 text; convert it to UTF-8 or go on without such entries: --skip-dam"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "at byte 0 of the line; convert it to UTF-8 or go on without"),
        ("a.txt", b"a\0b", "binary: a zero byte at offset 1"),
        ("a.txt", MARK + b"a\xff", "not UTF-8 text: byte 0xff at offset 4"),
        (
            "a.txt",
            b"version https://git-lfs.github.com/spec/v1\n",
            "a pointer of Git LFS and not the file itself; fetch",
        ),
        ("a.json", b'[\n {"text": "a"}\n]\n', "one JSON value over several lines, not an object a line; "),
        (
            "a.jsonl",
            b'{"messages": []}\n',
            "no key 'text', only 'messages'; train on conversations without preprocess, by --data.format chat, set "
            "--json-key to the right key, or go on without such entries: --skip-damaged",
        ),
        ("a.jsonl", b"to be\n", "char 0); mend it or go on without such entries: --skip-damaged"),
        ("a.jsonl", b"", "no document in --input"),
        ("a.jsonl", b"\n \r\n", "no document in --input"),
        ("a.txt", b"", "error: the text is empty in --input "),
        ("part-00000", COMPRESS[".gz"](b""), "error: the text is empty in --input "),
    ],
    ids=short,
)
def test_what_is_not_read_is_named_and_nothing_is_left(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    done = tokens(tmp_path, "--input", tmp_path / name, output="new/folder/out")
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done
    # a text has no keys
    assert " key" not in done.err or name == "a.jsonl"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_nothing_is_left_of_documents_without_text(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"text": "a", "title": ""}, {"text": "", "title": ""}])
    done = tokens(tmp_path, "--input", path, "--json-key", "text", "title")
    assert done.code == 2 and "no token under the key 'title' in all 2 documents" in done.err
    write_lines(path, [1, 2])
    done = tokens(tmp_path, "--input", path, "--skip-damaged")
    assert done.code == 2 and "(2 damaged entries left out): nothing is written" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["text", "title"], "notes.txt is text (by its name), which is one document and has no keys; leave it out"),
        (["text", "a/b"], "--json-key 'a/b' cannot be part of a file's name; give it alone, with its own --output"),
        (["text", ""], "--json-key '' cannot be part of a file's name"),
        (["text", "t" * 240], "has a name of more than 255 bytes; shorten it"),
    ],
)
def test_keys_that_cannot_be_are_refused_before_any_work(keys, message, tmp_path, monkeypatch):
    monkeypatch.setattr(work.WorkFolder, "__enter__", lambda folder: pytest.fail("work was begun"))
    write_lines(tmp_path / "in.jsonl", [dict.fromkeys(keys, "a")])
    (tmp_path / "notes.txt").write_text("notes")
    given = [tmp_path / "in.jsonl", *([tmp_path / "notes.txt"] if "title" in keys else [])]
    done = tokens(tmp_path, "--input", *given, "--json-key", *keys)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1


def test_one_key_may_have_any_name(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"a/b": "text"}])
    assert tokens(tmp_path, "--input", path, "--json-key", "a/b").code == 0 and texts_of(tmp_path / "out") == ["text"]


@pytest.fixture
def folder(tmp_path):
    """Three documents."""
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "in.jsonl", texts(3))
    return tmp_path / "data"


def test_outputs_in_the_input_folder_are_no_input(folder):
    """Token files, another command's unfinished work, a curation, and what a writer that was killed left."""
    assert tokens(folder, "--input", folder, output="one").code == 0
    (folder / "two.0123456789ab.partial").mkdir()
    (folder / "two.0123456789ab.partial" / "journal.json").write_text("{}")
    for name in ("two_text_document.bin", f"three.idx.{'0' * 32}.partial"):
        (folder / name).write_bytes(b"\0\1")
    assert curate_main(["--input", str(folder), "--output", str(folder / "clean"), "--steps", "exact"]) == 0
    done = tokens(folder, "--input", folder, output="again")
    for what in ("token files", "unfinished work", "a curation"):
        assert f"left out of {folder}: {what}, " in done.out
    assert texts_of(folder / "again") == texts(3)
    # as a shell writes folder/*
    assert tokens(folder, "--input", *sorted(folder.iterdir()), output="every").code == 0
    assert texts_of(folder / "every") == texts(3)
    # what is asked for by its own name is read, or said to be none
    assert tokens(folder, "--input", folder / "clean" / "documents", output="third").code == 0
    assert texts_of(folder / "third") == texts(3)
    refused = tokens(folder, "--input", folder / "clean", output="fourth")
    assert f"is a curation, not data; its documents are in {folder / 'clean' / 'documents'}" in refused.err


def test_after_an_interruption_the_same_command_goes_on_in_the_input_folder(folder, monkeypatch):
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 1)
    append, calls = work.WorkFolder.append, []

    def interrupted(written, keys, **changes):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(written, keys, **changes)

    monkeypatch.setattr(work.WorkFolder, "append", interrupted)
    assert tokens(folder, "--input", folder).code == 130
    (partial,) = folder.glob("*.partial")
    again = tokens(folder, "--input", folder / "in.jsonl", partial)
    assert f"left out: unfinished work, {partial}\n" in again.out and "going on after 2 documents" in again.out
    assert texts_of(folder / "out") == texts(3) and not list(folder.glob("*.partial"))


def test_a_curation_in_the_input_folder_goes_on(folder, capsys, monkeypatch):
    arguments = ["--input", str(folder), "--output", str(folder / "clean"), "--steps", "exact"]
    monkeypatch.setattr("jaxtron.curate.write.decide", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        curate_main([*arguments])
    monkeypatch.undo()
    assert curate_main([*arguments]) == 0 and "going on with the curation" in capsys.readouterr().err
    assert curate_main([*arguments]) == 0 and "nothing to do" in capsys.readouterr().err


def test_a_folder_of_somebody_elses_work_is_not_taken_for_a_curation(tmp_path):
    """A work folder is removed in the end."""
    path = write_lines(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "mine" / "work").mkdir(parents=True)
    (tmp_path / "mine" / "work" / "thesis.txt").write_text("three years")
    arguments = ["--input", str(path), "--output", str(tmp_path / "mine"), "--steps", "exact"]
    with pytest.raises(ValueError, match="mine is not empty and holds no curation; choose another --output"):
        curate_main([*arguments])
    assert (tmp_path / "mine" / "work" / "thesis.txt").read_text() == "three years"
    (tmp_path / "mine" / "work" / "thesis.txt").rename(tmp_path / "mine" / "work" / "settings.json.0.partial")
    assert curate_main([*arguments]) == 0


@pytest.mark.parametrize("ending", ["", ".GZ", ".bz2", ".xz", ".zst"])
def test_a_curation_keeps_the_form_of_its_input(ending, tmp_path):
    content = COMPRESS.get(ending.lower(), bytes)(LINES + LINES)
    (tmp_path / f"part-00000{ending}").write_bytes(content)
    arguments = ["--input", str(tmp_path / f"part-00000{ending}"), "--output", str(tmp_path / "clean")]
    assert curate_main([*arguments, "--steps", "exact"]) == 0
    written = (tmp_path / "clean" / "documents" / f"00000-part-00000{ending}").read_bytes()
    assert written[:3] == content[:3] and (ending or written == LINES)
    assert tokens(tmp_path, "--input", tmp_path / "clean" / "documents").code == 0
    assert texts_of(tmp_path / "out") == ["one", "two"]


def test_a_corpus_is_replaced_only_when_asked(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", ["old"])
    assert tokens(tmp_path, "--input", path).code == 0
    before = {name: (tmp_path / name).read_bytes() for name in ("out.bin", "out.idx")}
    write_lines(path, ["newer"])
    refused = tokens(tmp_path, "--input", path)
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert f"{tmp_path}/out.bin and {tmp_path}/out.idx are there already; choose another --output" in refused.err
    merged = run("merge", "--input", tmp_path / "out", "--output", tmp_path / "out")
    assert merged.code == 2 and "replace with --overwrite" in merged.err
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == before
    assert tokens(tmp_path, "--input", path, "--overwrite").code == 0 and texts_of(tmp_path / "out") == ["newer"]
    # one of the two is something to lose as well
    (tmp_path / "out.idx").unlink()
    assert "out.bin is there already" in tokens(tmp_path, "--input", path).err
    assert tokens(tmp_path, "--input", path, "--overwrite").code == 0
    doubled = run("merge", "--input", tmp_path / "out", tmp_path / "out", "--output", tmp_path / "out", "--overwrite")
    assert doubled.code == 0 and texts_of(tmp_path / "out") == ["newer", "newer"]


def test_an_output_that_appears_meanwhile_is_kept_and_so_is_the_work(tmp_path, monkeypatch):
    """Two commands with other settings do not share a work folder; the later one finds the pair of the first."""
    path = write_lines(tmp_path / "in.jsonl", ["a"])
    save = work.WorkFolder.save

    def save_late(folder):
        save(folder)
        (tmp_path / "out.bin").write_text("the other's")

    monkeypatch.setattr(work.WorkFolder, "save", save_late)
    assert "out.bin is there already" in tokens(tmp_path, "--input", path).err
    assert (tmp_path / "out.bin").read_text() == "the other's" and list(tmp_path.glob("*.partial"))
    monkeypatch.undo()
    again = tokens(tmp_path, "--input", path, "--overwrite")
    assert "going on after 1 document " in again.out and texts_of(tmp_path / "out") == ["a"]


def test_a_command_that_died_while_naming_its_pair_goes_on(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "in.jsonl", ["a"])
    replace = os.replace

    def dying(source, target):
        if str(target).endswith("out.idx"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(work.os, "replace", dying)
    assert tokens(tmp_path, "--input", path).code == 130 and (tmp_path / "out.bin").exists()
    monkeypatch.undo()
    assert tokens(tmp_path, "--input", path).code == 0 and texts_of(tmp_path / "out") == ["a"]


def test_an_input_is_never_the_output(tmp_path):
    (tmp_path / "out.bin").write_text("a text")
    refused = tokens(tmp_path, "--input", tmp_path / "out.bin", "--overwrite")
    assert refused.code == 2 and "would replace its own input" in refused.err
    assert (tmp_path / "out.bin").read_text() == "a text"


def test_merging_nothing_is_an_error(tmp_path):
    with IndexedWriter(str(tmp_path / "none"), "uint16"):
        pass
    done = run("merge", "--input", tmp_path / "none", "--output", tmp_path / "out")
    assert done.code == 2 and "no token in --input" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none.bin", "none.idx"]


def test_a_lock_that_is_held_leaves_the_work_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 1)
    path = write_lines(tmp_path / "in.jsonl", ["a", 3])
    assert tokens(tmp_path, "--input", path).code == 2
    (held,) = tmp_path.glob("out.*.partial")
    with (held / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is writing" in tokens(tmp_path, "--input", path).err
    assert json.loads((held / "journal.json").read_text())["documents"] == 1


def test_links_are_followed_once_and_repeats_are_said(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "far").mkdir()
    first = write_lines(tmp_path / "data" / "a.jsonl", ["a"])
    write_lines(tmp_path / "far" / "b.jsonl", ["b"])
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "data")
    done = tokens(tmp_path, "--input", tmp_path / "data", first)
    assert f"given more than once, and read as often: {first}\n" in done.out
    assert texts_of(tmp_path / "out") == ["a", "b", "a"]
    (tmp_path / "data" / "broken").symlink_to(tmp_path / "nowhere")
    assert "broken is a link to" in tokens(tmp_path, "--input", tmp_path / "data", output="other").err


def test_a_folder_that_cannot_be_read_is_an_error(folder, monkeypatch):
    (folder / "closed").mkdir()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    done = tokens(folder, "--input", folder)
    assert done.code == 2 and "closed: Permission denied; make it readable or leave it out" in done.err


def test_keys_with_files_of_several_forms(tmp_path):
    rows = [{"text": "a", "title": "T"}]
    write_lines(tmp_path / "in.jsonl", rows)
    write_parquet(tmp_path / "in.parquet", {"text": ["b"], "title": ["U"]})
    done = tokens(tmp_path, "--input", tmp_path / "in.jsonl", tmp_path / "in.parquet", "--json-key", "text", "title")
    assert done.code == 0 and documents_of(tmp_path / "out_title_document") == [[[84]], [[85]]]
    (tmp_path / "in.txt").write_text("c")
    # one key only: a text is its own document
    given = [tmp_path / name for name in ("in.jsonl", "in.parquet", "in.txt")]
    assert tokens(tmp_path, "--input", *given, "--json-key", "title").code == 0
    assert texts_of(tmp_path / "out") == ["T", "U", "c"]
    assert not same_files(tmp_path / "out", tmp_path / "out_title_document")


def test_home_and_either_of_two_files_name_a_pair(tmp_path, monkeypatch):
    """A shell expands neither `--output=~/out` nor a quoted `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "in.jsonl", ["one"])
    assert run("--input", "~/in.jsonl", "--tokenizer", "bytes", "--output=~/out").code == 0
    for prefix in ("~/out", "~/out.bin", tmp_path / "out.idx"):
        assert json.loads(run("inspect", prefix, "--json").out)["prefix"] == str(tmp_path / "out")
    flags = "--sequence-length 2 --samples 0 --seed 1 --split 1,0,0".split()
    assert run("order", "~/out.idx", *flags).out == run("order", tmp_path / "out", *flags).out != ""
    assert run("merge", "--input", "~/out", "~/out.bin", "--output=~/both.bin").code == 0
    assert tokens(tmp_path, "--input", "~/in.jsonl", output="other.idx").code == 0
    assert texts_of(tmp_path / "both") == ["one", "one"] and texts_of(tmp_path / "other") == ["one"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [
        ".bin",
        ".bin",
        ".bin",
        ".idx",
        ".idx",
        ".idx",
        ".jsonl",
    ]
    # there is no such user
    assert "no such file or folder ~nobody-here/in" in tokens(tmp_path, "--input", "~nobody-here/in", output="x").err


def test_conversations_in_parquet_and_token_files_are_no_input(tmp_path):
    path = write_parquet(tmp_path / "in.parquet", {"messages": [["a"]]})
    assert "no column 'text', only messages; set --json-key, or train on conversations by --data.format chat" in (
        tokens(tmp_path, "--input", path).err
    )
    assert "'messages' is a list, not a string; train on conversations without preprocess" in (
        tokens(tmp_path, "--input", path, "--json-key", "messages").err
    )
    (tmp_path / "in.txt").write_text("one")
    assert tokens(tmp_path, "--input", tmp_path / "in.txt").code == 0
    for name in ("out.bin", "out.idx"):
        refused = tokens(tmp_path, "--input", tmp_path / name, output="again")
        what = (
            f"error: {tmp_path / name} is one of two token files, already tokenized; --data.path takes their prefix, "
        )
        assert refused.code == 2 and refused.err == f"{what}{tmp_path / 'out'}\n"


def test_what_is_kept_is_said_when_a_signal_ends_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 1)
    path = write_lines(tmp_path / "in.jsonl", ["a", "b"])
    append, said = work.WorkFolder.append, []
    monkeypatch.setattr("jaxtron.interrupts.say", said.append)

    def interrupted(written, keys, **changes):
        # as `interrupts` does when a signal comes
        for say in interrupts._state.last_words:
            say("interrupted")
        if written.journal.documents:
            raise KeyboardInterrupt
        append(written, keys, **changes)

    monkeypatch.setattr(work.WorkFolder, "append", interrupted)
    assert tokens(tmp_path, "--input", path).code == 130
    # only once there was something to keep
    (partial,) = tmp_path.glob("out.*.partial")
    assert said == [f"what is done is kept in {partial}; the same command goes on"]
