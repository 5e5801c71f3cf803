"""Checkpoints as Megatron-LM wrote them, by `make.py`."""

import tarfile
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
NAMES = sorted(path.name.removesuffix(".tar.xz") for path in FOLDER.glob("*.tar.xz"))


def unpack(name: str, folder: Path) -> Path:
    """A fixture's directory: `torch_dist`, `torch` and `logits.npz`."""
    with tarfile.open(FOLDER / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


def logits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and the logits that Megatron-LM computed of them."""
    with np.load(folder / "logits.npz") as file:
        return file["tokens"], file["logits"]
