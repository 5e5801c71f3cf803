"""`runtime.deterministic`: what it sets, and the same bits from two runs on the same mesh."""

from pathlib import Path

import pytest

from jaxtron.config import UserError
from jaxtron.run.configuration import Configuration
from jaxtron.train.integrity.replay import check_replay
from tests.support.command_runs import end, history, records, run_here, small, start
from tests.support.saved_state import assert_same, values

MESH = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")


def flags(folder: Path) -> list[str]:
    return [
        *small(folder),
        *MESH,
        "--train.steps",
        "3",
        "--train.sample_tokens",
        "0",
        "--runtime.deterministic",
        "true",
    ]


def test_two_runs_on_the_same_mesh_have_the_same_bits(tmp_path: Path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        ended = run_here(*flags(folder))
        assert ended.code == 0 and ended.err == ""
        assert "deterministic: on CPUs a run on the same mesh has the same bits as it is\n" in ended.out
    assert records(folders[0] / "run") == records(folders[1] / "run")
    (_, first, _), (_, second, _) = (values(folder, *flags(folder)[len(small(folder)) :]) for folder in folders)
    assert_same(first, second)
    assert "deterministic: true" in (folders[0] / "run" / "config.yaml").read_text()


@pytest.mark.slow
def test_processes_of_their_own_have_the_same_bits_too(tmp_path: Path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        ended = end(start(*flags(folder), "--devices", "8", cache=tmp_path / "cache"))
        assert ended.code == 0, ended.err
    assert records(folders[0] / "run") == records(folders[1] / "run")
    (_, first, _), (_, second, _) = (values(folder, *flags(folder)[len(small(folder)) :]) for folder in folders)
    assert_same(first, second)
    assert len(history(folders[0] / "run")) == 1


def test_it_sets_what_attention_has():
    config = Configuration(runtime={"deterministic": True})
    assert not config.model.attention.deterministic and config.resolved().model.attention.deterministic
    assert not Configuration().resolved().model.attention.deterministic


def test_a_replay_on_gpus_wants_it():
    check_replay("cpu", 5)
    with pytest.raises(UserError, match="set --runtime.deterministic true"):
        check_replay("gpu", 5)
