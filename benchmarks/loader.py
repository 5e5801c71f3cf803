"""`python -m benchmarks.loader [--tokens N] [--output FOLDER]`: tokens a second through the loader, by what it does."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from jaxtron.command import run_command
from jaxtron.data.config import DataConfig
from jaxtron.data.dataset import open_data
from jaxtron.data.megatron.indexed import IndexedWriter
from jaxtron.data.tokenizers import load_tokenizer

SEQUENCE_LENGTH, BATCH, MEAN_LENGTH = 4096, 64, 600
RESETS = {"mask_end_of_document": True, "reset_positions": True, "reset_attention": True}
MIDDLE = {"prefix": 300, "middle": 301, "suffix": 302, "characters": False}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "documents": RESETS,
    "middle": {"fill_in_middle": MIDDLE},
    "documents, two processes": {**RESETS, "processes": 2},
}


def main(argv: list[str]) -> int:
    """Measures, prints the JSON and writes it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200_000_000, help="tokens of the file that is made")
    parser.add_argument(
        "--batches", type=int, default=200, help=f"batches of {BATCH} x {SEQUENCE_LENGTH} that are read"
    )
    parser.add_argument("--output", help="a .json file, or the folder for one")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        prefix = make_tokens(Path(folder) / "tokens", options.tokens)
        cases = {name: measure(prefix, settings, folder, options.batches) for name, settings in CASES.items()}
    result = {
        "benchmark": "loader",
        **record.circumstances("cpu", "cpu", 1),
        "tokens": options.tokens,
        "sequence_length": SEQUENCE_LENGTH,
        "batch": BATCH,
        "mean_document": MEAN_LENGTH,
        "cases": cases,
    }
    print(json.dumps(result, indent=1))
    if options.output:
        record.write(record.destination(options.output, "loader", "cpu"), result)
    return 0


def make_tokens(prefix: Path, count: int) -> str:
    """A token file of bytes in documents of geometric lengths."""
    random, end = np.random.default_rng(0), load_tokenizer("bytes").end_of_document
    with IndexedWriter(str(prefix), np.dtype(np.uint16)) as writer:
        for length in random.geometric(1 / MEAN_LENGTH, count // MEAN_LENGTH):
            document = random.integers(0, 256, length + 1, np.uint16)
            document[-1] = end
            writer.add_item(document)
            writer.end_document()
    return str(prefix)


def measure(prefix: str, settings: dict[str, Any], cache: str, batches: int) -> dict[str, float]:
    """Tokens a second by the clock, and by the processor time of this process where it reads itself."""
    config = DataConfig(path=prefix, split="1,0,0", sequence_length=SEQUENCE_LENGTH, cache_directory=cache, **settings)
    began = time.perf_counter()
    data = open_data(config, seed=0, train_samples=BATCH * batches)
    opened = time.perf_counter() - began
    with data.train_loader(batch_size=lambda _: BATCH, local_rows=np.arange) as loader:
        next(loader)
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(batches - 1):
            next(loader)
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
    tokens = (batches - 1) * BATCH * SEQUENCE_LENGTH
    found = {"open_seconds": opened, "tokens_per_second": tokens / seconds}
    return found if config.processes else found | {"tokens_per_core_second": tokens / busy}


if __name__ == "__main__":
    sys.exit(run_command(main))
