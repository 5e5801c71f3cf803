"""The second family by the real commands: trained, saved, gone on with, planned; what it cannot is told in a line."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from jaxtron.config import load
from jaxtron.evaluate.__main__ import main as evaluate
from jaxtron.models import families
from jaxtron.models.families import family_named
from jaxtron.models.family import FamilyConfig
from jaxtron.models.work.model import ModelWork
from jaxtron.models.work.profile import JAXTRON
from jaxtron.models.work.shapes import Shapes
from jaxtron.plan.__main__ import main as plan
from jaxtron.plan.formula.activations import row_bytes
from jaxtron.plan.formula.memory_model import Estimator
from jaxtron.plan.formula.prediction import predict
from jaxtron.plan.formula.workload import shapes_of, work_of
from jaxtron.plan.machine import machine_named
from jaxtron.plan.search.search import search
from jaxtron.run.configuration import Configuration, configuration_of
from jaxtron.sharding.folding import FLAGS
from jaxtron.train.__main__ import main as train
from tests.support.command_runs import FinishedRun, records, run_here, small
from tests.support.commands import Ended, run_main

FAMILY = "tests.toy_family"
# stages of two layers and one of the encoder, so that a slot is empty
SIZES = ["--model.family", FAMILY, "--model.encoder_layers", "3", "--model.decoder_layers", "2"]
PIPE = ["--mesh.pipe", "2", "--pipeline.schedule", "interleaved", "--train.microbatches", "2"]
ONE = dict.fromkeys(FLAGS, 1)
H100 = machine_named("h100")


def configuration(*flags: str) -> Configuration:
    batch = ["--train.global_batch", "16", "--data.sequence_length", "64"]
    return load(configuration_of(FAMILY), None, [*SIZES, *batch, *flags]).resolved()


def planned(*flags: str) -> Ended:
    return run_main(plan, [*SIZES, "--train.global_batch", "16", "--data.sequence_length", "64", *flags])


def trained(folder: Path, *flags: str) -> FinishedRun:
    """Four steps, with checkpoints after the second and the last."""
    # all but the decoder's sizes
    flags = [*SIZES, *small(folder)[6:], "--train.steps", "4", "--checkpoint.every", "2", *flags]
    flags += ["--train.validate_every", "2", "--train.validation_batches", "1"]
    return FinishedRun(flags, folder / "run", run_here(*flags))


def gone_on(run: FinishedRun, folder: Path, *flags: str) -> tuple[Path, Ended]:
    """The run without its last checkpoint, gone on with elsewhere."""
    again = folder / "again"
    shutil.copytree(run.directory, again)
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    return again, run_here(*run.flags, *flags, "--run.directory", str(again))


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A finished run, for looking at, not for changing."""
    return trained(tmp_path_factory.mktemp("toy"), "--mesh.tensor", "2")


def test_it_is_trained_and_validated(toy_run: FinishedRun):
    assert (toy_run.ended.code, toy_run.ended.err) == (0, "") and "Sample" not in toy_run.ended.out
    lines = [json.loads(line) for line in (toy_run.directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[3]["loss"] < lines[0]["loss"]
    for line in lines:
        assert line["loss"] == pytest.approx(line["text"] + line["label"], rel=1e-5) and line["label"] > 0
    assert ["validation_loss" in line for line in lines] == [False, True, False, True]
    config = configuration()
    counted = config.family.num_parameters(config.model, 32)
    assert f"{counted:,} parameters on 8" in toy_run.ended.out


def test_it_goes_on_bit_for_bit(toy_run: FinishedRun, tmp_path: Path):
    again, ended = gone_on(toy_run, tmp_path)
    assert ended.code == 0 and "step 2" in ended.out
    assert records(again) == records(toy_run.directory)
    assert re.findall("validation loss.*", ended.out) == re.findall("validation loss.*", toy_run.ended.out) != []


@pytest.mark.slow
def test_stages_with_empty_slots_go_on_on_another_mesh(tmp_path: Path):
    run = trained(tmp_path, *PIPE)
    again, ended = gone_on(run, tmp_path)
    assert ended.code == 0 and records(again) == records(run.directory)
    shutil.rmtree(again)
    mesh = ["--mesh.pipe", "1", "--pipeline.schedule", "1f1b", "--mesh.fsdp", "2", "--mesh.context", "2"]
    again, ended = gone_on(run, tmp_path, *mesh)
    assert ended.code == 0
    for one, other in zip(records(again), records(run.directory), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)


def test_what_it_cannot_do_is_told_in_a_line(toy_run: FinishedRun, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("some text")
    ended = run_main(evaluate, [toy_run.directory, "--text", text])
    assert ended.code != 0 and ended.out == "" and ended.err.count("\n") == 1
    assert f"has model.family {FAMILY}, which does not predict the tokens of a text" in ended.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train.sample_tokens 50", f"train.sample_tokens 50 has no effect with model.family {FAMILY}: it generates"),
        ("--mesh.expert 2", f"mesh.expert 2 has no effect with model.family {FAMILY}: it has no experts"),
        ("--model.width 0", "model.width: must be greater than or equal to 1, got 0"),
        ("--model.num_layers 2", "model.num_layers"),
        ("--model.widht 8", "model.width?"),
        ("--mesh.tensor 8 --model.width 12", "model.width 12 is not a multiple of mesh.tensor 8; change one"),
        ("--mesh.context 2 --data.sequence_length 1022", "is not a multiple of 2 x mesh.context 2"),
        (
            "--mesh.pipe 2 --train.microbatches 2",
            "1f1b with mesh.pipe 2, pipeline.chunks 1, train.microbatches 2: the model's 2 stacks are "
            "2 chunks of a stage, too many for 1f1b; use interleaved, eager_interleaved, or zero_bubble_v",
        ),
        (
            "--mesh.pipe 4 --pipeline.schedule interleaved",
            "stack 1 of the model's 2 has 3 layers, too few for mesh.pipe 4",
        ),
    ],
)
def test_bad_settings(flags: str, message: str):
    for main in (train, plan):
        asked = ["--schedule"] if main is plan else []
        ended = run_main(main, [*asked, *SIZES, "--devices", "8", "--data.sequence_length", "1024", *flags.split()])
        assert ended.code != 0 and ended.err.count("\n") == 1 and message in ended.err, (main, ended)


def test_help_shows_its_settings():
    for words in (["--help"], ["--help", "model"]):
        ended = run_main(train, ["--model.family", FAMILY, *words])
        assert ended.code == 0 and "--model.encoder_layers" in ended.out and "--model.num_heads" not in ended.out


def test_its_layout_and_schedule():
    layout = planned("--layout", "--devices", "8", *PIPE)
    counted = configuration().family.num_parameters(configuration().model, 64)
    assert (layout.code, layout.err) == (0, "") and f"\n{counted:,} parameters; " in layout.out
    # of the encoder's alone
    assert layout.out.count("are empty") == 1 and "4 rows of layers hold 3" in layout.out
    schedule = planned("--schedule", "--devices", "8", *PIPE)
    assert schedule.code == 0 and "interleaved: 2 stages, 2 microbatches, 2 chunks a stage" in schedule.out
    assert "layers    encoder/layers: 2, 1 in the parts; one keeps" in schedule.out
    assert "layers    decoder/layers: 1 in each of 2 parts; one keeps" in schedule.out


def test_its_formulas_see_both_stacks():
    config = configuration(*PIPE)
    sizes = ONE | {"pipe": 2, "data": 2}
    model, whole = config.model, predict(config, sizes, H100)
    # products alone count, and the padding of the vocabulary: what the family says a token costs
    assert whole.model_flops == whole.hardware_flops
    assert [len(virtual) for virtual in whole.slot_seconds.values()] == [4, 4]
    # a stage has two layers of the encoder or one, and one of the decoder; tokens are looked up where a stack begins
    first, second, third, last = whole.slot_seconds["forward"]
    assert first > second and third > second and last > second
    for stack in ("encoder_layers", "decoder_layers"):
        update = {stack: getattr(model, stack) + 2}
        deeper = config.model_copy(update={"model": model.model_copy(update=update)})
        assert predict(deeper, sizes, H100).step_seconds > whole.step_seconds
        used, more = (Estimator(one).memory(one, sizes, H100.datasheet) for one in (config, deeper))
        assert more.activations > used.activations and more.master_weights > used.master_weights
    # what it says of the stream is what its program makes
    shapes = shapes_of(config, sizes, JAXTRON, "H100")
    assert work_of(config, shapes).stream == shapes.rows * row_bytes(config, 1).stream


def test_a_stack_may_have_its_own_length_and_width(monkeypatch):
    family = family_named(FAMILY)

    def work(config: FamilyConfig, shapes: Shapes) -> ModelWork:
        wide = config.model_copy(update={"width": 2 * config.width})
        encoder = family.work(wide, replace(shapes, length=shapes.length // 2)).stacks[0]
        found = family.work(config, shapes)
        return replace(found, stacks=(encoder, found.stacks[1]))

    config = configuration()
    before = predict(config, ONE, H100)
    monkeypatch.setattr(families, "family_named", lambda name: replace(family, work=work))
    # four times as much for each of half the tokens: the encoder's FLOPs once more, 48 w^2 a token and layer
    more = config.model.encoder_layers * 48 * config.model.width**2 * 16 * 64
    assert predict(config, ONE, H100).hardware_flops - before.hardware_flops == pytest.approx(more)


def test_layouts_are_found_for_it():
    found = search(configuration("--model.encoder_layers", "4"), H100, num_gpus=4, gpus_per_node=4)
    schedules = {one.layout.pipeline.schedule for one in found.candidates if one.layout.pipe > 1}
    assert schedules == {"interleaved", "eager_interleaved", "zero_bubble_v", "dualpipe_v"}
    assert {one.layout.recompute for one in found.candidates} == {None}
    assert all("recompute" not in one.layout.flags(found.config) for one in found.candidates)
    assert {one.layout.tensor for one in found.candidates} == {1, 2, 4}


def compiled(tmp_path: Path, *flags: str) -> dict:
    path = tmp_path / "plan.json"
    ended = planned("--gpu", "h100", "--json", str(path), *flags)
    assert (ended.code, ended.err) == (0, ""), ended
    assert "prediction: " in ended.out
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("gpus", "flags"),
    [
        (2, []),
        pytest.param(8, [*PIPE, "--mesh.tensor", "2", "--mesh.data", "2"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_its_step_is_planned(tmp_path: Path, gpus: int, flags: list[str]):
    found = compiled(tmp_path, "--gpus", str(gpus), *flags)
    config = configuration(*flags)
    sizes = ONE | found["mesh"]
    counted = Estimator(config).memory(config, sizes, H100.datasheet)
    for name in ("master_weights", "optimizer", "weights", "gradients", "messages"):
        assert found["memory"][name] == getattr(counted, name), name
    # a layer keeps its buffer and a few numbers of each microbatch, which are counted as if they were of each row
    assert found["memory"]["activations"] <= counted.activations <= 1.01 * found["memory"]["activations"]
    assert found["parameters"] == config.family.num_parameters(config.model, 64)
    assert found["prediction"]["model_flops"] == pytest.approx(predict(config, sizes, H100).model_flops)


@pytest.mark.slow
def test_a_search_by_the_command():
    ended = planned("--search", "--gpu", "h100", "--gpus", "4", "--top", "1")
    assert (ended.code, ended.err) == (0, "") and "1 compiled" in ended.out and "type: " in ended.out
