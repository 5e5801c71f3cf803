"""The benchmark beside plain PyTorch: what it tells the other process, and that it is the same model."""

import importlib.util
import sys
from pathlib import Path

import pytest

from benchmarks import nanogpt_torch
from benchmarks.nanogpt_torch import TurnsBenchmark, measure, plain_recipe
from benchmarks.turns import OtherProcess
from jaxtron.config import UserError, load

CONFIG = Path(__file__).parents[1] / "configs" / "shakespeare_char.yaml"
CONSTANT = [
    "--optimizer.schedule",
    "constant",
    "--optimizer.warmup_steps",
    "0",
    "--optimizer.minimum_learning_rate",
    "0",
]
SMALL = [
    "--model.num_layers",
    "2",
    "--model.hidden_size",
    "32",
    "--train.global_batch",
    "2",
    "--data.sequence_length",
    "16",
]
# answers as the other process does; its losses grow by the steps it was asked for
STAND_IN = """#!{python}
import json, sys
import numpy as np
arrays = np.load(sys.argv[3])
print(json.dumps({{name: arrays[name].shape for name in arrays}}), flush=True)
for line in sys.stdin:
    print(json.dumps({{"seconds": 1e3, "processor": 2e3, "loss": float(line)}}), flush=True)
"""


def configuration(*words: str) -> TurnsBenchmark:
    return load(TurnsBenchmark, CONFIG, [*CONSTANT, *SMALL, *words])


def test_turns_are_taken_with_who_answers(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    config = configuration("--benchmark.pairs", "2", "--benchmark.steps", "3", "--benchmark.torch", str(python))
    found = measure(config)
    assert found["losses_after_first_turn"]["torch"] == 3.0
    assert found["step_milliseconds"]["torch"]["median"] == pytest.approx(1e6 / 3, rel=1e-4)
    assert found["torch_of_jaxtron"]["seconds"]["median"] > 1
    shapes = {name: tuple(shape) for name, shape in found["torch"].items()}
    assert shapes["tokens.weight"] == (65, 32) and shapes["positions.weight"] == (16, 32)
    assert shapes["blocks.1.qkv.weight"] == (96, 32) and shapes["blocks.0.output.weight"] == (32, 32)
    assert shapes["blocks.0.up.weight"] == (128, 32) and shapes["blocks.1.down.weight"] == (32, 128)
    assert shapes[".tokens"] == shapes[".targets"] == (2, 16)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_both_learn_the_same():
    losses = measure(configuration("--benchmark.pairs", "1", "--benchmark.steps", "5"))["losses_after_first_turn"]
    assert losses["jaxtron"] == pytest.approx(losses["torch"], rel=1e-5)


@pytest.mark.parametrize("words", ["--model.bias true", "--model.activation relu", "--optimizer.warmup_steps 1"])
def test_another_model_than_nanogpts_is_refused(words: str):
    with pytest.raises(UserError, match=f"{words.split()[0][2:]} .* is not nanoGPT's"):
        plain_recipe(configuration(*words.split()), 1)


def test_a_python_without_pytorch_is_told(tmp_path: Path):
    def other(python: str) -> OtherProcess:
        return OtherProcess(python, nanogpt_torch.OTHER, [], 1, needs="PyTorch")

    with pytest.raises(UserError, match="cannot be started"):
        other(str(tmp_path / "none"))
    with pytest.raises(UserError, match="a Python with PyTorch"), other("false"):
        pass
    assert nanogpt_torch.OTHER.exists()
