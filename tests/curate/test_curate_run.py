"""Whole curations from files to files: what goes, what stays, where it is written, and what ends a run."""

import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxtron.config import UserError, load
from jaxtron.curate import write as writing
from jaxtron.curate.__main__ import main as curate_main
from jaxtron.curate.config import Curation
from jaxtron.curate.engine import LocalEngine
from jaxtron.curate.run import curate

VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]


def document(seed, words=120):
    return " ".join(random.Random(seed).choices(VOCABULARY, k=words))


def near(text, seed, changes=1):
    """The text with some words in the middle replaced."""
    words = text.split()
    for place in random.Random(seed).sample(range(len(words)), changes):
        words[place] = "changed"
    return " ".join(words)


def write_lines(path, records):
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def run(output, *inputs, **settings):
    return curate(Curation(input=tuple(inputs), output=str(output), **settings))


def documents_of(output):
    found = []
    for path in sorted((output / "documents").iterdir()):
        content = path.read_bytes()
        found += [
            json.loads(line) for line in (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines()
        ]
    return found


def dropped_of(output):
    return [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]


def tree_of(output):
    """Every file's bytes but those of the report, which names its settings."""
    return {
        str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file() and p.name != "report.json"
    }


@pytest.fixture
def corpus(tmp_path):
    """Two files: 40 documents; then copies, near copies of copies, a short one, and two with a task's words."""
    first = [{"id": f"a{i}", "text": document(i), "more": [i]} for i in range(40)]
    task = " ".join(document(500, 20).split())
    second = [
        {"id": "copy", "text": document(3).upper() + "\n"},
        {"id": "near", "text": near(document(5), 1)},
        {"id": "nearer", "text": near(near(document(5), 1), 2)},
        {"id": "short", "text": "too short"},
        {"id": "task", "text": f"{document(600)} {task} {document(601)}"},
        {"id": "small", "text": f"{document(602, 25)} {task} {document(603, 25)}"},
        {"id": "last", "text": document(99)},
        {"id": "copy of near", "text": near(document(5), 1)},
    ]
    return (
        write_lines(tmp_path / "first.jsonl", first),
        write_lines(tmp_path / "second.jsonl.gz", second),
        write_lines(tmp_path / "task.jsonl", [{"text": task}]),
    )


STEPS = ("length", "exact", "near", "decontaminate")


def run_corpus(output, corpus, **settings):
    settings = {"steps": STEPS, "decontaminate": {"tasks": (corpus[2],)}} | settings
    return run(output, *corpus[:2], **settings)


def test_what_goes_is_listed_and_what_stays_is_as_it_was(corpus, tmp_path):
    report = run_corpus(tmp_path / "out", corpus)
    reasons = {entry["id"]: entry["reason"] for entry in dropped_of(tmp_path / "out")}
    assert reasons == {
        "copy": "exact",
        "near": "near",
        "nearer": "near",
        "short": "length.least",
        "task": "decontaminate.cut",
        "small": "decontaminate.least",
        "copy of near": "exact",
    }
    entries = {entry["id"]: entry for entry in dropped_of(tmp_path / "out")}
    assert entries["copy"]["keeper"] == {"file": corpus[0], "line": 4}
    # a copy of what went for another document names the one that stayed
    assert entries["near"]["keeper"] == entries["copy of near"]["keeper"] == {"file": corpus[0], "line": 6}
    assert (entries["short"]["file"], entries["short"]["line"], entries["short"]["detail"]) == (corpus[1], 4, 9)
    assert 0.8 <= entries["near"]["estimated_jaccard"] < 1
    # the lines of the first file are untouched, byte for byte
    assert (tmp_path / "out/documents/00000-first.jsonl").read_bytes() == Path(corpus[0]).read_bytes()
    kept = documents_of(tmp_path / "out")
    assert [record["id"] for record in kept[40:]] == ["task-0", "task-1", "last"]
    assert document(600).startswith(kept[40]["text"]) and document(601).endswith(kept[41]["text"])
    assert report["documents"] == 48 and report["kept"]["documents"] == 43 and report["cut"]["documents"] == 1
    assert report["dropped"]["near"]["documents"] == 2
    assert report["dropped"]["length.least"] == {"documents": 1, "bytes": 9}
    assert [file["documents"] for file in report["files"]] == [40, 8]
    assert report["examples"]["length.least"][0]["text"] == "too short"
    assert not (tmp_path / "out/work").exists()


def test_bytes_add_up(corpus, tmp_path):
    report = run_corpus(tmp_path / "out", corpus)
    dropped = sum(reason["bytes"] for reason in report["dropped"].values())
    assert report["bytes"] == report["kept"]["bytes"] + report["cut"]["bytes"] + dropped
    assert report["kept"]["bytes"] == sum(len(record["text"].encode()) for record in documents_of(tmp_path / "out"))


@pytest.mark.parametrize(
    "settings",
    [
        {"piece_bytes": 3000},
        {"group_documents": 20},
        {"steps": tuple(reversed(STEPS))},
        {"near": {"verify": "exact"}},
        {"workers": 2},
    ],
    ids=str,
)
def test_the_result_does_not_depend_on_how_the_work_is_shared_out(corpus, tmp_path, settings):
    run_corpus(tmp_path / "one", corpus)
    run_corpus(tmp_path / "two", corpus, **settings)
    assert documents_of(tmp_path / "one") == documents_of(tmp_path / "two")
    assert dropped_of(tmp_path / "one") == dropped_of(tmp_path / "two")
    if "piece_bytes" in settings:
        assert len(list((tmp_path / "two/documents").iterdir())) > 5
    else:
        assert tree_of(tmp_path / "one") == tree_of(tmp_path / "two")


def test_the_longest_stays_where_asked(tmp_path):
    text = document(1)
    records = [{"id": "a", "text": text}, {"id": "b", "text": text + " more words"}, {"id": "c", "text": text}]
    source = write_lines(tmp_path / "in.jsonl", records)
    run(tmp_path / "out", source, steps=("near",), near={"keep": "longest"})
    assert [record["id"] for record in documents_of(tmp_path / "out")] == ["b"]


def test_exact_duplicates_without_normalizing(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"text": "One  two"}, {"text": "one two"}, {"text": "one two"}])
    run(tmp_path / "out", source, steps=("exact",), exact={"normalize": False})
    assert [record["text"] for record in documents_of(tmp_path / "out")] == ["One  two", "one two"]


def pairs_at(jaccard, count):
    """Pairs of documents whose 5-word shingles have about this Jaccard index: a run of words in common."""
    words, documents = 404, []
    shared = round(2 * 400 * jaccard / (1 + jaccard))
    for seed in range(count):
        texts = [document(f"{seed} {side}", words).split() for side in "ab"]
        common = document(f"{seed} both", shared + 4).split()
        documents += [" ".join(common + text[: words - len(common)]) for text in texts]
    return documents


@pytest.mark.parametrize(("jaccard", "verify"), [(0.7, "exact"), (0.82, "exact"), (0.9, "estimate"), (0.6, "estimate")])
def test_planted_pairs_are_found_as_often_as_the_formula_says(tmp_path, jaccard, verify):
    count = 150
    texts = pairs_at(jaccard, count)
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    report = run(tmp_path / "out", source, steps=("near",), near={"verify": verify, "hashes": 64})
    bands, rows = report["near"]["bands"], report["near"]["rows"]
    expected = 1 - (1 - jaccard**rows) ** bands if jaccard >= 0.8 else 0.0
    found = report["dropped"].get("near", {"documents": 0})["documents"] / count
    # an estimate of 0.9 by 64 hashes is above 0.8 in 99.6 % of cases, one of 0.6 in 0.03 %
    assert abs(found - expected) <= 4 * (expected * (1 - expected) / count) ** 0.5 + 0.01


def test_a_chain_of_near_duplicates_keeps_one(tmp_path):
    texts = [document(1)]
    for seed in range(12):
        texts.append(near(texts[-1], seed, changes=1))
    random.Random(0).shuffle(texts)
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    run(tmp_path / "out", source, steps=("near",), near={"jaccard": 0.85, "miss_weight": 0.99, "verify": "exact"})
    assert [record["text"] for record in documents_of(tmp_path / "out")] == texts[:1]
    assert min(entry["estimated_jaccard"] for entry in dropped_of(tmp_path / "out")) < 0.85


def test_documents_without_words_are_like_no_other(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"text": "!"}, {"text": "?"}, {"text": ""}, {"text": "word"}])
    run(tmp_path / "out", source, steps=("near", "exact"))
    assert len(documents_of(tmp_path / "out")) == 4


def test_common_ngrams_are_left_alone_and_copies_do_not_make_them_common(tmp_path):
    task = document(900, 13)
    texts = [f"{document(i)} {task} {document(50 + i)}" for i in range(11)]
    tasks = write_lines(tmp_path / "task.jsonl", [{"text": task}])
    settings = {"steps": ("exact", "decontaminate"), "decontaminate": {"tasks": (tasks,), "max_count": 10}}
    often = write_lines(tmp_path / "often.jsonl", [{"text": text} for text in texts])
    report = run(tmp_path / "often", often, **settings)
    assert report["kept"]["documents"] == 11 and report["cut"]["documents"] == 0
    assert report["decontaminate"] == {"task_ngrams": 1, "found": 1, "left_alone_as_common": 1}
    copies = write_lines(tmp_path / "copies.jsonl", [{"text": text} for text in texts[:10] + texts[:10]])
    report = run(tmp_path / "copies", copies, **settings)
    assert report["cut"]["documents"] == 10 and report["dropped"]["exact"]["documents"] == 10


def test_documents_with_many_cuts_go(tmp_path):
    task = document(900, 13)
    text = " ".join(f"{document(i, 200)} {task}" for i in range(4))
    tasks = write_lines(tmp_path / "task.jsonl", [{"text": task}])
    source = write_lines(tmp_path / "in.jsonl", [{"text": text}, {"text": document(77)}])
    settings = {"tasks": (tasks,), "max_cuts": 3}
    report = run(tmp_path / "out", source, steps=("decontaminate",), decontaminate=settings)
    assert report["dropped"] == {"decontaminate.max_cuts": {"documents": 1, "bytes": len(text)}}
    report = run(tmp_path / "more", source, steps=("decontaminate",), decontaminate=settings | {"max_cuts": 4})
    assert report["kept"]["documents"] == 4 + 1


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty_input_is_an_error_and_leaves_nothing(tmp_path, content):
    (tmp_path / "in.jsonl").write_bytes(content)
    (tmp_path / "task.jsonl").write_text(json.dumps({"text": document(1)}))
    settings = {"tasks": (str(tmp_path / "task.jsonl"),)}
    with pytest.raises(UserError, match="no document in --input .*in.jsonl: nothing is written"):
        run(tmp_path / "out", str(tmp_path / "in.jsonl"), steps=(*STEPS, "quality"), decontaminate=settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "task.jsonl"]


def test_everything_may_go(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"text": "short"}] * 3)
    report = run(tmp_path / "out", source, steps=("length", "exact", "near"))
    assert report["kept"]["documents"] == 0 and report["dropped"]["length.least"]["documents"] == 3


def test_parquet_keeps_its_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    task = document(900, 13)
    texts = [document(1), document(1), "short", f"{document(2)} {task} {document(3)}", document(4)]
    table = pyarrow.table({"number": [1, 2, 3, 4, 5], "text": texts, "id": list("abcde")})
    parquet.write_table(table, tmp_path / "in.parquet")
    tasks = write_lines(tmp_path / "task.jsonl", [{"text": task}])
    settings = {"steps": STEPS, "decontaminate": {"tasks": (tasks,)}}
    run(tmp_path / "out", str(tmp_path / "in.parquet"), **settings)
    found = parquet.read_table(tmp_path / "out/documents/00000-in.parquet")
    assert found.schema == table.schema
    assert found.column("number").to_pylist() == [1, 4, 4, 5]
    assert texts[3].startswith(found.column("text")[1].as_py()) and texts[3].endswith(found.column("text")[2].as_py())
    assert [(e["id"], e["line"], e["reason"]) for e in dropped_of(tmp_path / "out")] == [
        ("b", 2, "exact"),
        ("c", 3, "length.least"),
        ("d", 4, "decontaminate.cut"),
    ]


def test_zstandard_goes_in_and_out(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    lines = "".join(json.dumps({"text": document(i % 2)}) + "\n" for i in range(3)).encode()
    (tmp_path / "in.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    run(tmp_path / "out", str(tmp_path / "in.jsonl.zst"), steps=("exact",))
    with zstandard.open(tmp_path / "out/documents/00000-in.jsonl.zst", "rb") as file:
        assert file.read() == b"\n".join(lines.splitlines()[:2]) + b"\n"


@pytest.mark.parametrize("piece_bytes", [1, 7, 40, 1000])
def test_pieces_hold_every_line_once(tmp_path, piece_bytes):
    # lines of many lengths, blank ones, and no end of the last
    records = [{"text": "x" * (i * 7 % 23), "id": i} for i in range(30)]
    (tmp_path / "in.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    run(tmp_path / "out", str(tmp_path / "in.jsonl"), steps=("length",), length={"least": 5}, piece_bytes=piece_bytes)
    assert [r["id"] for r in documents_of(tmp_path / "out")] == [r["id"] for r in records if len(r["text"]) >= 5]
    for entry in dropped_of(tmp_path / "out"):
        assert entry["line"] == 2 * entry["id"] + 1


BAD_LINES = {
    b'{"text": "x"': "line 3: not JSON",
    b"[1]": "line 3: a JSON list, not an object",
    b'{"body": "x"}': "line 3: no key 'text', only 'body'; mend it, set --text_field, or say --damaged drop",
    b'{"text": null}': "line 3: 'text' is a null, not a string",
    b'{"text": "\\ud800"}': "line 3: 'text' has half of a surrogate pair",
    b'{"text": "\xff"}': "line 3: not UTF-8",
}


@pytest.mark.parametrize("line", BAD_LINES)
@pytest.mark.parametrize("piece_bytes", [10, 10_000])
def test_a_bad_line_is_named(tmp_path, line, piece_bytes):
    good = json.dumps({"text": document(1)}).encode()
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([good, b"", line, good]))
    with pytest.raises(UserError) as error:
        run(tmp_path / "out", str(tmp_path / "in.jsonl"), steps=("exact",), piece_bytes=piece_bytes)
    assert BAD_LINES[line] in str(error.value) and "in.jsonl" in str(error.value)
    # the first piece that was read is kept, for going on; where there is none, nothing
    assert (tmp_path / "out").exists() == (piece_bytes == 10)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"{}", b'{"identity": 3}', b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("name", ["report.json", "work/settings.json"])
def test_a_damaged_file_of_an_earlier_curation_is_named(tmp_path, name, content):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": document(1)}) + "\n")
    (tmp_path / "out" / "work").mkdir(parents=True)
    (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(UserError, match=f"out/{name} is damaged .*; choose another --output, or delete that folder"):
        run(tmp_path / "out", str(tmp_path / "in.jsonl"), steps=("exact",))
    assert (tmp_path / "out" / name).read_bytes() == content


@pytest.mark.parametrize("lost", ["documents", "dropped", "kept", "cut"])
def test_a_report_that_lost_a_figure_is_named(tmp_path, lost):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": document(1)}) + "\n")
    report = run(tmp_path / "out", str(tmp_path / "in.jsonl"), steps=("exact",))
    (tmp_path / "out" / "report.json").write_text(json.dumps({k: v for k, v in report.items() if k != lost}))
    with pytest.raises(UserError, match=f"out/report.json is damaged .KeyError: '{lost}'"):
        run(tmp_path / "out", str(tmp_path / "in.jsonl"), steps=("exact",))


def test_bad_lines_may_be_dropped(tmp_path):
    good = json.dumps({"text": document(1)}).encode()
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([good, *BAD_LINES, b"", good]))
    report = run(
        tmp_path / "out", str(tmp_path / "in.jsonl"), steps=("quality", "exact"), damaged="drop", quality=ALL_OFF
    )
    assert [entry["reason"] for entry in dropped_of(tmp_path / "out")] == ["damaged"] * 6 + ["exact"]
    assert report["kept"]["documents"] == 1


ALL_OFF = {"min_words": None, "min_stop_words": None, "max_duplicate_ngrams": (), "max_top_ngram": ()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no step is named: give --steps, some of length, quality"),
        (["--steps", "exact"], "no input; say --input"),
        (["--steps", "exact", "--input", "x.jsonl"], "no output"),
        (["--steps", "exact", "--input", "nowhere.jsonl", "--output", "OUT"], "no such file or folder nowhere.jsonl"),
        (["--steps", "exact", "--near.jaccard", "0.7"], "settings of near are given but --steps has no near"),
        (["--steps", "near", "--near.jaccard", "1.5"], "near.jaccard: must be less than or equal to 1"),
        (["--steps", "near", "--near.jacard", "0.5"], "unknown setting near.jacard"),
        (["--steps", "nearly"], "steps: expected [length"),
        (["--steps", "length", "--length.most", "9"], "length.least 200 is more than length.most 9"),
        (["--steps", "decontaminate", "--decontaminate.ngram", "5"], "min_ngram 8 is more than decontaminate.ngram 5"),
        (["--steps", "exact", "--ray_address", "x"], "ray_address has no effect with the local engine"),
        (["--steps", "exact", "--input", "TEXT", "--output", "OUT"], "is text by its name; curate reads JSON lines"),
        (["--steps", "exact", "--input", "JSONL", "--output", "TEXT"], "cannot write"),
        (["--input", "JSONL", "--json-key", "a"], "unknown setting json-key; curate has --text_field for it"),
        (["--input", "JSONL", "--skip_damaged"], "unknown setting skip-damaged; curate has --damaged drop for it"),
    ],
)
def test_bad_settings_are_one_clear_line(tmp_path, arguments, message):
    (tmp_path / "notes.txt").write_text("x")
    write_lines(tmp_path / "in.jsonl", [{"text": "x"}])
    names = {"TEXT": tmp_path / "notes.txt", "OUT": tmp_path / "out", "JSONL": tmp_path / "in.jsonl"}
    with pytest.raises(UserError) as error:
        curate_main([*(str(names.get(word, word)) for word in arguments)])
    assert message in str(error.value)


def test_a_file_of_settings_and_a_summary(corpus, tmp_path, capsys):
    settings = tmp_path / "curate.yaml"
    settings.write_text("steps: [length, exact]\nlength:\n  least: 5\n")
    assert (
        curate_main([str(settings), "--input", *corpus[:2], "--output", str(tmp_path / "out"), "--length.least", "10"])
        == 0
    )
    assert load(Curation, settings).length.least == 5
    printed = capsys.readouterr()
    assert "read" in printed.out and "48 documents" in printed.out
    assert "length.least" in printed.out and "write: 2 in" in printed.err


def test_a_folder_of_something_else_is_left_alone(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no curation"):
        run_corpus(tmp_path / "out", corpus)


def test_done_is_done_and_another_curation_needs_another_folder(corpus, tmp_path):
    report = run_corpus(tmp_path / "out", corpus)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run_corpus(tmp_path / "out", corpus, workers=2) == report
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    with pytest.raises(UserError, match="holds another curation"):
        run_corpus(tmp_path / "out", corpus, near={"jaccard": 0.5})
    with open(corpus[0], "a") as file:
        file.write(json.dumps({"text": "new"}) + "\n")
    with pytest.raises(UserError, match="or input has changed"):
        run_corpus(tmp_path / "out", corpus)


def test_a_file_given_twice_is_read_twice(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"text": document(i)} for i in range(4)])
    run(tmp_path / "out", source, source, steps=("exact",), piece_bytes=600)
    assert len(documents_of(tmp_path / "out")) == 4
    entries = dropped_of(tmp_path / "out")
    assert [entry["line"] for entry in entries] == [entry["keeper"]["line"] for entry in entries] == [1, 2, 3, 4]


def test_a_full_disk_is_one_clear_line_and_the_run_goes_on(corpus, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", full)
        with pytest.raises(UserError, match="somewhere: No space left on device; mend that and start the same"):
            run_corpus(tmp_path / "out", corpus)
    assert run_corpus(tmp_path / "out", corpus)["documents"] == 48


def test_a_task_file_is_read_before_anything_is_written(corpus, tmp_path):
    with pytest.raises(UserError, match="no key 'question'"):
        run_corpus(tmp_path / "out", corpus, decontaminate={"tasks": (corpus[2],), "fields": ("question",)})
    assert not (tmp_path / "out").exists()


def test_two_runs_at_once_do_not_mix(corpus, tmp_path, monkeypatch):
    messages = []

    def second(*_):
        with pytest.raises(UserError) as error:
            run_corpus(tmp_path / "out", corpus)
        messages.append(str(error.value))
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(writing, "decide", second)
        with pytest.raises(Stop):
            run_corpus(tmp_path / "out", corpus)
    assert len(messages) == 1 and "another process is at work in" in messages[0]
    assert run_corpus(tmp_path / "out", corpus)["documents"] == 48


def test_a_worker_that_is_killed_is_one_clear_line():
    engine = LocalEngine(2)
    with pytest.raises(UserError, match="a worker was killed, perhaps for want of memory; start the same command"):
        list(engine.run(os._exit, [9]))
    engine.close()


class Stop(Exception):
    pass


@pytest.mark.parametrize("calls", range(0, 41, 5))
def test_a_run_that_was_ended_goes_on(corpus, tmp_path, monkeypatch, calls):
    """Ended before its n-th file is renamed to its name, for many n; what was there before is not written again."""
    run_corpus(tmp_path / "whole", corpus, piece_bytes=4000)
    count, replace = [0], os.replace

    def stopping(source, target):
        if count[0] == calls:
            raise Stop
        count[0] += 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    try:
        run_corpus(tmp_path / "out", corpus, piece_bytes=4000)
        assert calls > 30
    except Stop:
        assert not (tmp_path / "out/report.json").exists()
    monkeypatch.setattr(os, "replace", replace)
    scanned = list((tmp_path / "out").glob("work/scan/?????/*.npy"))
    times = {path: path.stat().st_mtime_ns for path in scanned}
    seen = []
    monkeypatch.setattr(
        writing, "write_json", lambda path, value, old=writing.write_json: (seen.append(path), old(path, value))
    )
    written = len(list((tmp_path / "out").glob("work/written/*.json")))
    run_corpus(tmp_path / "out", corpus, piece_bytes=4000)
    assert tree_of(tmp_path / "whole") == tree_of(tmp_path / "out")
    if times:
        assert len(seen) == len(list((tmp_path / "whole/documents").iterdir())) - written


@pytest.mark.slow  # starts two processes of its own and kills them
def test_a_killed_process_leaves_no_workers_and_goes_on(tmp_path):
    texts = [{"text": document(i, 2000)} for i in range(600)]
    source = write_lines(tmp_path / "in.jsonl", texts)
    settings = f"input=({source!r},), steps=('exact', 'near'), piece_bytes=200_000, workers=2"
    program = f"""
from jaxtron.curate.config import Curation
from jaxtron.curate.run import curate
if __name__ == "__main__":
    curate(Curation(output={str(tmp_path / "out")!r}, {settings}))
"""
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(tmp_path / "program.py")], env=environment)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("work/scan/?????"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) >= 2
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert list((tmp_path / "out").glob("work/scan/?????"))
    run(tmp_path / "out", source, steps=("exact", "near"), piece_bytes=200_000)
    run(tmp_path / "whole", source, steps=("exact", "near"), piece_bytes=200_000)
    assert tree_of(tmp_path / "out") == tree_of(tmp_path / "whole")


@pytest.mark.slow  # Ray is no part of the test extra; starting it takes seconds
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_same(corpus, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason='the engine for clusters is the extra "ray"')
    # workers of a cluster started here import the package as this process does
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    settings = {"piece_bytes": 4000, "near": {"verify": "exact"}}
    run_corpus(tmp_path / "local", corpus, **settings)
    run_corpus(tmp_path / "ray", corpus, **settings, engine="ray", workers=2)
    assert tree_of(tmp_path / "local") == tree_of(tmp_path / "ray")
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    with pytest.raises(UserError, match="^[^\n]*bad.jsonl line 1: no key 'text'[^\n]*$"):
        run(tmp_path / "bad", str(bad), steps=("exact",), engine="ray")
