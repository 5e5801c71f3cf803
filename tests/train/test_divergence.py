"""A training that diverges leaves nothing of it, and says where to go back to."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.config import UserError, dump, load
from jaxtron.data.loader import Loader
from jaxtron.evaluate import __main__ as evaluate
from jaxtron.optim.config import LossScaleConfig
from jaxtron.optim.loss_scale import LossScale
from jaxtron.run.configuration import Configuration
from jaxtron.run.metrics import MetricsTally
from jaxtron.run.state import TrainState
from jaxtron.train.divergence import Watch
from jaxtron.train.hooks import HookList, StepInfo
from jaxtron.train.loop import Saver
from jaxtron.train.setup import open_run
from tests.support.command_runs import contents, run_here, small
from tests.support.commands import Ended, run_main

ADVICE = "lower --optimizer.learning_rate or raise --optimizer.warmup_steps"


def assert_one_line(ended: Ended, *parts: str) -> None:
    assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended
    for part in parts:
        assert part in ended.err


def test_the_last_update_counts_too(tmp_path: Path):
    # the loss of the second step, from before its update, is finite still
    flags = ["--train.steps", "2", "--optimizer.learning_rate", "1e9", "--optimizer.warmup_steps", "1"]
    ended = run_here(*small(tmp_path), *flags)
    assert_one_line(ended, f"{ADVICE} (no checkpoint was saved)")
    assert re.match("error: the validation loss is (nan|inf) after step 2; ", ended.err)
    assert not list(tmp_path.glob("run/checkpoints/*"))
    began, last = map(json.loads, (tmp_path / "run" / "history.jsonl").read_text().splitlines())
    assert began["step"] == 0 and (last["step"], last["ended"]) == (2, "diverged")
    assert last["reason"] == ended.err.removeprefix("error: ").rstrip()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints: of step 1 good, of step 2 with weights too large, of step 3 with NaN."""
    folder = tmp_path_factory.mktemp("diverged")
    config = load(Configuration, None, flags(folder, "run"))
    with open_run(config, "run") as run:
        run.save(1, run.state, 8, MetricsTally())
        run.save(2, scaled(run.state, 2, 1e20), 16, MetricsTally())
        run.save(3, scaled(run.state, 3, np.nan), 24, MetricsTally())
    (folder / "run" / "config.yaml").write_text(dump(config.resolved()))
    return folder


def flags(folder: Path, run: str, **settings: object) -> list[str]:
    given = {"checkpoint.keep": 9, "train.steps": 3, **settings}
    return [*small(folder, run=run), *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


def scaled(state, step: int, factor: float):
    """The state after so many steps, as large."""
    params = jax.tree.map(lambda leaf: leaf * jnp.float32(factor), state.params)
    return dataclasses.replace(state, step=jnp.int32(step), params=params)


def copied(folder: Path, name: str, *, steps: int) -> Path:
    """A copy of the run with its first checkpoints."""
    shutil.copytree(folder / "run", folder / name)
    for path in sorted(folder.glob(f"{name}/checkpoints/step_*"))[steps:]:
        shutil.rmtree(path)
    return folder / name


def test_a_state_that_is_not_finite_is_never_saved(saved: Path):
    config = load(Configuration, None, flags(saved, "unsaved"))
    with open_run(config, "run") as run:
        run.save(1, run.state, 8, MetricsTally())
        saver = Saver(run, Mock(spec=Loader), Watch(run.checkpoints, every=10, loss_scale=None), None, HookList())
        for factor, message in ((np.nan, r"params\.\S+ has numbers that are not finite"), (1e20, "the loss is nan")):
            state = scaled(run.state, 2, factor)
            with pytest.raises(
                UserError, match=rf"{message} after step 2; {ADVICE} \(the checkpoint of step 1 is kept"
            ):
                # a run that is to stop does not wait for the loss
                (saver.save if factor != factor else saver.after)(StepInfo(2, 3, state))
        assert run.checkpoints.steps() == [1]


def test_a_checkpoint_that_is_not_finite_is_not_resumed_from(saved: Path):
    run = copied(saved, "not_finite", steps=3)
    before = contents(run)
    path = run / "checkpoints" / "step_00000003"
    way = f"the checkpoint of step 3 has diverged; delete {path} to go back to that of step 2, and {ADVICE}"
    assert_one_line(run_here(*flags(saved, run.name)), "params.", "has numbers that are not finite after step 3", way)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("sample_tokens", "message"),
    [(0, "the validation loss is nan after step 2"), (4, "no text after step 2, the logits of token 1 are not finite")],
)
def test_a_finished_run_that_predicts_nothing(saved: Path, sample_tokens: int, message: str):
    run = copied(saved, f"finished_{sample_tokens}", steps=2)
    settings = {"train.steps": 2, "train.sample_tokens": sample_tokens}
    path = run / "checkpoints" / "step_00000002"
    assert_one_line(
        run_here(*flags(saved, run.name, **settings)), message, f"delete {path} to go back to that of step 1"
    )
    assert not (run / "loss.png").exists()


def test_evaluation_names_the_checkpoint_before(saved: Path):
    run, text = saved / "run", saved / "text.txt"
    ended = run_main(evaluate.main, [run, "--text", text, "--json", saved / "figures.json"])
    assert_one_line(ended, "the checkpoint of step 3", "params.", "go back to the one before with --step 2")
    ended = run_main(evaluate.main, [run, "--text", text, "--step", 2, "--json", saved / "figures.json"])
    assert_one_line(ended, "the checkpoint of step 2", "its loss is nan", "go back to the one before with --step 1")
    assert not (saved / "figures.json").exists()


def losses(watch: Watch, *steps: tuple[float, float], first: int = 1) -> None:
    for number, (loss, norm) in enumerate(steps, first):
        watch(StepInfo(number, 100, None, {"loss": jnp.float32(loss), "gradient_norm": jnp.float32(norm)}))


@pytest.fixture
def checkpoints(tmp_path: Path):
    found = Checkpoints(tmp_path / "run", CheckpointConfig())
    yield found
    found.close()


def test_the_first_step_that_is_not_finite_is_named(checkpoints: Checkpoints):
    watch = Watch(checkpoints, every=5, loss_scale=None)
    losses(watch, *[(2.0, 1.0)] * 6)
    checkpoints.save(6, {"a": jnp.ones(2)}, {})
    message = rf"^step 8: loss nan, gradient norm 1\.0; {ADVICE} \(the checkpoint of step 6 is kept\)$"
    with pytest.raises(UserError, match=message):
        losses(watch, (2.0, 1.0), (np.nan, 1.0), (np.nan, np.nan), (2.0, 1.0), first=7)


@pytest.mark.parametrize("bad", [(np.inf, 1.0), (2.0, np.inf), (2.0, np.nan)])
def test_a_checkpoint_whose_next_step_is_not_finite_is_no_place_to_go_back_to(checkpoints: Checkpoints, bad):
    checkpoints.save(3, {"a": jnp.ones(2)}, {})
    checkpoints.save(4, {"a": jnp.ones(2)}, {})
    message = (
        r"^step 5: loss .*: the checkpoint of step 4 has diverged; delete \S+/step_00000004 to go back to .* step 3"
    )
    with pytest.raises(UserError, match=message):
        losses(Watch(checkpoints, every=5, loss_scale=None), bad, first=5)


def overflow(watch: Watch, steps: range, row: int, *, scale: float, skipped: int) -> None:
    """The steps overflow; after each, so many steps in a row have (below zero) or have not."""
    state = LossScale(jnp.float32(scale), jnp.int32(row), jnp.int32(0))
    for step in steps:
        metrics = {"loss": jnp.float32(2), "gradient_norm": jnp.float32(np.inf), "skipped_steps": jnp.int32(skipped)}
        done = jnp.int32(step)
        fields = {"params": {}, "frozen": {}, "buffers": {}, "optimizer": ()}
        watch(StepInfo(step, 60, TrainState(done, done, **fields, loss_scale=state), metrics))


def test_an_overflow_of_gradients_is_the_loss_scales_to_handle(checkpoints: Checkpoints):
    config = LossScaleConfig(minimum=2.0, hysteresis=3)
    watch = Watch(checkpoints, every=1, loss_scale=config)
    overflow(watch, range(1, 40), -22, scale=2.0, skipped=39)
    overflow(watch, range(40, 61), 5, scale=2.0, skipped=59)
    with pytest.raises(UserError, match="^step 1: loss nan"):
        losses(Watch(checkpoints, every=1, loss_scale=config), (np.nan, 1.0))


@pytest.mark.parametrize(
    ("step", "row", "scale", "message"),
    [
        (
            50,
            -23,
            2.0,
            r"^the 23 steps up to step 50 were skipped: .* of 2; lower --train.loss_scale.minimum below 2, or",
        ),
        (
            50,
            -23,
            0.5,
            rf"^the 23 steps up to step 50 were skipped: .* of 0.5; {ADVICE}, or set --train",
        ),
        (60, -4, 2.0, r"^all steps up to step 60 were skipped: .*\(no checkpoint was saved\)$"),
    ],
)
def test_overflows_without_end_are_an_error(checkpoints: Checkpoints, step: int, row: int, scale: float, message: str):
    watch = Watch(checkpoints, every=5, loss_scale=LossScaleConfig(minimum=2.0, hysteresis=3))
    with pytest.raises(UserError, match=message):
        overflow(watch, range(step, step + 1), row, scale=scale, skipped=60)


def test_a_run_whose_every_step_is_skipped(tmp_path: Path):
    flags = "--train.steps 30 --train.precision fp16 --train.loss_scale.initial 1e12 --train.loss_scale.minimum 1e12"
    ended = run_here(*small(tmp_path), *flags.split(), "--train.validate_every", "0")
    assert_one_line(ended, "the 22 steps up to step 22 were skipped", "lower --train.loss_scale.minimum below 1e+12")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == list(range(1, 22))
    assert "loss 5." in ended.out and "skipped 1 " in ended.out
    assert not list(tmp_path.glob("run/checkpoints/*"))
    began, last = map(json.loads, (tmp_path / "run" / "history.jsonl").read_text().splitlines())
    assert began["step"] == 0 and (last["step"], last["ended"]) == (22, "diverged")
    assert last["reason"] == ended.err.removeprefix("error: ").rstrip()
