"""Bad input: one line, exit code 2, and nothing written."""

import sys
from pathlib import Path

import jax
import pytest

from jaxtron.config import UserError, load
from jaxtron.pipeline.schedules.named import make_schedule
from jaxtron.pipeline.schedules.table_file import write_csv
from jaxtron.run.configuration import Configuration, configuration_of
from jaxtron.runtime.memory_errors import out_of_memory_as_user_error
from jaxtron.train.run import room_advice
from tests.support.command_runs import Ended, FinishedRun, contents, end, run_here, small, start, write_text


def assert_one_line(ended: Ended, *fragments: str):
    assert ended.code == 2 and ended.err.count("\n") == 1 and ended.err.startswith("error: "), ended
    for fragment in fragments:
        assert fragment in ended.err
    assert ended.out in ("", "starting JAX\n", "starting JAX\nreading the data\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train.stepz 3", "unknown setting train.stepz (--train.stepz); did you mean train.steps?"),
        ("--lr 1", "unknown setting lr (--lr); did you mean optimizer.learning_rate?"),
        ("--train.steps many", "train.steps: expected int >= 1, got 'many' (--train.steps)"),
        ("--train.steps", "--train.steps needs a value"),
        ("--train.steps 0", "train.steps: must be greater than or equal to 1, got 0"),
        ("--train.precision fp8", "train.precision: expected bf16 | fp16 | fp32, got 'fp8'"),
        ("--mesh.tensor 3", "mesh.data -1 x mesh.tensor 3 needs a multiple of 3 devices, there are 8"),
        ("--mesh.data 2 --mesh.tensor 2", "mesh.data 2 x mesh.tensor 2 needs 4 devices, there are 8"),
        ("--mesh.data -1 --mesh.fsdp -1", "only one mesh axis can be -1"),
        (
            "--context.method all_to_all",
            "context.method all_to_all has no effect with mesh.context 1: leave it out, or set --mesh.context",
        ),
        (
            "--mesh.expert 4 --mesh.data 8",
            "mesh.expert 4 has no effect with model.family decoder: it has no experts; put E in model.pattern or "
            "leave it out",
        ),
        ("--mesh.expert_tensor 2", "mesh.expert_tensor 2 has no effect with model.family decoder"),
        ("--mesh.expert -1", "mesh.expert: must be greater than or equal to 1, got -1"),
        ("--mesh.tensor 4", "model.num_heads 2 is not a multiple of mesh.tensor 4"),
        ("--mesh.tensor 2 --data.sequence_length 31", "data.sequence_length 31 is not a multiple of mesh.tensor 2"),
        ("--mesh.tensor 2 --model.vocab_multiple 1", "(model.vocab_multiple) 257 is not a multiple of mesh.tensor 2"),
        ("--mesh.tensor 2 --model.mlp_size 63", "model.mlp_size 63 is not a multiple of mesh.tensor 2"),
        (
            "--mesh.tensor 4 --model.num_heads 12 --model.num_kv_heads 6 --model.hidden_size 48",
            "kv_heads 6 is not a multiple",
        ),
        ("--model.num_heads 3", "model.hidden_size 32 is not a multiple of model.num_heads 3"),
        ("--model.num_kv_heads 4", "model.num_heads 2 is not a multiple of model.num_kv_heads 4"),
        ("--model.pattern *+", "'+'"),
        ("--model.max_positions 16", "data.sequence_length 32 is longer than model.max_positions 16"),
        ("--model.vocab_size 100", "the tokenizer bytes has 257 tokens, more than model.vocab_size 100"),
        ("--train.global_batch 12", "train.global_batch 12 is not a multiple of mesh.data 8 x mesh.fsdp 1"),
        ("--train.microbatches 3", "train.global_batch 8 is not a multiple of train.microbatches 3"),
        (
            "--train.batch_ramp.start 3 --train.batch_ramp.increment 5 --train.batch_ramp.samples 9",
            "global batch 3 is not a multiple of 8",
        ),
        ("--data.path nowhere.txt", "no such file or folder nowhere.txt"),
        ("--data.tokenizer nowhere.json", "nowhere.json"),
        ("--data.sequence_length 99999 --model.position none", "one sample needs 100,000"),
        ("--run.profile_steps 2 9", "run.profile_steps 2 9 ends after train.steps 4"),
        ("--run.profile_steps 3", "run.profile_steps: expected"),
        ("--runtime.xla_preset latency", "runtime.xla_preset latency is for GPUs"),
        ("--runtime.process_id 1", "runtime.coordinator_address and runtime.num_processes missing"),
        ("--optimizer.momentum 0.5", "optimizer.momentum 0.5 has no effect with optimizer.name adamw"),
        ("a.yaml b.yaml", "unexpected argument 'b.yaml'"),
        ("nowhere.yaml", "configuration file nowhere.yaml does not exist"),
    ],
)
def test_settings(flags: str, message: str, tmp_path: Path):
    assert_one_line(run_here(*small(tmp_path), "--train.steps", "4", *flags.split()), message)
    assert not (tmp_path / "run").exists()


EXPERTS = "--model.pattern *E --model.bias false --model.mlp_size 32 "


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model.pattern *-", "has no effect with model.pattern *-: leave it out, or add mixture of experts (E) to"),
        ("--moe.top_k 2", "unknown setting moe.top_k (--moe.top_k); did you mean model.moe.top_k?"),
        ("--model.moe.top_k 9", "model.moe.top_k 9 is more than model.moe.num_experts 8; change one of them"),
        ("--model.moe.jitter 2", "model.moe.jitter: must be less than 1, got 2"),
        ("--model.moe.capacity_factor 1e39", "model.moe.capacity_factor: must be below 3.4e+38"),
        ("--model.moe.groups 3", "model.moe.num_experts 8 is not a multiple of model.moe.groups 3; change one"),
        ("--model.moe.top_groups 2", "model.moe.top_groups 2 is more than model.moe.groups 1; change one of them"),
        (
            "--model.moe.groups 8",
            "model.moe.top_k 2 is more than the 1 expert in model.moe.top_groups 1 of model.moe.groups 8; change one",
        ),
        (
            "--model.moe.groups 8 --model.moe.top_k 1 --model.moe.group_score two_largest",
            "needs groups of two experts: model.moe.groups 8 have one each of model.moe.num_experts 8; lower",
        ),
        ("--model.moe.exchange capacity", "needs model.moe.capacity_factor: set it, or --model.moe.exchange rounds"),
        ("--model.moe.drop random", "model.moe.drop random has no effect with model.moe.capacity_factor none: leave"),
        (
            "--model.moe.balance 0 --model.moe.balance_over global",
            "model.moe.balance_over global has no effect with model.moe.balance 0: leave it out",
        ),
        (
            "--model.moe.balance_over step",
            "model.moe.balance_over: expected sequence | microbatch | global, got 'step'",
        ),
        (
            "--model.moe.buckets expert --model.moe.implementation xla",
            "model.moe.implementation xla has no effect with model.moe.buckets expert",
        ),
        ("--model.moe.leading_dense 1", "must be left with its experts; lower it, or add layers"),
        (
            "--model.moe.leading_dense 1 --model.num_layers 2 --mesh.pipe 2",
            "the model has 1 layer beside 1 leading, too few for mesh.pipe 2 x pipeline.chunks 1 = 2 parts",
        ),
        ("--mesh.expert 3", "model.moe.num_experts 8 is not a multiple of mesh.expert 3; change one of them"),
        (
            "--mesh.expert 8 --mesh.expert_tensor 2",
            "mesh.expert 8 x mesh.expert_tensor 2 needs a multiple of 16 devices in a stage, there are 8 (mesh.data 8)",
        ),
        ("--mesh.expert_tensor 3", "model.mlp_size 32 is not a multiple of mesh.expert_tensor 3; change one of them"),
        (
            "--model.moe.buckets device --model.moe.implementation mosaic",
            "model.moe.implementation mosaic cannot: its kernels are for Hopper GPUs, not cpu; use auto",
        ),
    ],
)
def test_experts(flags: str, message: str, tmp_path: Path):
    words = [*EXPERTS.split(), "--model.moe.scaling", "2"]
    assert_one_line(run_here(*small(tmp_path), *words, *flags.split()), message)
    assert not (tmp_path / "run").exists()


MAMBA = "--model.pattern M --model.mamba.num_groups 1 "


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--model.mamba.state_size 64",
            "model.mamba.state_size 64 has no effect with model.pattern *-: leave it out, or add Mamba (m) or Mamba-2",
        ),
        ("--model.pattern M --model.mamba.d_conv 3", "did you mean model.mamba.conv_width?"),
        (
            "--model.pattern M",
            "heads of Mamba-2 (model.mamba.num_heads) 1 is not a multiple of model.mamba.num_groups 8",
        ),
        (MAMBA + "--model.mamba.norm_groups 3", "1 is not a multiple of model.mamba.norm_groups 3; change one of them"),
        (MAMBA + "--model.mamba.head_dim 48", "= 64 is not a multiple of model.mamba.head_dim 48; change one, or set"),
        (MAMBA + "--model.mamba.conv_width 1", "model.mamba.conv_width: must be greater than or equal to 2, got 1"),
        (MAMBA + "--model.mamba.dt_range 0.1 0.001", "model.mamba.dt_range 0.1 0.001 must be two numbers above 0, the"),
        (
            MAMBA + "--model.mamba.decay_range 0 1",
            "model.mamba.decay_range 0 1 must be two numbers above 0, the smaller",
        ),
        (MAMBA + "--model.mamba.dt_range 0.001 nan", "model.mamba.dt_range: expected [float, float], got [0.001, nan]"),
        (MAMBA + "--model.mamba.dt_floor 5", "dt_floor 5 is above all of model.mamba.dt_range 0.001 0.1; change one"),
        (
            MAMBA + "--model.mamba.dt_limit 1 0.5",
            "model.mamba.dt_limit 1 0.5 must be a number of 0 or more, and a larger",
        ),
        (
            MAMBA + "--model.mamba.dt_limit 0.5 none",
            "model.mamba.dt_limit 0.5 none has none of the first steps in model.mamba.dt_range 0.001 0.1: no step",
        ),
        (
            MAMBA + "--model.mamba.num_heads 2 --model.mamba.expand 3",
            "model.mamba.expand 3.0 has no effect with model.mamba.num_heads 2: leave one of them out",
        ),
        (MAMBA + "--model.mamba.dt_rank 4", "model.mamba.dt_rank 4 has no effect with model.pattern M: leave it out"),
        (
            MAMBA + "--model.mamba.expand 1e30",
            "model.hidden_size 32, model.mamba.expand 1e+30 and model.vocab_size 257",
        ),
        (MAMBA + "--mesh.tensor 2", "heads of Mamba-2 (model.mamba.num_heads) 1 is not a multiple of mesh.tensor 2"),
        (
            MAMBA + "--mesh.context 4 --model.mamba.conv_width 6",
            "model.mamba.conv_width 6 needs the 5 positions before a device's piece of the sequence, and pieces have 4",
        ),
        (
            "--model.pattern m --model.hidden_size 33 --mesh.tensor 4",
            "channels of Mamba (model.mamba.expand x model.hidden_size) 66 is not a multiple of mesh.tensor 4; change",
        ),
        (
            "--model.pattern G --mesh.context 4 --model.delta.linear_conv_kernel_dim 6",
            "model.delta.linear_conv_kernel_dim 6 needs the 5 positions before a device's piece of the sequence",
        ),
        (
            "--model.pattern G --model.delta.linear_num_key_heads 3 --model.delta.linear_num_value_heads 4",
            "model.delta.linear_num_value_heads 4 is not a multiple of model.delta.linear_num_key_heads 3; change one",
        ),
        (
            "--model.pattern G --model.delta.decay_range 2 1",
            "model.delta.decay_range 2 1 must be two numbers above 0, the",
        ),
        ("--model.delta.implementation xla", "or add gated delta net (G) to the pattern"),
        ("--model.pattern |", "model.pattern '|', symbol 1: no layers on one side of this cut"),
        ("--model.pattern (Mm)", "model.pattern '(Mm)', symbol 1: two kinds of mamba in one group"),
        ("--model.pattern M*M- --model.recompute [moe]", "model.recompute [moe] has no effect with model.pattern M*M-"),
        (
            "--model.hybrid 0.6 0.6 8",
            "model.hybrid 0.6 0.6 8: shares of attention and MLPs are 0 or more and together 1",
        ),
        ("--model.hybrid 0.5 0.5 0", "model.hybrid 0.5 0.5 0: the last is the number of layers, from 1 to 65,536"),
        ("--model.hybrid 0.1 0.5 100000000", "the last is the number of layers, from 1 to 65,536"),
        (
            "--model.hybrid 0.1 0.5 4",
            "model.hybrid 0.1 0.5 4: 0.1 of 4 layers is no layer of attention; raise the share",
        ),
        ("--model.hybrid 0.1 0.5 8 --model.num_layers 4", "leave one of them out: hybrid makes it 1"),
        (
            "--model.pattern M*ME --model.moe.leading_dense 1",
            "model.moe.leading_dense 1 is more than 0: one layer of model.pattern must be left with its experts",
        ),
    ],
)
def test_state_space_layers_and_hybrids(flags: str, message: str, tmp_path: Path):
    assert_one_line(run_here(*small(tmp_path), *flags.split()), message)
    assert not (tmp_path / "run").exists() and not (tmp_path / "tokens").exists()


PIPE = "--mesh.pipe 2 --mesh.data 4 --model.num_layers 4 --train.global_batch 16 --train.microbatches 4 "
PIPE_TENSOR = PIPE + "--mesh.data 2 --mesh.tensor 2 "


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pipeline.chunks 2", "pipeline.chunks 2 has no effect with mesh.pipe 1: leave it out, or set --mesh.pipe"),
        ("--pipeline.schedule gpipe", "pipeline.schedule gpipe has no effect with mesh.pipe 1"),
        ("--pipeline.stage_layers 1", "pipeline.stage_layers [1] has no effect with mesh.pipe 1"),
        (PIPE + "--pipeline.schedule zero_buble", "no pipeline.schedule 'zero_buble'; did you mean zero_bubble?"),
        (PIPE_TENSOR + "--pipeline.schedule zero_buble --pipeline.overlap true", "did you mean zero_bubble?"),
        (PIPE + "--pipeline.schedule xyz", "no pipeline.schedule 'xyz'; use one of gpipe, 1f1b, "),
        (
            PIPE + "--pipeline.chunks 2",
            "pipeline.schedule 1f1b with mesh.pipe 2, pipeline.chunks 2, train.microbatches 4: 1f1b has 1 chunk",
        ),
        (PIPE + "--pipeline.schedule interleaved", "interleaved needs at least 2 chunks a stage, not 1"),
        (PIPE + "--pipeline.schedule zero_bubble_v --pipeline.chunks 3", "zero_bubble_v has 2 chunks a stage, not 3"),
        (
            PIPE + "--model.num_layers 1",
            "the model has 1 layer, too few for mesh.pipe 2 x pipeline.chunks 1 = 2 parts; change one of them",
        ),
        (PIPE + "--pipeline.stage_layers 1 2", "must be 2 numbers (mesh.pipe 2 x pipeline.chunks 1) that add up"),
        (PIPE + "--pipeline.stage_layers 4", "pipeline.stage_layers [4] must be 2 numbers"),
        (
            PIPE + "--pipeline.stage_layers 1 3 --pipeline.loss_weight 1",
            "pipeline.loss_weight 1.0 has no effect with pipeline.stage_layers",
        ),
        (
            PIPE + "--pipeline.schedule dualpipe_v --pipeline.chunks 2 --train.microbatches 2",
            "dualpipe_v on 2 stages needs at least 4 microbatches, not 2",
        ),
        (
            PIPE
            + "--pipeline.schedule dualpipe_v --pipeline.chunks 2 --train.batch_ramp.start 8 "
            + "--train.batch_ramp.increment 4 --train.batch_ramp.samples 9",
            "train.batch_ramp has batches of 2 microbatches",
        ),
        (
            PIPE + "--pipeline.overlap true",
            "pipeline.overlap true has no effect with pipeline.schedule 1f1b: leave it out",
        ),
        (
            "--pipeline.overlap true",
            "pipeline.overlap true has no effect with mesh.pipe 1: leave it out, or set --mesh",
        ),
        (
            PIPE_TENSOR + "--pipeline.schedule eager_1f1b --pipeline.overlap true --train.microbatches 2",
            "pipeline.overlap true has no effect with train.microbatches 2 and mesh.pipe 2: leave it out, or use more",
        ),
        (
            PIPE + "--pipeline.schedule eager_1f1b --pipeline.overlap true",
            "has no effect with mesh.fsdp 1 and mesh.context 1 and mesh.tensor 1: nothing travels inside of layers",
        ),
        (
            PIPE + EXPERTS + "--model.num_layers 4 --pipeline.schedule eager_1f1b --pipeline.overlap true",
            "pipeline.overlap true has no effect with mesh.expert 1: nothing travels inside of layers; leave it out",
        ),
        (
            PIPE_TENSOR + "--pipeline.schedule eager_1f1b --pipeline.overlap true --pipeline.stage_layers 1 3",
            "needs as many layers in each part of mesh.pipe 2 x pipeline.chunks 1, not 1 or 3; leave it out, or change",
        ),
        (PIPE + "--pipeline.schedule nowhere.csv", "cannot read the schedule nowhere.csv"),
        (
            PIPE + "--model.num_layers 1 --model.pattern *-|*-|*-",
            "is cut into 3 parts, but mesh.pipe 2 x pipeline.chunks 1",
        ),
        (PIPE + "--model.pattern *-|*-", "spells out all layers and cannot repeat 4 times; set model.num_layers 1"),
        (
            PIPE_TENSOR
            + "--model.num_layers 1 --model.pattern *-*|-*- --pipeline.schedule eager_1f1b --pipeline.overlap true",
            "pipeline.overlap true needs layers that are alike: in a pattern that never repeats each waits",
        ),
        (
            PIPE + "--model.num_layers 1 --model.pattern *-|*- --pipeline.stage_layers 1 1",
            "has cuts, and pipeline.stage_layers [1, 1] too; keep one",
        ),
        (
            PIPE + "--model.num_layers 1 --model.pattern *-|*- --pipeline.embedding_weight 1",
            "pipeline.embedding_weight 1.0 has no effect with model.pattern",
        ),
    ],
)
def test_pipelines(flags: str, message: str, tmp_path: Path):
    assert_one_line(run_here(*small(tmp_path), "--train.steps", "4", *flags.split()), message)
    assert not (tmp_path / "run").exists() and not (tmp_path / "tokens").exists()


def test_a_file_that_overlaps_may_be_run_without(tmp_path: Path):
    """What a flag makes useless is left out with a line, and what it switches off stays off."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model: {pattern: '*E', bias: false, num_layers: 4}\nmesh: {pipe: 2, data: 4, expert: 2}\n"
        "train: {global_batch: 16, microbatches: 4}\npipeline: {schedule: eager_1f1b, overlap: true}\n"
    )
    for flags, reason in (
        ("--mesh.pipe 1 --mesh.data 8", "mesh.pipe 1"),
        ("--pipeline.schedule 1f1b", "pipeline.schedule 1f1b"),
        ("--mesh.expert 1", "mesh.expert 1"),
        ("--pipeline.overlap false", ""),
    ):
        told: list[str] = []
        config = load(Configuration, file, flags.split(), tell=told.append)
        assert not config.pipeline.overlap
        lines = [line for line in told if line.startswith("left out: pipeline.overlap true")]
        assert len(lines) == bool(reason) and all(line.endswith(f"has no effect with {reason}") for line in lines)
    assert load(Configuration, file, []).pipeline.overlap


def test_schedules_on_file(tmp_path: Path):
    table = tmp_path / "table.csv"
    flags = [*small(tmp_path), *PIPE.split(), "--pipeline.schedule", str(table)]
    write_csv(make_schedule("1f1b", 2, 3), table)
    message = "is a table for 2 stages, 3 microbatches, 1 chunks, the run has 2 stages, 4 microbatches, 1 chunks"
    assert_one_line(run_here(*flags), message, str(table))
    write_csv(make_schedule("1f1b", 2, 4), table)
    ramp = ["--train.batch_ramp.start", "8", "--train.batch_ramp.increment", "4", "--train.batch_ramp.samples", "9"]
    assert_one_line(
        run_here(*flags, *ramp), "train.batch_ramp has batches of 2 microbatches", "2 stages, 4 microbatches"
    )
    whole = table.read_text()
    for changed, message in (
        (whole.replace("B0.2", "B0.1", 1), "tick "),
        (whole.replace("F0.3", "F0.x", 1), "'F0.x' is no work"),
        ("", "the table is empty"),
    ):
        table.write_text(changed)
        assert_one_line(run_here(*flags), message)
    table.write_bytes(b"\xff\xfe\x00")
    assert_one_line(run_here(*flags), f"cannot read the schedule {table}")
    assert not (tmp_path / "run").exists() and not (tmp_path / "tokens").exists()


def test_data(tmp_path: Path):
    binary, latin, folder = tmp_path / "binary.txt", tmp_path / "latin.txt", tmp_path / "folder"
    binary.write_bytes(b"abc\0def")
    latin.write_bytes(b"caf\xe9")
    folder.mkdir()
    for path, message in (
        (binary, "is binary: a zero byte at offset 3"),
        (latin, "is not UTF-8 text: byte 0xe9 at offset 3"),
        (folder, "has no files"),
    ):
        assert_one_line(run_here(*small(tmp_path), "--data.path", str(path)), str(path), message)
    (tmp_path / "tokenizer.json").write_text("{}")
    ended = run_here(*small(tmp_path), "--data.tokenizer", str(tmp_path / "tokenizer.json"))
    assert_one_line(ended, "is not a Hugging Face tokenizer.json")
    assert not (tmp_path / "run").exists()


def test_configuration_files(tmp_path: Path):
    assert_one_line(run_here(str(tmp_path)), f"configuration file {tmp_path} cannot be read: Is a directory")
    (tmp_path / "mine.yaml").write_text("train:\n  stepz: 3\n")
    assert_one_line(run_here(str(tmp_path / "mien.yaml")), f"did you mean {tmp_path / 'mine.yaml'}?")
    assert_one_line(run_here(str(tmp_path / "mine.yaml")), "train.stepz (", "line 2); did you mean train.steps?")
    (tmp_path / "mine.yaml").write_text("model:\n  pattern: *-\n")
    assert_one_line(run_here(str(tmp_path / "mine.yaml")), "line 2: not valid YAML", "quote text that begins with *")


def test_places_that_cannot_be_written(tmp_path: Path):
    file = write_text(tmp_path / "file")
    for place in ("/dev/null/run", f"{file}", f"{file}/run"):
        ended = run_here(*small(tmp_path), "--run.directory", place)
        assert_one_line(ended, f"run.directory {place} cannot be written to: Not a directory")
    ended = run_here(*small(tmp_path), "--data.cache_directory", "/dev/null/cache")
    assert_one_line(ended, "cannot write the token cache in /dev/null/cache")
    ended = run_here(*small(tmp_path), "--runtime.compilation_cache", "/dev/null/cache")
    assert_one_line(ended, "runtime.compilation_cache /dev/null/cache cannot be made")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    ended = run_here(*small(tmp_path), "--run.trackers", "tensorboard")
    assert_one_line(ended, "pip install 'jaxtron[tensorboard]'")
    assert not (tmp_path / "run").exists()


def test_an_unknown_xla_flag_in_a_process_of_its_own(tmp_path: Path):
    ended = end(start(*small(tmp_path), "--runtime.xla_flags=--xla_no_such_flag=1", cache=tmp_path))
    assert_one_line(ended, "does not start with them: Unknown flag in XLA_FLAGS: --xla_no_such_flag=1")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_of_something_else_is_left_alone(finished: FinishedRun, tmp_path: Path):
    before = contents(finished.directory)
    other = write_text(tmp_path / "other.txt", seed=1)
    for flags, message in (
        ("--model.hidden_size 64", "was trained with other settings: model.hidden_size 32 -> 64; give the old ones"),
        ("--model.num_layers 2", "other settings: model.num_layers 1 -> 2"),
        ("--model.activation relu", "other settings: model.activation gelu_tanh -> relu"),
        ("--model.norm_epsilon 1e-3 --model.z_loss 0.1", "model.norm_epsilon 1e-05 -> 0.001, model.z_loss 0.0 -> 0.1"),
        ("--optimizer.name sgd", "other settings: optimizer.name adamw -> sgd"),
        (
            f"--data.path {other}",
            f"was trained on other data (data.path {finished.text} -> [{finished.text}, {other}])",
        ),
        ("--data.sequence_length 16 --model.max_positions 32", "other settings: data.sequence_length 32 -> 16"),
        ("--seed 7", "other settings: seed 1234 -> 7"),
        ("--train.precision fp16", "is of another train.precision: it has no loss_scale."),
        ("--checkpoint.resume false", "--checkpoint.resume is off"),
    ):
        assert_one_line(run_here(*finished.flags, *flags.split()), message, str(finished.directory))
        assert contents(finished.directory) == before


def test_out_of_memory_is_one_line_and_other_errors_are_not_hidden():
    advice = room_advice(Configuration())
    assert "--model.recompute full" in advice
    assert "recompute" not in room_advice(configuration_of("tests.toy_family")())
    text = "INTERNAL: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes. [stack]\nframe"
    with pytest.raises(UserError, match="^Out of memory while trying to allocate 9 bytes. Raise --train.microbatches"):
        with out_of_memory_as_user_error(advice):
            raise jax.errors.JaxRuntimeError(text)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: no"), out_of_memory_as_user_error(advice):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")
