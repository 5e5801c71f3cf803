"""Damaged checkpoints: reported, never used, never overwritten."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.config import UserError

# restoring reads neither, so a checkpoint without them is whole
UNUSED = {"_CHECKPOINT_METADATA", "commit_success.txt"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


@pytest.fixture
def run(tmp_path, make_state, one_device) -> Path:
    """A directory with the checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "run", CheckpointConfig())
    for step in (1, 2):
        checkpoints.save(step, make_state(one_device, seed=step), {"position": step})
    checkpoints.close()
    return checkpoints.directory


@pytest.fixture
def restore(make_state, abstract, one_device, assert_same) -> Callable:
    """Restores and compares the state with what was saved at that step."""

    def check(directory: Path):
        checkpoints = Checkpoints(directory, CheckpointConfig())
        try:
            restored = checkpoints.restore(abstract(make_state(one_device), one_device))
        finally:
            checkpoints.close()
        if restored is not None:
            assert restored.extra == {"position": restored.step}
            assert_same(restored.state, make_state(one_device, seed=restored.step))
        return restored

    return check


@pytest.mark.parametrize("damage", [truncate, empty, garbage, flip_one_bit, remove])
def test_the_one_before_a_damaged_checkpoint_is_used(run, restore, damage, caplog):
    newest = run / "step_00000002"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(files) > 8
    shutil.copytree(newest, run.parent / "whole")
    for file in files:
        shutil.rmtree(newest)
        shutil.copytree(run.parent / "whole", newest)
        damage(newest / file)
        caplog.clear()
        restored = restore(run)
        if file.name in UNUSED:
            assert restored.step == 2 and not caplog.records
            continue
        assert restored.step == 1, file
        assert [skipped.path for skipped in restored.skipped] == [newest]
        (line,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert file.name in line.getMessage() and str(newest) in line.getMessage() and "\n" not in line.getMessage()


def test_all_damaged_is_an_error_and_nothing_is_touched(run, restore, caplog):
    for step in ("step_00000001", "step_00000002"):
        truncate(run / step / "manifest.ocdbt")
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    with pytest.raises(UserError, match="every checkpoint in .* is damaged .*another --run.directory") as caught:
        restore(run)
    assert "\n" not in str(caught.value) and str(caught.value).count("manifest.ocdbt") == 2
    # each reason once, in the error
    assert caplog.text == ""
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


def test_a_damaged_checkpoint_is_moved_aside_when_its_step_comes_again(run, restore, make_state, abstract, one_device):
    remove(run / "step_00000002" / "_METADATA")
    checkpoints = Checkpoints(run, CheckpointConfig(keep=2))
    restored = checkpoints.restore(abstract(make_state(one_device), one_device))
    assert restored is not None and restored.step == 1 and checkpoints.steps() == [1]
    checkpoints.save(2, make_state(one_device, seed=2), {"position": 2})
    checkpoints.close()
    assert checkpoints.steps() == [1, 2] and restore(run).step == 2
    assert len(list(run.glob("step_00000002.damaged-*"))) == 1


def test_a_damaged_checkpoint_does_not_count_as_kept(run, make_state, abstract, one_device):
    truncate(run / "step_00000002" / "manifest.ocdbt")
    shutil.move(run / "step_00000002", run / "step_00000009")
    checkpoints = Checkpoints(run, CheckpointConfig(keep=1))
    checkpoints.restore(abstract(make_state(one_device), one_device))
    checkpoints.save(2, make_state(one_device, seed=2), {})
    checkpoints.close()
    assert sorted(path.name for path in run.iterdir()) == ["step_00000002", "step_00000009"]


def test_an_unfinished_checkpoint_is_reported_then_removed(run, restore, make_state, one_device, caplog):
    shutil.copytree(run / "step_00000002", run / "step_00000003.orbax-checkpoint-tmp")
    restored = restore(run)
    assert restored.step == 2 and [skipped.path.name for skipped in restored.skipped] == ["step_00000003"]
    assert "unfinished" in caplog.text
    checkpoints = Checkpoints(run, CheckpointConfig())
    checkpoints.save(4, make_state(one_device, seed=4), {"position": 4})
    checkpoints.close()
    assert sorted(path.name for path in run.iterdir()) == ["step_00000002", "step_00000004"]


def test_only_an_unfinished_checkpoint_means_a_new_start(run, restore, caplog):
    shutil.move(run / "step_00000002", run.parent / "new" / "step_00000002.orbax-checkpoint-tmp")
    assert restore(run.parent / "new") is None
    assert "unfinished" in caplog.text
