"""Damaged files by the hundred: an error of one line that names the file, or a good result and nothing beside it."""

import shutil
import tempfile
from pathlib import Path

import pytest

from jaxtron.train.__main__ import main as train
from tests.support.commands import run_main
from tests.sweep.damage import byte_damages
from tests.sweep.damaged_inputs import INPUTS, Input
from tests.sweep.sweep_cases import Result, error_faults, run_in, shortlist
from tests.sweep.workplace import write_workplace

# of these files several in a row are one
REPEATABLE = (".gz", ".zst")
# restoring a checkpoint reads neither
UNUSED = ("_CHECKPOINT_METADATA", "commit_success.txt")


def pytest_generate_tests(metafunc):
    if "content" not in metafunc.fixturenames:
        return
    with tempfile.TemporaryDirectory() as folder:
        write_workplace(Path(folder))
        cases = [
            (one, content, f"{one.name}: {name}")
            for one in INPUTS
            for name, content in one.damages((Path(folder) / one.file).read_bytes())
            if not (name == "written twice" and one.file.endswith(REPEATABLE))
        ]
    chosen = shortlist(len(cases))
    metafunc.parametrize(
        ("one", "content"),
        [
            pytest.param(one, content, id=name, marks=() if number in chosen else pytest.mark.slow)
            for number, (one, content, name) in enumerate(cases)
        ],
    )


@pytest.fixture(scope="session")
def outcomes():
    """What each command makes of the whole files, by the input's name."""
    return {}


def outcome(result: Result) -> tuple:
    """What damage must not change silently: what is printed, but for times, and the files that are made."""
    made = {path: content for path, content in result.after.items() if result.before.get(path) != content}
    return result.ended.code, [line for line in result.ended.out.splitlines() if " s, " not in line], made


def test_damage(one: Input, content: bytes, workplace, outcomes, template, tmp_path, monkeypatch):
    if one.is_checked and one.name not in outcomes:
        monkeypatch.chdir(shutil.copytree(template, tmp_path / "whole"))
        outcomes[one.name] = outcome(run_in(tmp_path / "whole", one.words))
        assert outcomes[one.name][0] == 0
        monkeypatch.chdir(workplace)
    (workplace / one.file).write_bytes(content)
    result = run_in(workplace, one.words)
    if result.ended.code == 0 and not result.defects:
        # nothing else tells good content from damage
        assert not one.is_checked or outcome(result) == outcomes[one.name]
        return
    found = error_faults(result, (one.file, *one.others) if one.is_named else ("",))
    assert not found, "\n".join([f"jaxtron {' '.join(one.words)} with {content[:100]!r}", *found])


def few_damages(content: bytes) -> dict[str, bytes | None]:
    """Some damages of a file; None is a file that is not there."""
    every = dict(byte_damages(content, seed=3, flips=1))
    names = ("emptied", "last byte lost")
    return {name: every[name] for name in every if name in names or "flipped" in name} | {"removed": None}


def damaged_one_by_one(folder: Path):
    """Every file below a folder with every damage in turn; whole again afterwards."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for name, content in few_damages(whole).items():
            if content == whole:
                continue
            path.unlink() if content is None else path.write_bytes(content)
            yield path, name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--data.path tokens",
        "--data.path mix.blend",
        "--data.path chat.jsonl --data.format chat --data.sequence_length 128",
    ],
)
def test_damaged_caches(flags, workplace, tmp_path):
    words = ["train", "tiny.yaml", *flags.split(), "--data.cache_directory", str(tmp_path / "cache")]
    assert run_in(workplace, words).ended.code == 0
    shutil.copytree(tmp_path / "cache", tmp_path / "whole")
    count, wrong = 0, []
    for path, name in damaged_one_by_one(tmp_path / "cache"):
        count += 1
        result = run_in(workplace, words)
        if result.ended.code == 0 and not result.defects:
            # what was made anew is what was there
            rest = path.relative_to(tmp_path / "cache")
            same = path.exists() and path.read_bytes() == (tmp_path / "whole" / rest).read_bytes()
            # a lock has no content, and the description of an index is for people: its name is what it is found by
            is_unread = path.suffix == ".lock" or "indices" in path.parts and path.name == "description.json"
            wrong += [] if same or is_unread else [f"{path.name}, {name}: taken for good"]
        else:
            wrong += [f"{path.name}, {name}: {fault}" for fault in error_faults(result, (str(tmp_path / "cache"),))]
    assert count and not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_damaged_checkpoints(workplace, tmp_path):
    run = str(tmp_path / "run")
    settings = ["--run.directory", run, "--train.sample_tokens", "0", "--train.validation_batches", "1"]
    assert run_main(train, ["tiny.yaml", *settings]).code == 0
    words = ["evaluate", run, "--text", "latin_words.txt"]
    (workplace / "latin_words.txt").write_text("the cat sat")
    good = run_in(workplace, words)
    assert good.ended.code == 0, good
    count, wrong = 0, []
    for path, name in damaged_one_by_one(tmp_path / "run" / "checkpoints"):
        count += 1
        result = run_in(workplace, words)
        if path.name in UNUSED:
            wrong += [] if result.ended == good.ended else [f"{path.name}, {name}: {result.ended}"]
        else:
            wrong += [f"{path.name}, {name}: {fault}" for fault in error_faults(result, (path.name,))]
    assert count > 20 and not wrong, "\n".join(wrong)
