"""Losses and gradients that are not finite, or spikes: not applied, told, and the run goes on as it was asked."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.data.batch import map_batch
from jaxtron.data.loader import Loader
from jaxtron.optim.config import HealthConfig
from jaxtron.optim.guard import after_step, initial_health, is_good
from jaxtron.run.step import Trainer
from tests.support.command_runs import run_here, small
from tests.support.commands import Ended

ROWS = 8
STEPS = 12
# a rate that does not depend on the number of steps
CONSTANT = ("--optimizer.schedule", "constant")
FIGURES = ("loss", "gradient_norm", "learning_rate")


def train(folder: Path, name: str, *more: str) -> Ended:
    flags = [*small(folder, run=name), "--train.steps", str(STEPS), "--checkpoint.every", "4", "--checkpoint.keep", "9"]
    return run_here(*flags, "--train.sample_tokens", "0", "--run.log_every", "1", *more)


def lines(folder: Path, name: str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / file).read_text().splitlines()]


def figures(folder: Path, name: str) -> list[dict[str, Any]]:
    return [{what: line[what] for what in FIGURES} for line in lines(folder, name)]


def events(folder: Path, name: str) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in lines(folder, name, "events.jsonl")]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[int]]:
    """Makes weights NaN of the batches that begin with these samples, which it returns: a set that may be cleared."""

    def planted(*starts: int) -> set[int]:
        original, left = Loader.__next__, set(starts)

        def spoilt(self: Loader):
            batch = original(self)
            if batch.start not in left:
                return batch
            arrays = map_batch(
                lambda field, array: array if field.normalizer is None else np.full_like(array, np.nan), batch.arrays
            )
            return replace(batch, arrays=arrays)

        monkeypatch.setattr(Loader, "__next__", spoilt)
        return left

    return planted


def without(folder: Path, name: str, first: int, end: int, steps: int) -> list[dict[str, Any]]:
    """What a run logs that passes over these samples, with so many steps."""
    assert train(folder, name, "--data.skip", f"[[{first}, {end}]]", "--train.steps", str(steps), *CONSTANT).code == 0
    return figures(folder, name)


@pytest.mark.slow
@pytest.mark.usual_emitters
def test_skipped_steps_change_nothing(tmp_path: Path, plant: Callable[..., set[int]]):
    planted = plant(6 * ROWS)
    ended = train(tmp_path, "run", "--train.health.on_bad", "skip", *CONSTANT)
    assert ended.code == 0 and ended.err == ""
    assert "step 7: loss nan, gradient norm nan: not applied\n" in ended.out
    assert f"bad steps        1 (not applied: {tmp_path / 'run' / 'events.jsonl'})\n" in ended.out
    assert events(tmp_path, "run") == [
        *(("checkpoint", 4), ("bad_step", 7), ("checkpoint", 8), ("checkpoint", 12), ("complete", 12)),
    ]
    bad = lines(tmp_path, "run", "events.jsonl")[1]
    # JSON has no NaN
    assert (bad["samples"], bad["loss"], bad["finite"]) == ([6 * ROWS, 7 * ROWS], None, False)
    found = figures(tmp_path, "run")
    assert [line["bad_steps"] for line in lines(tmp_path, "run")] == [0] * 6 + [1] * 6
    # bit by bit as if the batch had never been
    planted.clear()
    assert found[:6] + found[7:] == without(tmp_path, "other", 6 * ROWS, 7 * ROWS, STEPS - 1)


@pytest.mark.usual_emitters
def test_a_run_that_goes_back_leaves_the_window_out(tmp_path: Path, plant: Callable[..., set[int]]):
    planted = plant(6 * ROWS)
    ended = train(tmp_path, "run", "--train.health.on_bad", "rewind", *CONSTANT)
    assert ended.code == 0 and ended.err == ""
    assert f"back to step 4, and on with sample {7 * ROWS}\n" in ended.out
    assert events(tmp_path, "run") == [
        *(("checkpoint", 4), ("bad_step", 7), ("rewind", 7), ("checkpoint", 8), ("checkpoint", 12), ("complete", 12)),
    ]
    assert lines(tmp_path, "run", "events.jsonl")[2]["position"] == 7 * ROWS
    assert [line["step"] for line in lines(tmp_path, "run")] == list(range(1, STEPS + 1))
    planted.clear()
    assert figures(tmp_path, "run") == without(tmp_path, "other", 4 * ROWS, 7 * ROWS, STEPS)
    # one line of a command
    assert len(lines(tmp_path, "run", "history.jsonl")) == 1


@pytest.mark.slow
def test_a_run_goes_back_to_its_beginning_where_nothing_was_saved(tmp_path: Path, plant: Callable[..., set[int]]):
    planted = plant(ROWS)
    assert train(tmp_path, "run", "--train.health.on_bad", "rewind", "--train.steps", "3", *CONSTANT).code == 0
    planted.clear()
    assert figures(tmp_path, "run") == without(tmp_path, "other", 0, 2 * ROWS, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "starts", "message"),
    [
        ("--train.health.on_bad skip --train.health.patience 2", (5, 6, 7), "step 7: loss nan, gradient norm nan: not "
         "applied, nor were the 1 before it (train.health.patience 2)"),
        ("--train.health.on_bad rewind --train.health.patience 2", (5, 6, 7, 8), "step 5 was not applied, and going "
         "back to step 4 has not helped 3 times (train.health.patience 2)"),
        ("--train.health.gradient_spike 5 --train.health.window 3", (5,), "not applied"),
    ],
)  # fmt: skip
def test_a_run_that_does_not_mend_ends(
    settings: str, starts: tuple[int, ...], message: str, tmp_path: Path, plant: Callable[..., set[int]]
):
    plant(*(start * ROWS for start in starts))
    ended = train(tmp_path, "run", *settings.split())
    assert ended.code == 2 and ended.err.count("\n") == 1 and message in ended.err, ended
    # one whose every next step is bad may be so itself
    left = "the checkpoint of step 4 has diverged" if "rewind" in settings else "(the checkpoint of step 4 is kept)"
    assert left in ended.err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004"]


@pytest.mark.slow
def test_a_spike_is_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = Trainer.loss_and_gradients

    def with_a_bit_flipped(self: Trainer, params, batch, step, scale):
        reported, gradients = original(self, params, batch, step, scale)
        factor = jnp.where(step == 8, jnp.float32(1000), jnp.float32(1))
        return reported, jax.tree.map(lambda gradient: gradient * factor, gradients)

    monkeypatch.setattr(Trainer, "loss_and_gradients", with_a_bit_flipped)
    guard = "--train.health.on_bad skip --train.health.gradient_spike 20 --train.health.window 4"
    assert train(tmp_path, "run", *guard.split()).code == 0
    assert [line["bad_steps"] for line in lines(tmp_path, "run")] == [0] * 8 + [1] * 4
    # the norm before it was clipped is what is told
    norms = [line["gradient_norm"] for line in lines(tmp_path, "run")]
    assert norms[8] > 100 * norms[7]


@pytest.mark.slow
def test_a_guard_goes_on_from_a_checkpoint_and_begins_where_there_was_none(tmp_path: Path):
    spikes = "--train.health.gradient_spike 50 --train.health.window"
    assert train(tmp_path, "whole", *spikes.split(), "3").code == 0
    assert train(tmp_path, "run", *spikes.split(), "3", "--train.steps", "6", *CONSTANT).code == 0
    # another window, none, one again
    for steps, more in ((8, f"{spikes} 5"), (10, ""), (11, spikes + " 2"), (12, spikes + " 2")):
        ended = train(tmp_path, "run", "--train.steps", str(steps), *more.split(), *CONSTANT)
        assert ended.code == 0 and "found: continuing" in ended.out, ended
    assert [line["loss"] for line in lines(tmp_path, "run")][:2] == [line["loss"] for line in lines(tmp_path, "whole")][
        :2
    ]


def test_medians_are_of_the_last_good_steps():
    config = HealthConfig(on_bad="skip", gradient_spike=3, loss_spike=2, window=4)
    state, verdicts = initial_health(config), []
    seen = [(2, 100), (2, 1), (2, 1), (2, 1), (2, 4), (2, 3), (5, 1), (np.nan, 1), (2, np.inf), (2, 1), (4, 1)]
    for loss, norm in seen:
        good = is_good(state, jnp.float32(loss), jnp.float32(norm), config)
        state = after_step(state, good, jnp.float32(loss), jnp.float32(norm))
        verdicts.append(bool(good))
    assert verdicts == [True] * 4 + [False, True, False, False, False, True, True]
    assert (int(state.good), int(state.bad), int(state.row)) == (7, 4, 0)
    assert sorted(np.asarray(state.losses).tolist()) == [2, 2, 2, 4]
