"""Runs with pipelines as a user meets them: checkpoints, validation, samples and counts do not know the stages."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxtron.pipeline.schedules.named import make_schedule
from jaxtron.pipeline.schedules.table_file import write_csv
from tests.support import saved_state
from tests.support.command_runs import Ended, end, records, run_here, small, start
from tests.support.saved_state import assert_same

FLAGS = (
    *("--model.num_layers", "6", "--model.dropout", "0.1", "--train.microbatches", "4", "--train.global_batch", "16"),
    *("--train.validate_every", "2", "--train.sample_tokens", "0", "--train.steps", "6"),
    *("--optimizer.decay_steps", "6", "--model.unroll", "1"),
)
INTERLEAVED = ("--mesh.pipe", "2", "--mesh.data", "1", "--mesh.tensor", "2", "--mesh.fsdp", "2")
INTERLEAVED += ("--pipeline.schedule", "interleaved", "--pipeline.chunks", "2")
UNEVEN = ("--mesh.pipe", "4", "--mesh.tensor", "2", "--pipeline.stage_layers", "1", "2", "2", "1")
# with rows that are empty in more than one chunk
VEE = ("--mesh.pipe", "2", "--mesh.tensor", "2", "--mesh.data", "2", "--pipeline.schedule", "zero_bubble_v")
VEE += ("--pipeline.chunks", "2", "--pipeline.stage_layers", "2", "1", "2", "1")
NO_STAGES = ("--mesh.data", "2", "--mesh.tensor", "2", "--mesh.fsdp", "2")


def run(folder: Path, *flags: str, steps: int) -> Ended:
    folder.mkdir(exist_ok=True)
    ended = run_here(*small(folder), *FLAGS, *flags, "--train.steps", str(steps))
    assert ended.code == 0 and ended.err == "", ended
    return ended


def values(folder: Path, *flags: str, save: bool = False) -> tuple[int, dict[str, np.ndarray], int]:
    """Those of the run that continues in the folder."""
    return saved_state.values(folder, *FLAGS, *flags, save=save)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of six steps on one set of stages."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder, *INTERLEAVED, steps=6)
    return folder


# quicker to compile
NO_DROPOUT = ("--model.dropout", "0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two steps without dropout, whose state has all that a longer run's has."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder, *INTERLEAVED, *NO_DROPOUT, steps=2)
    return folder


@pytest.mark.slow
def test_first_values_and_counts_do_not_depend_on_the_stages(tmp_path: Path):
    step, expected, count = values(tmp_path / "none", *NO_STAGES)
    assert step == 0
    parameters = {name: array for name, array in expected.items() if name.startswith(".params")}
    assert count == sum(array.size for array in parameters.values())
    assert {array.shape[0] for name, array in parameters.items() if "stack" in name} == {6}
    for number, layout in enumerate((INTERLEAVED, VEE)):
        _, found, found_count = values(tmp_path / str(number), *layout)
        assert found_count == count
        assert_same(found, expected)


@pytest.mark.slow
def test_a_run_continues_bit_for_bit_on_the_same_stages(undisturbed: Path, tmp_path: Path):
    run(tmp_path, *INTERLEAVED, steps=2)
    ended = run(tmp_path, *INTERLEAVED, steps=6)
    assert "checkpoint of step 2 found: continuing" in ended.out
    assert records(tmp_path / "run") == records(undisturbed / "run")
    assert_same(values(tmp_path, *INTERLEAVED)[1], values(undisturbed, *INTERLEAVED)[1])


@pytest.mark.slow
def test_a_checkpoint_is_the_same_state_on_other_stages_and_without_any(trained: Path, tmp_path: Path):
    _, saved, _ = values(trained, *INTERLEAVED, *NO_DROPOUT)
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copy(trained / "text.txt", tmp_path)
    # each restores what the one before it saved, and the first again what the last did
    for step, layout in enumerate((UNEVEN, VEE, NO_STAGES, INTERLEAVED), 2):
        found_step, found, _ = values(tmp_path, *layout, *NO_DROPOUT, save=True)
        assert found_step == step
        assert_same(found, saved)


@pytest.mark.slow
def test_a_run_continues_on_other_stages_and_without_any(undisturbed: Path, tmp_path: Path):
    run(tmp_path, *INTERLEAVED, steps=2)
    run(tmp_path, *UNEVEN, steps=4)
    one = end(start(*small(tmp_path), *FLAGS, "--devices", "1", "--train.steps", "5", cache=tmp_path))
    assert one.code == 0 and one.err == "" and "checkpoint of step 4 found: continuing" in one.out
    run(tmp_path, *INTERLEAVED, steps=6)
    # the same run, but for rounding
    for found, expected in zip(records(tmp_path / "run"), records(undisturbed / "run"), strict=True):
        for name in ("loss", "gradient_norm", "learning_rate"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4)
        if "validation_loss" in expected:
            assert found["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)


def test_its_configuration_starts_it_again(trained: Path):
    saved = str(trained / "run" / "config.yaml")
    ended = run_here(saved)
    assert ended.code == 0 and "complete already" in ended.out
    # what one stage ignores is left out where the file has it, and refused on the command line
    one_stage = (saved, "--mesh.pipe", "1", "--mesh.data", "2")
    ended = run_here(*one_stage)
    assert ended.code == 0 and "left out: pipeline.schedule interleaved" in ended.out
    assert "complete already" in ended.out
    ended = run_here(*one_stage, "--pipeline.schedule", "interleaved")
    assert ended.code == 2 and "pipeline.schedule interleaved has no effect with mesh.pipe 1" in ended.err


@pytest.mark.slow
def test_a_table_on_file_and_a_pattern_with_cuts_train_and_speak(tmp_path: Path):
    table = tmp_path / "table.csv"
    write_csv(make_schedule("eager_1f1b", 2, 4), table)
    pattern = ("--model.num_layers", "1", "--model.pattern", "*-|*-*-")
    flags = ("--mesh.pipe", "2", "--mesh.tensor", "2", "--pipeline.schedule", str(table), *pattern)
    ended = run(tmp_path, *flags, "--train.sample_tokens", "2", steps=1)
    assert re.search("\nSample\n.+", ended.out)
    _, state, _ = values(tmp_path, *flags)
    # without stages the cuts are none
    assert_same(values(tmp_path, *NO_STAGES, *pattern)[1], state)
    assert_same(values(tmp_path, *NO_STAGES, "--model.num_layers", "3")[1], state)
