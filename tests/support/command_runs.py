"""Runs of the real command for the tests beside it: a small text, a small model, here or in a process of its own."""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxtron.train.__main__ import main
from tests.support.commands import Ended, run_main
from tests.support.compiling import QUICK, programs

SMALL = (
    *("--model.num_layers", "1", "--model.hidden_size", "32", "--model.num_heads", "2"),
    *("--data.sequence_length", "32", "--train.global_batch", "8", "--train.precision", "fp32"),
    *("--run.log_every", "1"),
)
# what a run measures that does not depend on the clock
EXACT = tuple("step tokens loss gradient_norm learning_rate loss_scale skipped_steps validation_loss".split())

started: list[subprocess.Popen[str]] = []


@dataclass(frozen=True)
class FinishedRun:
    """The flags that it was started with, where it is, and what it printed."""

    flags: list[str]
    directory: Path
    ended: Ended

    @property
    def text(self) -> Path:
        """What it was trained on."""
        return self.directory.parent / "text.txt"


def write_text(path: Path, *, num_words: int = 4000, seed: int = 0) -> Path:
    """A file of words in random order."""
    words = "the cat sat on a mat and then ran off to see what it was that made such noise\n".split(" ")
    path.write_text(" ".join(random.Random(seed).choices(words, k=num_words)))
    return path


def small(folder: Path, *, run: str = "run") -> list[str]:
    """Flags of a run in `folder/run` on a text there, with its cache of tokens there too."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    places = {
        "run.directory": folder / run,
        "data.path": text,
        "data.cache_directory": folder / "tokens",
        "runtime.compilation_cache": programs(),
    }
    return [*SMALL, *(word for name, path in places.items() for word in (f"--{name}", str(path)))]


def run_here(*arguments: str) -> Ended:
    """The command in this process, on its eight devices."""
    with own_programs():
        return run_main(main, arguments)


@contextmanager
def own_programs() -> Iterator[None]:
    """Lets a command choose its own cache of compiled programs, and leaves none to the tests after it."""
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def start(*arguments: str, cache: Path) -> subprocess.Popen[str]:
    """The command as a user types it, in a process of its own that starts JAX anew; `cache` stands for ~/.cache."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxtron.train", *arguments],
        env=environment | {"XDG_CACHE_HOME": str(cache), "XLA_FLAGS": QUICK},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    return process


def end(process: subprocess.Popen[str]) -> Ended:
    """Wait for a process, three minutes at most."""
    try:
        out, err = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"the command did not end:\n{out}\n{err}") from None
    return Ended(process.returncode, out, err)


def records(directory: Path) -> list[dict]:
    """What `metrics.jsonl` has of each step and does not depend on the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in EXACT if name in line} for line in lines]


def history(directory: Path) -> list[dict]:
    """Which commands trained the run."""
    return [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
