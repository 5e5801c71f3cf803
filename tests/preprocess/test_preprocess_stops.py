"""Preprocessing that was killed goes on where it stopped, and what stops it is one clear line."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import jaxtron.preprocess.inputs as inputs
import jaxtron.preprocess.tokenize as tokenize
import jaxtron.preprocess.work as work
from jaxtron.preprocess.__main__ import main
from tests.support.token_runs import COMPRESS, run, same_files, texts, texts_of, write_bpe, write_lines, write_parquet


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_a_killed_command_goes_on(tmp_path):
    """SIGKILL with workers under way: they end too, and the next run does only what is left."""
    # so many that a busy machine sees the first journal before the last
    given = texts(1600, most_words=1500)
    bpe = write_bpe(tmp_path / "tokenizer.json", given[:20])
    write_lines(tmp_path / "in.jsonl.gz", given)
    flags = ["--input", str(tmp_path / "in.jsonl.gz"), "--tokenizer", str(bpe), "--append-eod"]
    killed = [*flags, "--output", str(tmp_path / "killed"), "--workers"]
    process = subprocess.Popen([sys.executable, "-m", "jaxtron.preprocess", *killed, "2"], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        while not (journals := list(tmp_path.glob("killed.*.partial/journal.json"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        workers = descendants(process.pid)
        assert len(workers) >= 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = json.loads(journals[0].read_text())["documents"]
    assert 0 < done < 1600 and not (tmp_path / "killed.bin").exists()
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    again = run(*killed, "1")
    assert (again.code, again.out.splitlines()[0].split(" that ")[0]) == (0, f"going on after {done:,} documents")
    assert run(*flags, "--output", tmp_path / "whole").code == 0
    assert same_files(tmp_path / "killed", tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))


def children(process: int) -> list[int]:
    """Processes that any thread of a process started; none where it has ended."""
    try:
        return [
            int(pid) for task in Path(f"/proc/{process}/task").glob("*/children") for pid in task.read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []


def descendants(process: int) -> list[int]:
    return [pid for child in children(process) for pid in (child, *descendants(child))]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_that_is_killed_is_one_line_and_goes_on(tmp_path):
    """As the system kills what takes too much memory."""
    given = texts(1000, most_words=300)
    write_lines(tmp_path / "in.jsonl", given)
    bpe = write_bpe(tmp_path / "tokenizer.json", given[:20])
    flags = ("--input", tmp_path / "in.jsonl", "--tokenizer", bpe, "--output")
    earlier = set(descendants(os.getpid()))

    def kill():
        # the server that forks them is a child, they are its children
        while not (new := {pid for child in descendants(os.getpid()) for pid in children(child)} - earlier):
            time.sleep(0.01)
        os.kill(max(new), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    done = run(*flags, tmp_path / "out", "--workers", 2)
    killer.join()
    assert done.code == 2 and done.err.startswith("error: a worker was killed, perhaps for want of memory"), done.err
    assert run(*flags, tmp_path / "out").code == run(*flags, tmp_path / "whole").code == 0
    assert same_files(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.jsonl.zst", "in.parquet", "folder"])
def test_killed_at_every_moment(name, tmp_path, monkeypatch):
    """A kill at each write to the disk in turn, over and over, ends with the bytes of a run that was left alone."""
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 300)
    monkeypatch.setattr(inputs, "PARQUET_ROWS", 3)
    monkeypatch.setattr(tokenize, "SAVE_SECONDS", 0)
    given = [*texts(30, most_words=15), "", "last"]
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        for number, text in enumerate(given):
            (path / f"{number:02}.txt").write_text(text)
    elif name == "in.parquet":
        write_parquet(path, {"text": given}, row_group_size=8)
    else:
        write_lines(path, given)
    flags = ("--input", path, "--tokenizer", "bytes", "--append-eod", "--output")
    assert run(*flags, tmp_path / "whole").code == 0
    real, allowed = (os.replace, os.fsync), 0

    def dying(function):
        def call(*arguments):
            nonlocal allowed
            allowed -= 1
            if allowed < 0:
                raise Killed
            return function(*arguments)

        return call

    monkeypatch.setattr(work.os, "replace", dying(real[0]))
    monkeypatch.setattr(work.os, "fsync", dying(real[1]))
    kills = 0
    for budget in [1, 2, 3, 4, 5, 6, 7, 8] * 40:
        allowed = budget
        try:
            assert run(*flags, tmp_path / "killed").code == 0
            break
        except Killed:
            kills += 1
    assert kills >= 8 and same_files(tmp_path / "killed", tmp_path / "whole")
    assert texts_of(tmp_path / "killed") == given and not list(tmp_path.glob("*.partial"))


def test_an_interrupt_saves_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 300)
    given = texts(40)
    write_lines(tmp_path / "in.jsonl", given)
    flags = ("--input", tmp_path / "in.jsonl", "--tokenizer", "bytes", "--output", tmp_path / "out")
    append, calls = work.WorkFolder.append, []

    def interrupted(folder, keys, **changes):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        append(folder, keys, **changes)

    monkeypatch.setattr(work.WorkFolder, "append", interrupted)
    stopped = run(*flags)
    assert (stopped.code, stopped.err) == (130, "interrupted\n")
    again = run(*flags)
    assert "going on after" in again.out and texts_of(tmp_path / "out") == given


def test_a_full_disk_is_one_line_and_goes_on_with_room(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 300)
    given = texts(60)
    write_lines(tmp_path / "in.jsonl", given)
    flags = ("--input", tmp_path / "in.jsonl", "--tokenizer", "bytes", "--output", tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for save_seconds in (0, 1000):  # the limit is met while saving, or only while closing
        monkeypatch.setattr(tokenize, "SAVE_SECONDS", save_seconds)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
        try:
            full = run(*flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert full.code == 2 and full.err.startswith("error: cannot write") and full.err.count("\n") == 1
        assert "make room or change --output, and run again" in full.err
    again = run(*flags)
    assert "going on after" in again.out and texts_of(tmp_path / "out") == given


def test_other_settings_or_inputs_do_not_go_on(tmp_path, monkeypatch):
    """Unfinished work of one command is not taken for another's."""
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 300)
    path = write_lines(tmp_path / "in.jsonl", [*texts(30), 3])
    flags = ("--input", path, "--tokenizer", "bytes", "--output", tmp_path / "out")
    assert run(*flags).code == 2
    assert "going on" in run(*flags).out
    assert "going on" not in run(*flags, "--append-eod").out
    write_lines(path, [*texts(30, seed=1), 3])
    assert "going on" not in run(*flags).out
    # the same work, only without the line that stopped it
    assert "going on" in run(*flags, "--skip-damaged").out and texts_of(tmp_path / "out") == texts(30, seed=1)


def test_two_processes_do_not_write_one_output(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 1)
    path = write_lines(tmp_path / "in.jsonl", ["a", 3])
    flags = ("--input", path, "--tokenizer", "bytes", "--output", tmp_path / "out")
    assert run(*flags).code == 2
    (folder,) = tmp_path.glob("out.*.partial")
    with (folder / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held = run(*flags, "--skip-damaged")
    assert (
        held.code == 2
        and held.err == f"error: another process is writing {folder}; wait for it, or stop it and go on\n"
    )
    assert run(*flags, "--skip-damaged").code == 0
    # from the beginning: the work of --skip-damaged is finished and gone
    assert "going on" not in run(*flags, "--overwrite").out


def test_work_of_skip_damaged_is_not_finished_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 1)
    path = write_lines(tmp_path / "in.jsonl", [3, "a"])
    flags = ("--input", path, "--tokenizer", "bytes", "--output", tmp_path / "out")
    monkeypatch.setattr(work.WorkFolder, "finish", lambda folder: (folder.save(), (_ for _ in ()).throw(Killed))[0])
    with pytest.raises(Killed):
        run(*flags, "--skip-damaged")
    refused = run(*flags)
    assert refused.code == 2 and "was begun with --skip-damaged; give it again, or delete that folder" in refused.err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON: Expecting"),
        (b'{"body": "a", "id": 1}', "no key 'text', only 'body', 'id'; mend it, set --json-key"),
        (b"{}", "no key 'text', the object is empty"),
        (b'{"text": 3}', "'text' is a number, not a string"),
        (b'{"text": null}', "'text' is a null, not a string"),
        (b'{"text": ["a"]}', "'text' is a list, not a string"),
        (b'["text"]', "a JSON list, not an object"),
        (b'"text"', "a JSON string, not an object"),
        (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 10 of the line"),
        (b'{"text": "a\\ud83d"}', r"'text' has half of a surrogate pair, '\ud83d', as character 1"),
        (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
        (b"[" * 100_000, "not JSON: maximum recursion"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
    ],
)
def test_a_damaged_line_is_named_or_left_out(line, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 10)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}\n')
    flags = ("--input", path, "--tokenizer", "bytes", "--output", tmp_path / "out")
    done = run(*flags)
    assert done.code == 2 and done.err.count("\n") == 1 and not (tmp_path / "out.idx").exists()
    assert done.err.startswith(f"error: {path} line 3: {reason}"), done.err
    done = run(*flags, "--skip-damaged")
    assert done.code == 0 and "1 damaged entry left out" in done.out
    assert done.err.startswith(f"left out: {path} line 3: {reason.split(';')[0]}"), done.err
    assert texts_of(tmp_path / "out") == ["first", "last"]


def test_a_damaged_row_and_a_damaged_text(tmp_path):
    path = write_parquet(tmp_path / "in.parquet", {"text": ["a", None, "c"]})
    assert (
        f"{path} row 2: 'text' is a null"
        in run("--input", path, "--tokenizer", "bytes", "--output", tmp_path / "out").err
    )
    (tmp_path / "in.txt").write_bytes(b"ab\xff")
    done = run("--input", tmp_path / "in.txt", "--tokenizer", "bytes", "--output", tmp_path / "out")
    assert "in.txt: not UTF-8 text: byte 0xff at offset 2" in done.err


def test_workers_name_the_first_damage(tmp_path, monkeypatch):
    """Whichever worker meets its own damage first."""
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 50)
    path = write_lines(tmp_path / "in.jsonl", [*texts(20), 1, *texts(20), 2, 3])
    done = run("--input", path, "--tokenizer", "bytes", "--output", tmp_path / "out", "--workers", 2)
    assert done.code == 2 and done.err.startswith(f"error: {path} line 21: ") and done.err.count("\n") == 1


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_that_is_cut_or_broken(suffix, tmp_path):
    path = tmp_path / f"in.jsonl{suffix}"
    content = write_lines(path, texts(50)).read_bytes()
    flags = ("--input", path, "--tokenizer", "bytes", "--output", tmp_path / "out")
    for damaged in (content[: len(content) // 2], content[:-1], b"\0" + content, content + b"rubbish"):
        path.write_bytes(damaged)
        done = run(*flags)
        assert done.code == 2 and done.err.startswith(f"error: {path} is damaged or cut short: "), damaged[:9]
        assert not (tmp_path / "out.idx").exists()
    path.write_bytes(COMPRESS[suffix](b""))
    assert "no document in --input" in run(*flags).err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--input {in} --tokenizer bytes", "required: --output"),
        ("--input {in} --tokenizer bytes --output {out} --colour", "unknown flag --colour; python -m jaxtron.prep"),
        ("--inputt {in} --tokenizer bytes --output {out}", "unknown flag --inputt; did you mean --input?"),
        ("--input {in} --tokeniser=bytes --output {out}", "unknown flag --tokeniser; did you mean --tokenizer?"),
        ("--input {in} --json_key a --tokenizer bytes", "unknown flag --json_key; did you mean --json-key?"),
        ("--input {in} -o {out} --tokenizer bytes", "unknown flag -o; python -m jaxtron.preprocess --help lists"),
        ("--input {in} --tokenizer bytes --output {out} --output {in}", "--output is given twice; keep one"),
        ("merge --inputs a --output {out}", "unknown flag --inputs; did you mean --input?"),
        ("inspect --tokenz 5", "unknown flag --tokenz; did you mean --tokens?"),
        ("--input {in} --tokenizer bytes --output {out} --workers 0", "--workers: '0' must be a whole number above 0"),
        ("--input {in} --tokenizer bytes --output {folder}", "is a folder; give the start of a file's name"),
        ("--input {folder}/none --tokenizer bytes --output {out}", "no such file or folder"),
        ("--input {empty} --tokenizer bytes --output {out}", "has no files; put text there or give another"),
        ("--input {in} --tokenizer nowhere.json --output {out}", "no tokenizer nowhere.json; give bytes"),
        ("--input {in} --tokenizer characters --output {out}", "characters have no vocabulary before training"),
        ("--input {in} --tokenizer bytes --output {out} --end-of-document x", "has no effect with the bytes tokenizer"),
        ("--input {in} --tokenizer {plain} --output {out} --append-eod", "name its token with --end-of-document"),
        ("--input {in} --tokenizer bytes --output {out} --language de", "has no effect without --split-sentences"),
        ("--input {in} --tokenizer bytes --output {out} --json-key a a", "--json-key has 'a' twice"),
        ("--input {text} --tokenizer bytes --output {out} --json-key a", "--json-key a has no effect on plain text"),
        ("--input {in} --tokenizer bytes --output {in}/out", "in.jsonl is a file, not a folder; change --output, and"),
        ("merge --input {in} --output {folder}/", "is a folder; give the start of a file's name"),
        ("curate --input {in}", "curate is a command of its own: python -m jaxtron.curate"),
        (
            "--input {parquet} --tokenizer bytes --output {out} --json-key a",
            "has no column 'a', only text; set --json-key",
        ),
        ("--input {broken} --tokenizer bytes --output {out}", "is no readable Parquet file"),
        ("mege --input a", "unknown subcommand 'mege'; give --input for tokenizing, or merge, inspect, order"),
        (
            "merge --input a",
            "the following arguments are required: --output; python -m jaxtron.preprocess merge --help",
        ),
        ("order {out} --sequence-length 0", "--sequence-length: '0' must be a whole number above 0"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path):
    names = {name: tmp_path / name for name in ("folder", "empty", "out")}
    for name in ("folder", "empty"):
        names[name].mkdir()
    names["in"] = write_lines(tmp_path / "folder" / "in.jsonl", ["a"])
    names["parquet"] = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    names |= {"text": tmp_path / "in.txt", "broken": tmp_path / "broken.parquet", "plain": tmp_path / "plain.json"}
    for name in ("text", "broken"):
        names[name].write_text("abc")
    write_bpe(names["plain"], ["abc"])
    names["plain"].write_text(names["plain"].read_text().replace("<|endoftext|>", "<|stop|>"))
    before = sorted(path.name for path in tmp_path.iterdir())
    done = run(*flags.format_map(names).split())
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
    assert all(line.startswith("read as   ") for line in done.out.splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("package", "extra", "flags"),
    [
        ("pyarrow.parquet", "parquet", "--tokenizer bytes --input {}/in.parquet"),
        ("zstandard", "zstd", "--tokenizer bytes --input {}/in.jsonl.zst"),
        ("sentencex", "sentences", "--tokenizer bytes --input {}/in.jsonl.zst --split-sentences"),
        ("sentencepiece", "sentencepiece", "--input {0}/in.jsonl.zst --tokenizer {0}/in.model"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(package, extra, flags, tmp_path, monkeypatch):
    write_lines(tmp_path / "in.jsonl.zst", ["a"])
    write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    (tmp_path / "in.model").touch()
    monkeypatch.setitem(sys.modules, package, None)
    done = run("--output", tmp_path / "out", *flags.format(tmp_path).split())
    assert done.code == 2 and f'pip install "jaxtron[{extra}]"' in done.err and done.err.count("\n") == 1


def test_help_lists_the_subcommands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and "merge, inspect, order." in capsys.readouterr().out


def test_what_killed_workers_leave_is_removed_without_a_word():
    program = (
        "import os\nfrom multiprocessing import resource_tracker\n"
        "from jaxtron.preprocess.tokenize import start_tracker\n"
        "start_tracker(); resource_tracker.register('/of-a-killed-worker', 'semaphore'); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
