"""Small models of Hugging Face transformers as `make.py` wrote them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent
STEP = 1 / 64
# the first rows of a tensor that are of no token: zeros here, as nothing reads them
OF_NO_TOKEN = {"model.decoder.embed_positions.weight": 2}


@dataclass(frozen=True)
class Fixture:
    """A model's configuration and weights as its files have them, and its logits for some tokens."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    tokens: np.ndarray
    logits: np.ndarray


def load(name: str) -> Fixture:
    """The fixture of this name."""
    with np.load(FOLDER / f"{name}.npz") as file:
        prefix = "weights/"
        weights = {
            key.removeprefix(prefix): file[key] * np.float32(STEP) for key in file.files if key.startswith(prefix)
        }
        for key, rows in OF_NO_TOKEN.items():
            if key in weights:
                weights[key][:rows] = 0
        return Fixture(json.loads(str(file["config"])), weights, file["tokens"], file["logits"])


def load_batch(folder: str, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A model's config.json, its weights, and the arrays of its batch and what came of it, from a folder's file."""
    prefix = "weights/"
    with np.load(FOLDER / folder / f"{name}.npz") as file:
        weights = {
            key.removeprefix(prefix): file[key] * np.float32(STEP) for key in file.files if key.startswith(prefix)
        }
        others = {key: file[key] for key in file.files if not key.startswith(prefix) and key != "config"}
        return json.loads(str(file["config"])), weights, others


def write(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray], names: Sequence[str] = ("model",)
) -> Path:
    """A directory as `save_pretrained` leaves it: one file, or several of these names with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    index = {key: f"{names[place % len(names)]}.safetensors" for place, key in enumerate(weights)}
    for file in set(index.values()):
        save_file({key: weights[key] for key in weights if index[key] == file}, folder / file, {"format": "pt"})
    if len(names) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder
