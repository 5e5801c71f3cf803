"""Indices made once: what the key covers, damage, and many processes at once."""

import json
import multiprocessing
import threading
import time

import numpy as np
import pytest

import jaxtron.data.megatron.index_cache as index_cache
from jaxtron.config import UserError
from jaxtron.data.megatron.gpt_index import build_gpt_index
from jaxtron.data.megatron.index_cache import cached_arrays, cached_blend, cached_gpt_index

LENGTHS = np.array([7, 3, 11, 5, 2, 9], np.int32)
SETTINGS = {"sequence_length": 4, "samples": 12, "seed": 1234, "extra_token": True, "drop_last_partial": True}


def entries(directory):
    return [path for path in (directory / "indices").iterdir() if path.is_dir()]


def gpt_index(directory, lengths=LENGTHS, sequences=range(6), **changed):
    return cached_gpt_index(lengths, sequences, directory=directory, name="a", **(SETTINGS | changed))


def test_cached_indices_are_those_built(tmp_path):
    expected = build_gpt_index(LENGTHS, range(6), **SETTINGS)
    for directory in (None, tmp_path, tmp_path):
        found = gpt_index(directory)
        for name in ("documents", "samples", "shuffle"):
            values, right = getattr(found, name), getattr(expected, name)
            np.testing.assert_array_equal(values, right)
            assert values.dtype == right.dtype
    with pytest.raises(ValueError, match="read-only"):
        gpt_index(tmp_path).shuffle[0] = 1


def test_everything_that_changes_the_result_is_in_the_key(tmp_path, monkeypatch):
    gpt_index(tmp_path)
    changes = [
        {"sequence_length": 5},
        {"samples": 13},
        {"samples": None},
        {"seed": 1},
        {"extra_token": False},
        {"drop_last_partial": False},
        {"sequences": range(5)},
        {"sequences": range(1, 6)},
        {"lengths": np.array([7, 3, 11, 5, 9, 2], np.int32)},
    ]
    for number, change in enumerate(changes):
        found = gpt_index(tmp_path, **change)
        assert len(entries(tmp_path)) == number + 2
        sequences = change.get("sequences", range(6))
        settings = SETTINGS | {name: value for name, value in change.items() if name in SETTINGS}
        right = build_gpt_index(change.get("lengths", LENGTHS), sequences, **settings)
        np.testing.assert_array_equal(found.samples, right.samples)
    for change in ({}, *changes):
        gpt_index(tmp_path, **change)
    assert len(entries(tmp_path)) == len(changes) + 1
    monkeypatch.setattr(index_cache, "FORMAT_VERSION", 2)
    gpt_index(tmp_path)
    assert len(entries(tmp_path)) == len(changes) + 2


def test_blends_are_cached(tmp_path):
    for _ in range(2):
        blend = cached_blend(weights=[0.3, 0.7], sizes=None, samples=10, directory=tmp_path)
        assert blend.datasets.tolist() == [1, 0, 1, 1, 0, 1, 1, 0, 1, 1]
        blend = cached_blend(weights=None, sizes=[5, 2], samples=None, directory=tmp_path)
        assert blend.samples.tolist() == [0, 0, 1, 2, 1, 3, 4]
    assert len(entries(tmp_path)) == 2


def numbers(built, delay=0.0):
    def build():
        built.append(1)
        time.sleep(delay)
        return {"values": np.arange(1000)}

    return build


DAMAGES = {
    "cut": lambda entry: (entry / "values.npy").write_bytes((entry / "values.npy").read_bytes()[:-1]),
    "flipped": lambda entry: flip(entry / "values.npy", 5000),
    "header": lambda entry: flip(entry / "values.npy", 3),
    "empty": lambda entry: (entry / "values.npy").write_bytes(b""),
    "array missing": lambda entry: (entry / "values.npy").unlink(),
    "description missing": lambda entry: (entry / "description.json").unlink(),
    "description cut": lambda entry: (entry / "description.json").write_text('{"checks'),
    "description of another kind": lambda entry: (entry / "description.json").write_text("[]"),
}


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_made_anew(tmp_path, damage, caplog):
    built = []
    cached_arrays(tmp_path, {"kind": "test"}, numbers(built))
    (entry,) = entries(tmp_path)
    DAMAGES[damage](entry)
    for _ in range(2):
        found = cached_arrays(tmp_path, {"kind": "test"}, numbers(built))
        np.testing.assert_array_equal(found["values"], np.arange(1000))
    assert len(built) == 2 and entries(tmp_path) == [entry]
    assert f"{entry} is damaged" in caplog.text


def test_what_an_entry_was_made_from_can_be_read(tmp_path):
    cached_arrays(tmp_path, {"kind": "test", "seed": 3}, numbers([]))
    content = json.loads((entries(tmp_path)[0] / "description.json").read_text())
    assert content["description"] == {"version": 1, "kind": "test", "seed": 3}


def test_a_failed_build_leaves_nothing_and_lets_others_try(tmp_path):
    def fail():
        raise KeyError("no")

    with pytest.raises(KeyError):
        cached_arrays(tmp_path, {"kind": "test"}, fail)
    assert entries(tmp_path) == []
    cached_arrays(tmp_path, {"kind": "test"}, numbers([]))


@pytest.mark.parametrize("locks", [True, False])
def test_threads_share_one_entry(tmp_path, monkeypatch, locks):
    if not locks:

        def refuse(*arguments):
            raise OSError("no locks here")

        monkeypatch.setattr(index_cache.fcntl, "flock", refuse)
    built, found = [], []
    threads = [
        threading.Thread(
            target=lambda: found.append(cached_arrays(tmp_path, {"kind": "test"}, numbers(built, delay=0.05)))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all((arrays["values"] == np.arange(1000)).all() for arrays in found)
    assert len(entries(tmp_path)) == 1
    if locks:
        assert len(built) == 1


def build_in_process(directory, number, barrier):
    def build():
        (directory / f"built-{number}").write_text("")
        time.sleep(0.1)
        return {"values": np.arange(1000)}

    barrier.wait()
    found = cached_arrays(directory, {"kind": "test"}, build)
    assert (found["values"] == np.arange(1000)).all()


def test_processes_share_one_entry(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    workers = [context.Process(target=build_in_process, args=(tmp_path, number, barrier)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(list(tmp_path.glob("built-*"))) == 1 and len(entries(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot keep indices in .*set the cache directory"):
        cached_arrays(tmp_path / "file", {"kind": "test"}, numbers([]))
