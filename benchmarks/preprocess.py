"""`python -m benchmarks.preprocess TEXT ...`: the preprocess command against its bare tokenizer, as JSON.

The texts are cut into documents (at WikiText's titles, or at blank lines) and repeated; a byte-level BPE is trained on
them unless --tokenizer names a tokenizer.json. Bare is the tokenizer's library on texts in memory until their ids are
there, as many threads as the command has workers. The command reads JSON lines, and its time is that of the whole
process. They take turns. On a machine that others use too, the processor time of one worker tells more than the clock.
"""

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers

from benchmarks import record
from jaxtron.command import run_command
from jaxtron.config import UserError

# texts in one call of the bare tokenizer: large beside the cost of a call, small beside memory
BATCH_BYTES = 4_000_000
TITLE = re.compile(r"\n(?= = [^=])")
BLANK = re.compile(r"\n\s*\n")


def main(argv: list[str]) -> int:
    """Measures what the command line asks, prints the JSON and writes it if asked to."""
    arguments = parse(argv)
    # before the library starts its threads
    os.environ |= {"RAYON_NUM_THREADS": str(arguments.workers), "TOKENIZERS_PARALLELISM": "true"}
    path = record.destination(arguments.output, "preprocess", "cpu") if arguments.output else None
    result = measure(arguments)
    print(json.dumps(result, indent=1))
    if path is not None:
        record.write(path, result)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The benchmark's flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preprocess", description=__doc__)
    add = parser.add_argument
    add("texts", nargs="+", type=Path, metavar="TEXT", help="UTF-8 text files, such as WikiText's")
    add("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json (none: a BPE trained on the texts)")
    add("--vocabulary", type=int, default=8192, metavar="V", help="entries of the trained one")
    add("--megabytes", type=int, default=50, metavar="N", help="text to tokenize in one go")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="workers, and bare threads")
    add("--turns", type=int, default=3, metavar="N", help="how often each is measured; the median is told")
    add("--output", metavar="PATH", help="a .json file, or a folder that gets <date>-cpu-preprocess.json")
    return parser.parse_args(argv)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each turn, and from their medians documents/s and MB/s of text."""
    documents = read_documents(arguments.texts)
    repeats = max(1, arguments.megabytes * 1_000_000 // sum(len(text.encode()) for text in documents))
    texts = documents * repeats
    num_bytes = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = arguments.tokenizer or train(documents, arguments.vocabulary, folder / "tokenizer.json")
        with (folder / "in.jsonl").open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        bare = tokenizers.Tokenizer.from_file(str(file))
        ways: dict[str, Callable[[], object]] = {
            "bare_encode_batch": lambda: encode(bare.encode_batch, texts),
            "bare_encode_batch_fast": lambda: encode(bare.encode_batch_fast, texts),
            "command": lambda: run(folder, file, arguments.workers),
        }
        seconds, processor = ({way: [] for way in ways} for _ in range(2))
        for _, (way, work) in itertools.product(range(arguments.turns), ways.items()):
            start, used = time.perf_counter(), processor_seconds()
            work()
            seconds[way].append(time.perf_counter() - start)
            processor[way].append(processor_seconds() - used)
    median = {way: statistics.median(turns) for way, turns in seconds.items()}
    least = {way: min(turns) for way, turns in processor.items()}
    return {
        "benchmark": "preprocess",
        "name": "preprocess",
        **record.circumstances("cpu", platform.machine(), os.cpu_count() or 1),
        "tokenizers": version("tokenizers"),
        "tokenizer": arguments.tokenizer.name if arguments.tokenizer else f"BPE of {arguments.vocabulary} entries",
        "workers": arguments.workers,
        "documents": len(texts),
        "text_bytes": num_bytes,
        "seconds": {way: [round(turn, 3) for turn in turns] for way, turns in seconds.items()},
        "documents_per_second": {way: round(len(texts) / value, 1) for way, value in median.items()},
        "megabytes_per_second": {way: round(num_bytes / value / 1e6, 3) for way, value in median.items()},
        "command_of_encode_batch": round(median["bare_encode_batch"] / median["command"], 3),
        "command_of_encode_batch_fast": round(median["bare_encode_batch_fast"] / median["command"], 3),
        # several workers are not this process's children, and their time is not known here
        "processor": None
        if arguments.workers > 1
        else {
            "seconds": {way: [round(turn, 3) for turn in turns] for way, turns in processor.items()},
            "command_of_encode_batch": round(least["bare_encode_batch"] / least["command"], 3),
            "command_of_encode_batch_fast": round(least["bare_encode_batch_fast"] / least["command"], 3),
        },
    }


def processor_seconds() -> float:
    """Processor time of this process and of those that it started and that ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def read_documents(paths: Sequence[Path]) -> list[str]:
    """The texts' documents, without empty ones."""
    documents: list[str] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}; give UTF-8 text files") from None
        documents += [part for part in (TITLE if TITLE.search(text) else BLANK).split(text) if part.strip()]
    if not documents:
        raise UserError("the texts are empty; give text files with text")
    return documents


def train(documents: Sequence[str], size: int, path: Path) -> Path:
    """A byte-level BPE of the documents as GPT-2's, written as tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(path))
    return path


def encode(encode_batch: Callable, texts: Sequence[str]) -> None:
    """The library's own ids, batch by batch, thrown away."""
    # batches of as many documents as have about BATCH_BYTES
    count = max(1, BATCH_BYTES * len(texts) // sum(map(len, texts)))
    for first in range(0, len(texts), count):
        for encoding in encode_batch(texts[first : first + count], add_special_tokens=False):
            _ = encoding.ids


def run(folder: Path, tokenizer: Path, workers: int) -> None:
    """The command in a process of its own."""
    files = ["--input", str(folder / "in.jsonl"), "--output", str(folder / "out"), "--tokenizer", str(tokenizer)]
    command = [
        sys.executable,
        "-m",
        "jaxtron.preprocess",
        *files,
        "--workers",
        str(workers),
        "--append-eod",
        "--overwrite",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(run_command(main))
