"""`python -m benchmarks.curate [--input corpus.jsonl]`: documents a second of every step of a curation, as JSON.

Each step is a whole curation with that step alone: input read, step done, output written. `read_and_write` has a step
that looks at nothing but a text's length, so the difference to it is what a step costs. Without an input a corpus is
made: words drawn by Zipf's law, a tenth of the documents copies and a tenth near copies of others.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from benchmarks import record
from jaxtron.command import configure, run_command
from jaxtron.config import Config
from jaxtron.curate.config import STEPS, Curation
from jaxtron.curate.run import curate

VOCABULARY = 50_000
STOP_WORDS = ("the", "of", "and", "to", "that", "with", "have", "be")
TASK_TEXTS, TASK_WORDS = 2000, 60


class CurateBenchmark(Config):
    """What is measured."""

    input: tuple[str, ...] = ()
    """A corpus; none: one is made."""
    documents: int = Field(default=20_000, ge=100)
    """Documents of a corpus that is made."""
    words: int = Field(default=400, ge=20)
    """Words of each, on average."""
    workers: int = Field(default=1, ge=1)
    """Processes."""
    seed: int = Field(default=0, ge=0)
    """Of the corpus that is made."""
    output: str | None = None
    """A .json file or a folder for the result; none: only printed."""


def main(argv: list[str]) -> int:
    """Measures every step, prints the JSON and writes it if asked to."""
    purpose = "Measure the steps of a curation one by one."
    config = configure(CurateBenchmark, argv, program="python -m benchmarks.curate", purpose=purpose)
    if config is None:
        return 0
    result = {"benchmark": "curate", **measure(config)}
    print(json.dumps(result, indent=1))
    if config.output:
        record.write(record.destination(config.output, "curate", "cpu"), result)
    return 0


def measure(config: CurateBenchmark) -> dict[str, Any]:
    """Seconds, documents/s and MB/s of text for each step alone and for all of them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = config.input or (str(make_corpus(folder / "corpus.jsonl", config)),)
        tasks = {"tasks": (str(make_tasks(folder / "tasks.jsonl", config.seed)),)}
        runs: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
            "read_and_write": (("length",), {"length": {"least": 0}}),
            **{step: ((step,), {}) for step in STEPS if step != "length"},
            "near_exact_jaccard": (("near",), {"near": {"verify": "exact"}}),
            "all_but_language": (tuple(step for step in STEPS if step != "language"), {}),
        }
        steps = {}
        for run, (names, settings) in runs.items():
            if "decontaminate" in names:
                settings = settings | {"decontaminate": tasks}
            values = {
                "input": inputs,
                "output": str(folder / run),
                "steps": names,
                "workers": config.workers,
            } | settings
            start, cpu_start = time.perf_counter(), cpu_seconds()
            report = curate(Curation(**values))
            seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
            steps[run] = {
                "seconds": round(seconds, 3),
                "documents_per_second": round(report["documents"] / seconds, 1),
                "megabytes_per_second": round(report["bytes"] / seconds / 1e6, 3),
                "documents_per_cpu_second": round(report["documents"] / cpu, 1),
                "kept_documents": report["kept"]["documents"],
            }
            documents, size = report["documents"], report["bytes"]
    return {
        **record.circumstances("cpu", "cpu", 1),
        "input": list(config.input) or "made",
        "documents": documents,
        "text_bytes": size,
        "workers": config.workers,
        "steps": steps,
    }


def cpu_seconds() -> float:
    """Of this process and its workers that ended: tells a step's cost where others share the machine."""
    return sum(os.times()[:4])


def make_corpus(path: Path, config: CurateBenchmark) -> Path:
    """Documents of Zipf's words in lines of about 80 words; a tenth copies, a tenth with one word in 100 replaced."""
    random = np.random.default_rng(config.seed)
    vocabulary = make_vocabulary(random)
    texts: list[list[str]] = []
    with path.open("w") as file:
        for number in range(config.documents):
            kind = random.random() if texts else 1.0
            if kind < 0.2:
                words = list(texts[random.integers(len(texts))])
                if kind < 0.1:
                    for place in random.integers(len(words), size=max(1, len(words) // 100)):
                        words[place] = vocabulary[int(random.integers(VOCABULARY))]
            else:
                words = draw_words(random, vocabulary, int(random.integers(config.words // 2, config.words * 3 // 2)))
                texts.append(words)
            lines = [" ".join(words[start : start + 80]) + "." for start in range(0, len(words), 80)]
            file.write(json.dumps({"id": number, "text": "\n".join(lines)}) + "\n")
    return path


def make_tasks(path: Path, seed: int) -> Path:
    """Texts of the same words that no document has."""
    random = np.random.default_rng(seed + 1)
    vocabulary = make_vocabulary(np.random.default_rng(seed))
    texts = [" ".join(draw_words(random, vocabulary, TASK_WORDS)) for _ in range(TASK_TEXTS)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_vocabulary(random: np.random.Generator) -> list[str]:
    """Words of 2 to 9 letters, the stop words the most frequent."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    made = ["".join(random.choice(letters, size)) for size in random.integers(2, 10, VOCABULARY - len(STOP_WORDS))]
    return [*STOP_WORDS, *made]


def draw_words(random: np.random.Generator, vocabulary: list[str], count: int) -> list[str]:
    """Words by Zipf's law: the n-th is drawn in proportion to 1 / n."""
    ranks = np.exp(random.random(count) * np.log(len(vocabulary))).astype(np.int64) - 1
    return [vocabulary[rank] for rank in ranks.tolist()]


if __name__ == "__main__":
    sys.exit(run_command(main))
