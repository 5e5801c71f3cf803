"""A checkpoint that does not fit: one line, those before it kept, nothing left of it."""

import re
import shutil
from types import SimpleNamespace

import pytest

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.config import UserError


def test_room_is_looked_for_before_anything_is_written(tmp_path, make_state, one_device, monkeypatch):
    directory, state = tmp_path / "checkpoints", make_state(one_device)
    checkpoints = Checkpoints(directory, CheckpointConfig())
    checkpoints.save(1, state, {})
    checkpoints.wait()
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(total=10**6, free=9 * 1024))
    with pytest.raises(UserError) as caught:
        checkpoints.save(2, state, {})
    assert str(caught.value) == (
        f"the checkpoint of step 2 could not be written to {directory}: it needs 23.11 KiB, and 9 KiB are left; "
        "earlier checkpoints are untouched; make room or choose another --run.directory"
    )
    # a file system that does not know is tried
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(total=0, free=0))
    checkpoints.save(3, state, {})
    checkpoints.close()
    assert sorted(path.name for path in directory.iterdir()) == ["step_00000001", "step_00000003"]


def test_a_failing_write_is_one_line_each_and_nothing_else_is_printed(tmp_path, start_script):
    out, err = start_script("save_until_full.py", tmp_path / "checkpoints").communicate(timeout=120)
    *lines, left = out.splitlines()
    # but for what JAX's CUDA plugin says where there is no driver
    assert [line for line in err.splitlines() if not re.search("cudart_stub|InitializeLog", line)] == []
    assert lines == [
        f"the checkpoint of step {step} could not be written to {tmp_path / 'checkpoints'}: File too large; earlier "
        "checkpoints are untouched; make room or choose another --run.directory"
        for step in (2, 3)
    ]
    assert left == "['step_00000001']"
