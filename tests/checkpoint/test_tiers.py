"""Copies of a state beside its checkpoints: whole or not there, the newest taken, parts of other hosts."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.record import DamageError
from jaxtron.checkpoint.tiers import copies as module
from jaxtron.checkpoint.tiers.copies import Copies
from jaxtron.checkpoint.tiers.part_file import PartHead, read_head, read_part, write_part
from jaxtron.checkpoint.tiers.peers import keepers
from jaxtron.checkpoint.tiers.pieces import local_bytes, names_needed, take
from jaxtron.config import UserError

HEAD = PartHead(run="run", step=7, process=1, num_processes=2, layout="layout", extra={"position": 3})


@pytest.fixture
def pieces() -> dict[str, np.ndarray]:
    return {"a[0:2,0:3]": np.arange(6.0).reshape(2, 3), "b[]": np.asarray(jnp.bfloat16(2)), "c[0:0]": np.zeros(0)}


@pytest.fixture
def open_copies(tmp_path: Path, data_mesh, abstract: Callable, make_state: Callable) -> Iterator[Callable]:
    made = []

    def make(run: str = "run", **settings) -> Copies:
        given = {"memory_every": 1, "memory_directory": str(tmp_path / "memory"), **settings}
        (tmp_path / run).mkdir(exist_ok=True)
        wanted = abstract(make_state(data_mesh), data_mesh)
        made.append(Copies(CheckpointConfig(**given), tmp_path / run, data_mesh, wanted))
        return made[-1]

    yield make
    for one in made:
        one.close()


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.rglob("*.part_*"))


def test_a_part_is_read_as_it_was_written(tmp_path: Path, pieces: dict[str, np.ndarray]):
    path = tmp_path / "part"
    write_part(path, HEAD, pieces, synced=True)
    head, found = read_part(path)
    assert head == read_head(path) and (head.step, head.extra) == (7, {"position": 3})
    assert found.keys() == pieces.keys() and [found[name].dtype for name in found] == [
        pieces[name].dtype for name in found
    ]
    for name, piece in pieces.items():
        np.testing.assert_array_equal(found[name], piece)


def test_every_byte_of_a_part_counts(tmp_path: Path, pieces: dict[str, np.ndarray]):
    path = tmp_path / "part"
    write_part(path, HEAD, pieces, synced=False)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamageError):
            read_part(path)
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamageError):
            read_head(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(DamageError, match="bytes instead of"):
        read_head(path)


def test_a_full_disk_leaves_nothing(tmp_path: Path, pieces: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no room"):
        write_part(tmp_path / "part", HEAD, pieces, synced=False)
    assert list(tmp_path.iterdir()) == []


def test_the_newest_whole_copy_is_restored(open_copies, make_state, data_mesh, assert_same, tmp_path: Path):
    written = open_copies()
    states = {step: make_state(data_mesh, seed=step) for step in range(1, 6)}
    for step, state in states.items():
        written.save(step, state, {"position": 10 * step})
    written.wait()
    # the newest three, of which one may be half written
    assert files(tmp_path) == [f"step_0000000{step}.part_00000" for step in (3, 4, 5)]
    later = open_copies()
    found = later.restore(newer_than=2)
    assert found is not None and (found.tier, found.step, found.extra) == ("memory", 5, {"position": 50})
    assert_same(found.state, states[5])
    assert [leaf.sharding for leaf in jax.tree.leaves(found.state)] == [
        leaf.sharding for leaf in jax.tree.leaves(states[5])
    ]
    assert later.restore(newer_than=5) is None
    path = next(tmp_path.rglob("step_00000005.part_00000"))
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    found = later.restore(newer_than=2)
    assert found is not None and found.step == 4
    later.drop_after(3)
    found = later.restore(newer_than=2)
    assert found is not None and found.step == 3 and files(tmp_path) == ["step_00000003.part_00000"]
    later.close(remove=True)
    assert not files(tmp_path) and open_copies().restore(newer_than=0) is None


def test_copies_of_another_run_or_layout_are_not_taken(open_copies, make_state, data_mesh, tmp_path: Path):
    written = open_copies()
    written.save(1, make_state(data_mesh), {})
    written.wait()
    assert open_copies("other").restore(newer_than=0) is None
    # the directory begins anew: its name is no reason to take them for its own
    (tmp_path / "run" / "copies_of").unlink()
    assert open_copies().restore(newer_than=0) is None
    # a word becomes a directory's name, and no way out of there
    (tmp_path / "run" / "copies_of").write_text("../../elsewhere")
    open_copies().save(1, make_state(data_mesh), {})
    assert not list(tmp_path.rglob("elsewhere"))


def test_memory_and_a_disk_each_have_their_turn(open_copies, make_state, data_mesh, tmp_path: Path):
    local = {"local_every": 3, "local_directory": str(tmp_path / "disk")}
    written = open_copies(memory_every=2, **local)
    assert [step for step in range(1, 7) if written.is_due(step)] == [2, 3, 4, 6]
    for step in (2, 3):
        written.save(step, make_state(data_mesh, seed=step), {})
    written.wait()
    found = open_copies(memory_every=2, **local).restore(newer_than=0)
    # the newest of both
    assert found is not None and (found.tier, found.step) == ("local", 3)
    written.save(6, make_state(data_mesh, seed=6), {})
    written.wait()
    found = open_copies(memory_every=2, **local).restore(newer_than=0)
    assert found is not None and (found.tier, found.step) == ("memory", 6)


def test_what_is_not_finite_is_not_kept(open_copies, make_state, data_mesh, tmp_path: Path):
    written, state = open_copies(), make_state(data_mesh)
    embed = np.array(state["parameters"]["embed"])
    embed[63, 5] = np.nan
    state["parameters"]["embed"] = jax.device_put(embed, state["parameters"]["embed"].sharding)
    written.save(1, state, {})
    written.wait()
    assert not files(tmp_path) and written.restore(newer_than=0) is None


def test_a_copy_that_cannot_be_written_is_told(open_copies, make_state, data_mesh, monkeypatch: pytest.MonkeyPatch):
    written = open_copies()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no room")

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_part", full)
        written.save(1, make_state(data_mesh), {})
        written.wait()
    assert written.take_problems() == [(1, "memory: no room")] and written.take_problems() == []
    written.save(2, make_state(data_mesh), {})
    found = written.restore(newer_than=0)
    assert found is not None and found.step == 2


def test_places_that_are_none_are_refused(open_copies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="checkpoint.memory_directory .*file: no copies of the state can be written"):
        open_copies(memory_directory=str(tmp_path / "file"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(UserError, match="checkpoint.memory_every 1: three copies have no room in .* 100 B are free"):
        open_copies()


def test_pieces_are_there_once(make_state, abstract, data_mesh):
    state = make_state(data_mesh)
    wanted, taken = abstract(state, data_mesh), take(state)
    assert taken.keys() == names_needed(wanted)
    assert sum(piece.nbytes for piece in taken.values()) == local_bytes(wanted)
    assert "parameters.embed[8:16,0:32]" in taken and "parameters.layers.0.bias[0:3]" in taken


def test_a_part_is_kept_on_another_host():
    assert keepers(["a", "a", "a"]) is None and keepers(["a"]) is None
    assert keepers(["a", "b"]) == (1, 0)
    assert keepers(["a", "a", "b", "b", "c", "c"]) == (2, 3, 4, 5, 0, 1)
    assert keepers(["a", "b", "a", "b"]) == (1, 0, 3, 2)
    # hosts with more processes than others: the next one, which may be on the same
    assert keepers(["a", "a", "b"]) == (1, 2, 0)
