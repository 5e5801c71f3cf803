"""Runs with experts as a user meets them: checkpoints do not know how experts lie, and every expert is in them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.command_runs import records, run_here, small
from tests.support.saved_state import assert_same, values

MOE_TINY = Path(__file__).parents[2] / "configs" / "moe_tiny.yaml"
FLAGS = (
    *("--model.pattern", "*E", "--model.num_layers", "3", "--model.bias", "false", "--model.moe.num_experts", "4"),
    # one of them is before the stack that stages share out
    *("--model.moe.leading_dense", "1", "--model.moe.bias_rate", "0.01", "--model.mlp_size", "32"),
    *("--train.global_batch", "16", "--train.microbatches", "2", "--train.sample_tokens", "0", "--train.steps", "3"),
    *("--optimizer.decay_steps", "4"),
)
FOLDED = ("--mesh.data", "4", "--mesh.tensor", "2", "--mesh.expert", "4")
# more parts of tensor than experts take, which Megatron once left out of checkpoints
OTHERS = {
    "copies": ("--mesh.data", "8"),
    "copies along tensor": ("--mesh.data", "4", "--mesh.tensor", "2", "--mesh.expert", "1"),
    "width split": ("--mesh.data", "4", "--mesh.tensor", "2", "--mesh.expert", "2", "--mesh.expert_tensor", "2"),
    "another order": (
        *("--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.context", "2", "--mesh.tensor", "2", "--mesh.expert", "4"),
        *("--mesh.order", "pipe", "data", "context", "fsdp", "tensor"),
    ),
    "stages": ("--mesh.pipe", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--mesh.expert", "4"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three steps on folded experts; of two, the bias would often be back where it began."""
    folder = tmp_path_factory.mktemp("folded")
    ended = run_here(*small(folder), *FLAGS, *FOLDED)
    assert ended.code == 0 and ended.err == "", ended
    return folder


@pytest.mark.slow
def test_the_small_mixture_of_the_configurations_learns(tmp_path: Path) -> None:
    """On the folding that its page shows; all settings are its file's but the text and how long it goes on."""
    words = small(tmp_path)
    flags = (
        "--mesh.data 4 --mesh.tensor 2 --mesh.expert 8 --train.steps 6 --optimizer.warmup_steps 2 --run.log_every 1 "
        "--train.sample_tokens 0 --train.validation_batches 1"
    )
    ended = run_here(str(MOE_TINY), *words[words.index("--run.directory") :], *flags.split())
    assert ended.code == 0 and ended.err == "", ended
    losses = [line["loss"] for line in records(tmp_path / "run")]
    assert len(losses) == 6 and losses[-1] < losses[0] - 1
    assert (tmp_path / "run" / "load.png").exists()


@pytest.mark.slow
def test_load_is_reported_by_layer_and_expert(trained: Path) -> None:
    words = small(trained)
    tokens = 16 * int(words[words.index("--data.sequence_length") + 1])
    assert (trained / "run" / "load.png").read_bytes().startswith(b"\x89PNG")
    lines = (trained / "run" / "arrays.jsonl").read_text().splitlines()
    assert lines
    for line in lines:
        load = np.asarray(json.loads(line)["stack/periods/moe/load"])
        assert load.shape == (2, 1, 4) and (load.sum(-1) == 2 * tokens).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_does_not_know_how_experts_lie(trained: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    step, expected, count = values(trained, *FLAGS, *FOLDED)
    assert step == 3
    found = values(tmp_path, *FLAGS, *OTHERS[name])
    assert found[0] == 3 and found[2] == count
    assert_same(found[1], expected)
    assert any("bias" in path and array.any() for path, array in expected.items() if path.startswith(".buffers"))
    ended = run_here(*small(tmp_path), *FLAGS, *OTHERS[name], "--train.steps", "4")
    assert ended.code == 0 and ended.err == "", ended
