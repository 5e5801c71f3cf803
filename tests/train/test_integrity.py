"""Devices that compute wrong: a step that differs from itself, copies that differ from each other."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtron.api.settings import load
from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.config import UserError
from jaxtron.data.batch import map_batch
from jaxtron.optim.config import HealthConfig
from jaxtron.run.batches import abstract_batch
from jaxtron.run.session import RunSession, make_session
from jaxtron.train.integrity.places import Places
from jaxtron.train.integrity.replay import differing
from jaxtron.train.integrity.replicas import Replicas, odd_ones
from tests.support.command_runs import records, run_here, small
from tests.support.commands import Ended
from tests.support.flips import flipped_on

CONFIG = {
    "model": {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "vocab_size": 60},
    "data": {"sequence_length": 16},
    "train": {"global_batch": 8},
}
STEPS = 4
ODD = 5


def train(folder: Path, name: str, *more: str) -> Ended:
    flags = [*small(folder, run=name), "--train.steps", str(STEPS), "--checkpoint.every", "2", "--checkpoint.keep", "9"]
    return run_here(*flags, "--train.sample_tokens", "0", *more)


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "events.jsonl").read_text().splitlines()]


@pytest.fixture
def wrong_device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The first of two computations of a step sees other tokens on one device: its results differ there first."""

    def planted(times: int = 1) -> None:
        original, calls = RunSession.checksums, []

        def spoilt(self: RunSession, state, batch):
            calls.append(1)
            if len(calls) % 2 == 0 or len(calls) > 2 * times:
                return original(self, state, batch)
            device = self.mesh.devices.flat[ODD]
            return original(self, state, map_batch(lambda _, array: _other_row(array, device), batch))

        monkeypatch.setattr(RunSession, "checksums", spoilt)

    return planted


def _other_row(array: jax.Array, device: jax.Device) -> jax.Array:
    return flipped_on(array, device, place=3) if array.dtype.kind == "i" else array


def test_a_step_that_differs_from_itself_names_the_device(tmp_path: Path, wrong_device: Callable[..., None]):
    assert train(tmp_path, "whole").code == 0
    replays = ("--train.health.replay_every", "2")
    assert train(tmp_path, "replayed", *replays).code == 0
    # the steps are the same whether they are looked at or not
    assert records(tmp_path / "replayed") == records(tmp_path / "whole")
    wrong_device()
    ended = train(tmp_path, "stopped", *replays)
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert (
        "step 2 was computed twice from the same state, and its part of the loss differs on device 5 of " in ended.err
    )
    assert "no checkpoint was saved" in ended.err
    (event,) = events(tmp_path, "stopped")
    assert (event["event"], event["step"], event["devices"]) == ("replay_differs", 2, [ODD])


@pytest.mark.slow
def test_what_becomes_of_a_step_that_differs(tmp_path: Path, wrong_device: Callable[..., None]):
    assert train(tmp_path, "whole").code == 0
    wrong_device()
    skip = ("--train.health.replay_every", "1", "--train.health.on_bad", "skip")
    assert train(tmp_path, "told", *skip).code == 0
    names = ("step", "tokens", "loss", "gradient_norm")
    kept = [{name: line[name] for name in names} for line in records(tmp_path / "whole")]
    assert [{name: line[name] for name in names} for line in records(tmp_path / "told")] == kept
    wrong_device(times=3)
    ended = train(tmp_path, "often", *skip, "--train.health.patience", "3")
    assert ended.code == 2 and "step 3 was computed twice" in ended.err and "no. 3 in a row" in ended.err
    wrong_device()
    rewind = ("--train.health.replay_every", "3", "--train.health.on_bad", "rewind")
    ended = train(tmp_path, "back", *rewind)
    assert ended.code == 0 and "back to step 2, and on with sample 16\n" in ended.out
    # the data were not at fault, and none are left out
    assert [{name: line[name] for name in names} for line in records(tmp_path / "back")] == kept


def test_copies_that_differ_name_the_odd_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = RunSession.step

    def spoilt(self: RunSession, state, batch):
        state, metrics = original(self, state, batch)
        if int(state.step) == 3:
            scale = state.params["final_norm"]["scale"]
            odd = flipped_on(scale, self.mesh.devices.flat[ODD], place=7, bit=0)
            state = replace(state, params={**state.params, "final_norm": {**state.params["final_norm"], "scale": odd}})
        return state, metrics

    assert train(tmp_path, "well", "--train.health.compare_every", "1").code == 0
    monkeypatch.setattr(RunSession, "step", spoilt)
    # not a step of its own: before the checkpoint of step 4 all the same
    ended = train(tmp_path, "odd", "--train.health.compare_every", "3")
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert "after step 3 params.final_norm.scale should be the same on several devices" in ended.err
    assert "differs on device 5 of " in ended.err and "the checkpoint of step 2 is kept" in ended.err
    assert [(line["event"], line["step"]) for line in events(tmp_path, "odd")] == [
        *(("checkpoint", 2), ("replicas_differ", 3)),
    ]
    ended = train(tmp_path, "saved", "--train.health.compare_every", "100")
    assert ended.code == 2 and "after step 4 " in ended.err
    assert not (tmp_path / "saved" / "checkpoints" / "step_00000004").exists()


def test_nothing_to_compare_is_told(tmp_path: Path):
    session = make_session(load(CONFIG), jax.devices()[:1])
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), writes=False)
    with session.use(), pytest.raises(UserError, match="compare_every 1 has no effect with devices 1: no two devices"):
        Replicas(session, checkpoints, Places.of(session.mesh), HealthConfig(compare_every=1), lambda *_: None)
    checkpoints.close()


def test_the_odd_one_is_not_of_the_most():
    first = np.array([[0, 0], [0, 1], [0, 0], [0, 1], [0, 0]])
    sums = np.array([[7, 1], [7, 2], [8, 1], [7, 2], [7, 1]], np.uint32)
    assert np.argwhere(odd_ones(sums, first)).tolist() == [[2, 0]]
    # the first copy may be the odd one; of two nobody knows which
    sums = np.array([[6, 1], [7, 2], [7, 1], [7, 3], [7, 1]], np.uint32)
    assert np.argwhere(odd_ones(sums, first)).tolist() == [[0, 0], [1, 1], [3, 1]]
    assert not odd_ones(np.ones((5, 2), np.uint32), first).any()


def test_a_difference_is_told_where_it_begins():
    first = np.zeros((4, 3), np.uint32)
    second = first.copy()
    assert differing(first, second) is None
    second[:, 2] = 1
    assert differing(first, second) == (2, [0, 1, 2, 3])
    second[3, 1] = 1
    assert differing(first, second) == (1, [3])


def test_the_compiled_step_knows_nothing_of_it():
    texts = []
    for health in ({}, {"replay_every": 2, "compare_every": 2}):
        session = make_session(load(CONFIG, train={"health": health}), jax.devices())
        with session.use():
            batch = abstract_batch(session.config)
        texts.append(session.lower_step(session.abstract_state(), batch).as_text())
    assert texts[0] == texts[1]
