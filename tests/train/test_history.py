"""The record of a run: what may change when it goes on, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from jaxtron.checkpoint import record as records
from jaxtron.config import UserError, load
from jaxtron.run.configuration import Configuration
from jaxtron.run.history import Continuation, Recorder, changes, check_changes, kind_of, recorded_settings
from tests.support.command_runs import FinishedRun, run_here


def config(*flags: str) -> Configuration:
    return load(Configuration, None, flags).resolved()


def changed(old: tuple[str, ...], new: tuple[str, ...]) -> list[str]:
    return [str(change) for change in changes(config(*old).model_dump(mode="json"), config(*new))]


def test_what_adapters_drop_may_change_and_an_older_record_had_no_dropout():
    flags = ("--train.lora.rank", "4")
    recorded = config(*flags).model_dump(mode="json")
    del recorded["train"]["lora"]["dropout"]
    assert changes(recorded, config(*flags)) == []
    (found,) = changes(recorded, config(*flags, "--train.lora.dropout", "0.1"))
    assert (str(found), found.kind) == ("train.lora.dropout 0.0 -> 0.1", "free")
    (found,) = changes(recorded, config("--train.lora.rank", "8"))
    assert (found.name, found.kind) == ("train.lora.rank", "fixed")


@pytest.mark.parametrize(
    ("flags", "kind", "said"),
    [
        ("--model.activation relu", "fixed", "model.activation gelu_tanh -> relu"),
        ("--model.position rotary --model.rotary.base 5e5", "fixed", "model.rotary.base 10000.0 -> 500000.0"),
        ("--model.attention.soft_cap 5", "fixed", "model.attention.soft_cap none -> 5.0"),
        ("--model.dropout 0.1", "fixed", "model.dropout 0.0 -> 0.1"),
        ("--data.mask_end_of_document", "fixed", "data.mask_end_of_document false -> true"),
        ("--optimizer.name sgd", "fixed", "optimizer.name adamw -> sgd"),
        ("--data.path elsewhere", "content", "data.path python:stdlib -> elsewhere"),
        ("--mesh.tensor 2", "free", "mesh.tensor 1 -> 2"),
        (
            "--mesh.fsdp 2 --mesh.context 2 --mesh.order pipe data context fsdp tensor",
            "free",
            "mesh.order [pipe, data, fsdp, context, tensor] -> [pipe, data, context, fsdp, tensor]",
        ),
        (
            "--train.batch_ramp.start 8 --train.batch_ramp.increment 8 --train.batch_ramp.samples 99",
            "free",
            "train.batch_ramp none -> {start: 8, increment: 8, samples: 99}",
        ),
        ("--optimizer.learning_rate 1e-3", "free", "optimizer.learning_rate 0.0003 -> 0.001"),
        ("--model.recompute full", "free", "model.recompute none -> full"),
    ],
)
def test_changes(flags: str, kind: str, said: str):
    found = changes(config().model_dump(mode="json"), config(*flags.split()))
    change = next(change for change in found if str(change) == said)
    assert change.kind == kind
    if kind == "fixed":
        with pytest.raises(UserError, match=f"^runs/x was trained with other settings: .*{change.name} .*; give the"):
            check_changes(found, "runs/x")
    else:
        check_changes(found, "runs/x")


def test_the_same_in_other_words_is_no_change_of_the_function():
    long = ("--model.num_layers", "1", "--model.pattern", "*-*-|*-*-")
    assert changed(("--model.num_layers", "4"), long) == []
    spelled = "--model.num_kv_heads 12 --model.head_dim 64 --model.mlp_size 3072 --model.qkv_bias true"
    assert changed((), tuple(spelled.split())) == []
    hybrid = ("--model.hybrid", "0.25", "0.25", "4")
    assert changed(hybrid, ("--model.num_layers", "1", "--model.pattern", "MM*-")) == []
    for pattern, words in (
        ("Mm", "--model.mamba.num_heads 24 --model.mamba.norm_groups 8 --model.mamba.dt_rank 48"),
        ("*E", "--model.moe.expert_size 3072 --model.moe.bias true"),
    ):
        kinds = ("--model.pattern", pattern, "--model.position", "none")
        assert changed(kinds, (*kinds, *words.split())) == []
    assert changed(("--model.num_layers", "3"), long) == ["model.pattern *- -> *-*-|*-*-", "model.num_layers 3 -> 1"]


def test_where_a_command_runs_is_no_change():
    assert changed((), ("--run.directory", "moved", "--devices", "8", "--checkpoint.resume", "false")) == []


def test_a_setting_that_a_record_does_not_know_had_its_default():
    recorded = config("--model.bias", "false").model_dump(mode="json")
    del recorded["model"]["z_loss"], recorded["context"]
    recorded["model"]["no_longer_there"] = 1
    assert [str(change) for change in changes(recorded, config("--model.z_loss", "0.5"))] == [
        "model.bias false -> true",
        "model.z_loss 0.0 -> 0.5",
    ]


def test_a_setting_that_is_forgotten_may_not_change():
    assert (kind_of("model.brand_new"), kind_of("train.batch_ramp.start"), kind_of("runtime")) == (
        "fixed",
        "free",
        "fixed",
    )


def test_what_is_said_of_a_continuation(tmp_path: Path):
    old = config("--train.steps", "100", "--optimizer.learning_rate", "1e-3")
    extra = {"settings": old.model_dump(mode="json")}
    same = Continuation.of(extra, old, tmp_path, step=50)
    assert same.text(50, 100) == "checkpoint of step 50 found: continuing"
    assert same.text(100, 100) == "checkpoint of step 100 found: complete already"
    assert "step 150 found, beyond train.steps 100: nothing to train" in same.text(150, 100)
    longer = Continuation.of(
        extra, config("--train.steps", "200", "--optimizer.learning_rate", "1e-3"), tmp_path, step=50
    )
    assert longer.text(50, 200).splitlines() == [
        "checkpoint of step 50 found: continuing with train.steps 100 -> 200",
        "learning rate of step 51: 0.0005 by the earlier settings, 0.000854 now",
    ]
    unknown = Continuation.of({}, old, tmp_path, step=50)
    assert unknown.text(50, 100).splitlines()[1].startswith("nobody wrote down what trained it")


def test_the_history_grows_and_a_line_cut_short_does_not_spoil_the_next(tmp_path: Path):
    found = changes(config().model_dump(mode="json"), config("--train.steps", "7"))
    for first_step in (0, 5):
        notes = ["conversations: 9 read, 8 kept"]
        recorder = Recorder(tmp_path, config("--train.steps", "7"), found, first_step=first_step, notes=notes)
        recorder()
        recorder()
        with (tmp_path / "history.jsonl").open("a") as file:
            file.write('{"time": "2026')
    first, cut, second, _ = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in (first, second)] == [0, 5] and cut == '{"time": "2026'
    assert json.loads(second)["changes"] == {"train.steps": [1000, 7]} and json.loads(second)["data"] == notes
    assert load(Configuration, tmp_path / "config.yaml").train.steps == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "history.jsonl"]


def forget_settings(directory: Path) -> None:
    """Makes the checkpoints of a run those of a version that kept no settings in them, and no history."""
    (directory / "history.jsonl").unlink()
    for path in directory.glob("checkpoints/step_*"):
        record = records.read(path)
        extra = {name: value for name, value in record.extra.items() if name in ("position", "data", "seed")}
        records.write(dataclasses.replace(record, extra=extra), path)


def test_a_run_of_an_older_version_is_held_to_its_configuration_file(finished: FinishedRun, tmp_path: Path):
    old = tmp_path / "run"
    shutil.copytree(finished.directory, old)
    forget_settings(old)
    flags = [*finished.flags, "--run.directory", str(old), "--train.sample_tokens", "0"]
    ended = run_here(*flags, "--model.activation", "relu")
    assert ended.code == 2 and f"{old} was trained with other settings: model.activation gelu_tanh -> relu" in ended.err
    assert "complete already" in run_here(*flags).out and not (old / "history.jsonl").exists()
    # without any settings only arrays and data are compared
    (old / "config.yaml").unlink()
    ended = run_here(*flags, "--optimizer.name", "sgd")
    assert ended.code == 2 and " is of another optimizer: it has " in ended.err
    assert "complete already" in run_here(*flags).out and not (old / "config.yaml").exists()
    assert recorded_settings({}, old) is None
