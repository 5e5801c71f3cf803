"""Writes the fixtures in `seq2seq`: small random T5s of Hugging Face transformers, their logits and losses.

    pip install torch==2.14.1 transformers==5.24.0 safetensors==0.8.0
    python -m tests.hugging_face.make_seq2seq

Weights are small multiples of `STEP`, kept in a byte each, under the names that files of the family have.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests.hugging_face.fixtures import FOLDER, STEP

# tokens of each row of the encoder and of the decoder; the others are padding
LENGTHS, DECODER_LENGTHS = (24, 17, 6), (14, 9, 11)
# of answers, longer than distances are told apart, and what rules make of them
ANSWER, PENALTIES = 16, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
# heads that are wider together than the stream or not as wide, distances beyond the last bucket
SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "layer_norm_epsilon": 1e-6,
    "decoder_start_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "t5": {**SMALL, "feed_forward_proj": "relu", "tie_word_embeddings": True},
    "t5_v1_1": {**SMALL, "num_heads": 6, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def randomize(model: torch.nn.Module) -> None:
    """Every parameter in multiples of `STEP`; norms' scales around 1."""
    generator = np.random.default_rng(0)
    for name, array in model.named_parameters():
        is_scale = name.endswith("layer_norm.weight")
        is_large = name.startswith("shared") or "relative_attention_bias" in name
        # scores are not scaled: queries of released models are small
        size = 0.2 if is_scale else 0.7 if is_large else 0.08 if name.endswith(".q.weight") else 0.25
        numbers = generator.standard_normal(tuple(array.shape)) * size + is_scale
        whole = np.clip(np.rint(numbers / STEP), -127, 127)
        array.copy_(torch.from_numpy((whole * STEP).astype(np.float32)))


def saved(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a model's directory, as its files have them.

    The classes of 5.x tie every head that they make: one of its own is put into the files, as released ones have it.
    """
    config = MODELS[name]
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**config)).float()
    with torch.no_grad():
        randomize(model)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if not config["tie_word_embeddings"]:
        shape = weights["shared.weight"].shape
        numbers = np.random.default_rng(2).standard_normal(shape) * 0.25
        weights["lm_head.weight"] = (np.rint(numbers / STEP) * STEP).astype(np.float32)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        path = folder / "config.json"
        said = json.loads(path.read_text()) | {"tie_word_embeddings": False}
        del said["scale_decoder_outputs"]
        path.write_text(json.dumps(said))
    return weights


def record(name: str) -> None:
    """The fixture of one model."""
    generator = np.random.default_rng(1)
    rows = len(LENGTHS)
    tokens = generator.integers(2, 40, (rows, max(LENGTHS)))
    targets = generator.integers(1, 40, (rows, max(DECODER_LENGTHS)))
    is_text, is_asked = (np.arange(max(lengths)) < np.array(lengths)[:, None] for lengths in (LENGTHS, DECODER_LENGTHS))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tensors = saved(name, Path(folder))
        written = json.loads((Path(folder) / "config.json").read_text())
        model = transformers.T5ForConditionalGeneration.from_pretrained(folder).float().eval()
        read = {"attention_mask": torch.from_numpy(is_text.astype(np.int64))}
        found = model(torch.from_numpy(tokens), **read, labels=torch.from_numpy(np.where(is_asked, targets, -100)))
        # the cache of 5.24 has as many layers as the encoder
        greedy = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "use_cache": False}
        answers, penalized = (
            model.generate(torch.from_numpy(tokens), **read, **greedy, **rules) for rules in ({}, PENALTIES)
        )
    weights = {f"weights/{key}": np.rint(value / STEP).astype(np.int8) for key, value in tensors.items()}
    assert all(np.array_equal(weights[f"weights/{key}"] * np.float32(STEP), value) for key, value in tensors.items())
    path = FOLDER / "seq2seq" / f"{name}.npz"
    np.savez_compressed(
        path,
        config=json.dumps(written),
        tokens=tokens.astype(np.int32),
        is_text=is_text,
        targets=targets.astype(np.int32),
        is_asked=is_asked,
        logits=found.logits.numpy(),
        loss=found.loss.numpy(),
        answers=answers.numpy().astype(np.int32),
        penalized=penalized.numpy().astype(np.int32),
        **weights,
    )
    size = f"{path.stat().st_size:,} bytes"
    print(f"{path.name}: {size}, logits up to {found.logits.abs().max():.1f}, answers {answers.tolist()}")


if __name__ == "__main__":
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for name in MODELS:
        record(name)
