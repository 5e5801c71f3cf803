"""Small models of Hugging Face transformers as `make.py` wrote them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
STEP = 1 / 64


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
        return Fixture(json.loads(str(file["config"])), weights, file["tokens"], file["logits"])
