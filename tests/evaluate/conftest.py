"""A trained run that the tests evaluate, and the command in this process."""

import random
from pathlib import Path

import pytest

from tests.support.evaluate_runs import TrainedRun, train


def words(num_words: int, seed: int = 0) -> str:
    """Words in random order."""
    known = "the cat sat on a mat and then ran off to see what it was that made such noise\n".split(" ")
    return " ".join(random.Random(seed).choices(known, k=num_words))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Four steps on one device with characters, checkpoints of steps 2 and 4; for looking at, not for changing."""
    folder = tmp_path_factory.mktemp("trained")
    return train(folder, words(3000))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A short text that no number of windows divides."""
    path = tmp_path / "text.txt"
    path.write_text(words(60, seed=1))
    return path
