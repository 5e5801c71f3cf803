"""Bad input: one line, exit code 2, and nothing written."""

import sys
from pathlib import Path

import pytest
from command_runs import Ended, contents, records, run_here, small, write_text


def assert_one_line(ended: Ended, *fragments: str):
    assert ended.code == 2 and ended.err.count("\n") == 1 and ended.err.startswith("error: "), ended
    for fragment in fragments:
        assert fragment in ended.err
    assert ended.out == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train.stepz 3", "unknown setting train.stepz (--train.stepz); did you mean train.steps?"),
        ("--lr 1", "unknown setting lr (--lr); did you mean optimizer.learning_rate?"),
        ("--train.steps many", "train.steps: expected int >= 1, got 'many' (--train.steps)"),
        ("--train.steps", "--train.steps needs a value"),
        ("--train.steps 0", "train.steps: must be greater than or equal to 1, got 0"),
        ("--train.precision fp8", "train.precision: expected bf16 | fp16 | fp32, got 'fp8'"),
        ("--mesh.tensor 3", "mesh data -1 x tensor 3: 3 does not divide the 8 devices"),
        ("--mesh.data 2 --mesh.tensor 2", "mesh data 2 x tensor 2 needs 4 devices, there are 8"),
        ("--mesh.data -1 --mesh.fsdp -1", "only one mesh axis can be -1"),
        ("--mesh.pipe 2", "mesh.pipe above 1 is not supported yet"),
        ("--mesh.context 2", "mesh.context above 1 is not supported yet"),
        ("--mesh.tensor 4", "model.num_heads 2 does not divide by mesh.tensor 4"),
        ("--mesh.tensor 2 --data.sequence_length 31", "data.sequence_length 31 does not divide by mesh.tensor 2"),
        ("--mesh.tensor 2 --model.vocab_multiple 1", "(model.vocab_multiple) 257 does not divide by mesh.tensor 2"),
        ("--mesh.tensor 2 --model.mlp_size 63", "model.mlp_size 63 does not divide by mesh.tensor 2"),
        ("--mesh.tensor 4 --model.num_heads 12 --model.num_kv_heads 6 --model.hidden_size 48", "kv_heads 6 does not divide"),
        ("--model.num_heads 3", "model.hidden_size 32 does not divide by model.num_heads 3"),
        ("--model.num_kv_heads 4", "model.num_heads 2 is no multiple of model.num_kv_heads 4"),
        ("--model.pattern *+", "'+'"),
        ("--model.max_positions 16", "data.sequence_length 32 is longer than model.max_positions 16"),
        ("--model.vocab_size 100", "the tokenizer bytes has 257 tokens, more than model.vocab_size 100"),
        ("--train.global_batch 12", "train.global_batch 12 does not divide by mesh.data 8 x mesh.fsdp 1"),
        ("--train.microbatches 3", "x train.microbatches 3 = 24"),
        (
            "--train.batch_ramp.start 3 --train.batch_ramp.increment 5 --train.batch_ramp.samples 9",
            "global batch 3 is not a multiple of 8",
        ),
        ("--data.path nowhere.txt", "no such file or folder nowhere.txt"),
        ("--data.tokenizer nowhere.json", "nowhere.json"),
        ("--data.sequence_length 99999 --model.position none", "one sample needs 100000"),
        ("--run.profile_steps 2 9", "run.profile_steps 2 9 ends after train.steps 4"),
        ("--run.profile_steps 3", "run.profile_steps: expected"),
        ("--runtime.xla_preset latency", "runtime.xla_preset=latency is for GPUs"),
        ("--runtime.process_id 1", "coordinator_address and num_processes missing"),
        ("--optimizer.momentum 0.5", "momentum=0.5 has no effect with name=adamw"),
        ("a.yaml b.yaml", "unexpected argument 'b.yaml'"),
        ("nowhere.yaml", "configuration file nowhere.yaml does not exist"),
    ],
)
def test_settings(flags: str, message: str, tmp_path: Path):
    assert_one_line(run_here(*small(tmp_path), "--train.steps", "4", *flags.split()), message)
    assert not (tmp_path / "run").exists()
