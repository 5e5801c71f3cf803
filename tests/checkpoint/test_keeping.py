"""Which checkpoints stay: the newest, multiples, the best by validation; never fewer than what a run goes on from."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.keeping import LOSS, kept_steps
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.checkpoint.storage import RecordingHandler

LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 8: None, 10: 4.0, 12: 1.0, 14: float("nan")}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"keep": 1}, {14}),
        ({"keep": 9}, set(LOSSES)),
        ({"keep": 1, "every": 2, "keep_every": 6}, {6, 12, 14}),
        # of equal losses the later; numbers that are not known or not finite are no best ones
        ({"keep": 1, "keep_best": 1}, {12, 14}),
        ({"keep": 1, "keep_best": 3}, {4, 6, 12, 14}),
        ({"keep": 1, "keep_best": 9}, {2, 4, 6, 10, 12, 14}),
        ({"keep": 2, "every": 2, "keep_every": 8, "keep_best": 1}, {8, 12, 14}),
    ],
)
def test_what_is_kept(settings: dict[str, int], expected: set[int]):
    assert kept_steps(LOSSES, CheckpointConfig(**settings)) == expected


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Callable[..., Checkpoints]]:
    made = []

    def make(**settings) -> Checkpoints:
        made.append(Checkpoints(tmp_path / "checkpoints", CheckpointConfig(asynchronous=False, **settings)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_best_are_known_to_the_command_that_goes_on(checkpoints, make_state, one_device):
    written, state = checkpoints(keep=1, keep_best=1), make_state(one_device)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, None)):
        written.save(step, state, {LOSS: loss})
    assert written.steps() == [2, 4] and written.take_removed() == [1, 3] and written.take_removed() == []
    later = checkpoints(keep=1, keep_best=1)
    later.save(5, state, {LOSS: 1.5})
    assert later.steps() == [2, 5] and later.take_removed() == [4]
    later.save(6, state, {LOSS: 0.5})
    assert later.steps() == [6]
    assert [path.name for path in later.directory.iterdir()] == ["step_00000006"]


def test_the_one_that_was_restored_stays_until_another_is_whole(
    checkpoints, make_state, abstract, one_device, monkeypatch
):
    state = make_state(one_device)
    written = checkpoints(keep=2)
    for step in (1, 2):
        written.save(step, state, {})
    # the newest is lost after it was written: it is no reason to delete the one before it
    shutil.rmtree(written.directory / "step_00000002" / "d")
    commit, finalize = threading.Event(), RecordingHandler.finalize

    def held(self, directory):
        assert commit.wait(20)
        finalize(self, directory)

    monkeypatch.setattr(RecordingHandler, "finalize", held)
    later = Checkpoints(written.directory, CheckpointConfig(keep=1))
    restored = later.go_back(abstract(state, one_device))
    assert restored is not None and restored.step == 1
    # the same step as the damaged one, which is moved aside and not taken for this
    later.save(2, state, {})
    assert later.steps() == [1] and (later.directory / "step_00000001" / "jaxtron.json").exists()
    commit.set()
    later.wait()
    assert later.steps() == [2] and later.take_removed() == [1]
    later.close()


def test_settings_that_would_keep_nothing_are_refused():
    with pytest.raises(ValueError, match=r"keep_every 5 is not a multiple of checkpoint.every 2,.* set it to 6"):
        CheckpointConfig(every=2, keep_every=5)
    with pytest.raises(ValueError, match=r"checkpoint.keep_best 1 has no effect"):
        CheckpointConfig(every=0, keep_best=1)
