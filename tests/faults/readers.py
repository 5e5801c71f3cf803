"""What of the program reads an input where no command does it alone: each gives something to compare, or is refused."""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.checkpoint.restore import restore_newest
from jaxtron.config import UserError, load
from jaxtron.data.megatron.gpt_source import GPTSource
from jaxtron.data.megatron.indexed import IndexedReader
from jaxtron.layers.config import LoraConfig
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.run.configuration import Configuration
from jaxtron.run.metrics import Events, MetricsWriter, read_metrics
from jaxtron.serve.bodies import read_chat, read_completion, read_json
from jaxtron.serve.errors import ApiError
from jaxtron.weights.hub import FAMILIES, hub_settings
from jaxtron.weights.load import open_weights
from jaxtron.weights.megatron.files import open_checkpoint
from jaxtron.weights.peft import read_adapters

STEPS = (1, 2)
# ids of the bytes tokenizer
VOCABULARY = 257
# of the model whose adapters `workplace.py` writes
ADAPTED = ModelConfig(
    num_layers=2, hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=3, mlp_size=10, activation="swiglu",
    norm="rms_norm", bias=False, position="rotary", tied_head=False,
)  # fmt: skip

LORA = LoraConfig(rank=3, alpha=6)
_UP, _DOWN = (f"stack.periods.layers.1.mlp.{name}.lora" for name in ("up", "down"))
SHAPES = {f"{_UP}.a": (2, 8, 2, 3), f"{_UP}.b": (2, 2, 3, 10), f"{_DOWN}.a": (2, 10, 3), f"{_DOWN}.b": (2, 3, 8)}


def state_of(step: int) -> dict[str, Any]:
    """What the checkpoint of a step holds: its number, everywhere."""
    return {"weight": jnp.full((16, 8), step, jnp.float32), "half": jnp.full((5,), step, jnp.bfloat16)}


def save_checkpoints(directory: Path) -> None:
    """Those of two steps."""
    checkpoints = Checkpoints(directory, CheckpointConfig())
    for step in STEPS:
        checkpoints.save(step, state_of(step), {"position": step})
    checkpoints.close()


def checkpoint(is_forged: bool = False) -> int:
    """The step whose whole checkpoint is restored; an `AssertionError` where anything of it is another's.

    What a forged record says beside the arrays nobody can tell from what was saved.
    """
    restored = restore_newest(Path("checkpoints").absolute(), jax.eval_shape(lambda: state_of(0)))
    assert restored is not None, "no checkpoint is there"
    assert restored.step in STEPS and (is_forged or restored.extra == {"position": restored.step})
    for name, expected in state_of(restored.step).items():
        assert np.asarray(restored.state[name]).tobytes() == np.asarray(expected).tobytes(), name
    return restored.step


def hub() -> dict[str, bytes]:
    """Settings and tensors of a directory as Hugging Face has it."""
    folder = Path("hub")
    try:
        config = load(Configuration, None, ["--data.tokenizer", "bytes"], under=hub_settings(folder)).resolved()
    except UserError as error:
        # as `convert` does: what does not fit together has no place of its own
        raise error if str(folder) in str(error) else UserError(f"{folder}: {error}") from None
    with open_weights(folder) as (files, _):
        found = {name: files.read(name).tobytes() for name in files.tensors}
    return {"": config.model.model_dump_json().encode()} | found


def adapters() -> dict[str, np.ndarray]:
    """The arrays of a directory that peft wrote."""
    return read_adapters(Path("adapters"), SHAPES, FAMILIES["llama"].tensors, ADAPTED, LORA)


def megatron(folder: str) -> dict[str, bytes]:
    """Settings and tensors of a checkpoint of Megatron-LM."""
    files, _ = open_checkpoint(Path(folder))
    found = {name: files.read(name).tobytes() for name in files.tensors}
    return {"": json.dumps(hub_settings(Path(folder)).tree, sort_keys=True, default=str).encode()} | found


def samples() -> list[bytes]:
    """All samples of a pair of token files, as a training reads them."""
    reader = IndexedReader("tokens")
    source = GPTSource(reader, range(len(reader)), sequence_length=1, samples=None, seed=1, vocab_size=VOCABULARY)
    return [source.text(number).tobytes() for number in range(len(source))]


def metrics() -> int:
    """Lines that a run continues after: one is written behind those of the steps that count."""
    path = Path("run/metrics.jsonl")
    writer = MetricsWriter(path, resume_step=4)
    writer.write(5, {"loss": 1.0})
    writer.close()
    steps = [line["step"] for line in read_metrics(path)]
    assert steps[-1:] == [5] and max(steps[:-1], default=0) <= 4, steps
    return len(steps)


def events() -> None:
    """An event is added to whatever is there."""
    log = Events(Path("run"))
    log.write("checkpoint", 3, position=4)
    log.close()
    assert json.loads(Path("run/events.jsonl").read_bytes().splitlines()[-1])["step"] == 3


def body(name: str, read: Any) -> None:
    """The body of a request, as the server reads it before any model does."""
    try:
        read(read_json(Path(name).read_bytes()))
    except ApiError as error:
        raise UserError(str(error)) from None


def completion() -> None:
    """The body of a completion."""
    body("body.json", read_completion)


def chat() -> None:
    """The body of a chat."""
    body("chat_body.json", read_chat)


def checksum(body: str) -> int:
    """Of the body of a checkpoint's record."""
    return zlib.crc32(body.encode())
