"""Writes the fixtures in `encoders`: small random BERTs of Hugging Face transformers, what they predict, and losses.

    pip install torch==2.14.1 transformers==5.24.0 safetensors==0.8.0
    python -m tests.hugging_face.make_encoders

Weights are small multiples of `STEP`, kept in a byte each, under the names that files of the family have.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from tests.hugging_face.fixtures import FOLDER, STEP

ROWS, LENGTH = 3, 14
# tokens of each row; the others are padding
LENGTHS = (14, 9, 5)
SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
}
MODELS: dict[str, tuple[type[transformers.PreTrainedModel], transformers.PreTrainedConfig]] = {
    "bert": (transformers.BertForPreTraining, transformers.BertConfig(**SMALL)),
    "megatron_bert": (
        transformers.MegatronBertForPreTraining,
        transformers.MegatronBertConfig(**SMALL, hidden_act="gelu_new"),
    ),
}


def randomize(model: torch.nn.Module) -> None:
    """Every parameter in multiples of `STEP`; norms' scales around 1."""
    generator = np.random.default_rng(0)
    for name, array in model.named_parameters():
        is_scale = name.endswith(("LayerNorm.weight", "ln.weight"))
        size = 0.2 if is_scale or name.endswith("bias") else 0.3
        numbers = generator.standard_normal(tuple(array.shape)) * size + is_scale
        whole = np.clip(np.rint(numbers / STEP), -127, 127)
        array.copy_(torch.from_numpy((whole * STEP).astype(np.float32)))


def record(name: str) -> None:
    """The fixture of one model."""
    made, config = MODELS[name]
    model = made(config).float().eval()
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, 40, (ROWS, LENGTH))
    targets = generator.integers(0, 40, (ROWS, LENGTH))
    is_text = np.arange(LENGTH) < np.array(LENGTHS)[:, None]
    is_masked = is_text & (generator.random((ROWS, LENGTH)) < 0.4)
    types = (np.arange(LENGTH) >= np.array(LENGTHS)[:, None] // 2) & is_text
    swapped = np.array([1, 0, 1])
    with torch.no_grad():
        randomize(model)
        found = model(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(is_text.astype(np.int64)),
            token_type_ids=torch.from_numpy(types.astype(np.int64)),
            labels=torch.from_numpy(np.where(is_masked, targets, -100)),
            next_sentence_label=torch.from_numpy(swapped),
        )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(Path(folder) / "model.safetensors")
        written = json.loads((Path(folder) / "config.json").read_text())
    weights = {f"weights/{key}": np.rint(value / STEP).astype(np.int8) for key, value in saved.items()}
    assert all(np.array_equal(weights[f"weights/{key}"] * np.float32(STEP), value) for key, value in saved.items())
    path = FOLDER / "encoders" / f"{name}.npz"
    np.savez_compressed(
        path,
        config=json.dumps(written),
        tokens=tokens.astype(np.int32),
        targets=targets.astype(np.int32),
        is_text=is_text,
        is_masked=is_masked,
        types=types.astype(np.int32),
        swapped=swapped.astype(np.int32),
        logits=found.prediction_logits.numpy(),
        pair_logits=found.seq_relationship_logits.numpy(),
        loss=found.loss.numpy(),
        **weights,
    )
    print(f"{path.name}: {path.stat().st_size:,} bytes, logits up to {found.prediction_logits.abs().max():.1f}")


if __name__ == "__main__":
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for name in MODELS:
        record(name)
