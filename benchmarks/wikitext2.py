"""`python -m benchmarks.wikitext2 TRAIN TEST`: text to word-level perplexity by the commands a user has, as JSON.

A byte-level BPE is trained on the first text alone, its articles are preprocessed and trained on
(configs/wikitext2.yaml), and the second text, which nothing has seen, is scored. Neither text is detokenized. Further
flags are training's.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.preprocess import read_documents, train
from jaxtron.command import run_command
from jaxtron.config import UserError

CONFIG = record.ROOT / "configs" / "wikitext2.yaml"
VOCABULARY = 4096


def main(argv: list[str]) -> int:
    """Goes all the way, prints the JSON and writes it if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wikitext2", description=__doc__)
    parser.add_argument("train", type=Path, metavar="TRAIN", help="UTF-8 text of articles, such as WikiText's")
    parser.add_argument("test", type=Path, metavar="TEST", help="UTF-8 text to score")
    parser.add_argument("--directory", type=Path, default=Path("runs/wikitext2"), help="tokens, run and checkpoints")
    parser.add_argument("--strides", type=int, nargs="+", default=[256, 64], help="tokens that a window scores")
    parser.add_argument("--output", help="a .json file, or a folder that gets <date>-cpu-wikitext2.json")
    options, flags = parser.parse_known_args(argv)
    path = record.destination(options.output, "wikitext2", "cpu") if options.output else None
    result = measure(options, flags)
    print(json.dumps(result, indent=1))
    if path is not None:
        record.write(path, result)
    return 0


def measure(options: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Figures of the training's last line and of the test text, for each stride."""
    # before anything changes
    circumstances = record.circumstances("cpu", platform.machine(), os.cpu_count() or 1)
    folder = options.directory
    folder.mkdir(parents=True, exist_ok=True)
    documents = read_documents([options.train])
    tokenizer, prefix, run = train(documents, VOCABULARY, folder / "tokenizer.json"), folder / "tokens", folder / "run"
    with (folder / "articles.jsonl").open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    files = ["--input", folder / "articles.jsonl", "--output", prefix, "--tokenizer", tokenizer]
    jaxtron("preprocess", *files, "--append-eod", "--overwrite")
    start = time.perf_counter()
    places = ["--data.path", prefix, "--data.tokenizer", tokenizer, "--run.directory", run]
    jaxtron("train", CONFIG, *places, *flags)
    seconds = time.perf_counter() - start
    scores = {}
    for stride in options.strides:
        file = folder / f"stride{stride}.json"
        jaxtron("evaluate", run, "--text", options.test, "--stride", stride, "--json", file)
        found = json.loads(file.read_text())
        scores[str(stride)] = {name: value for name, value in found.items() if name not in ("run", "text", "stride")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "benchmark": "wikitext2",
        "name": "wikitext2",
        **circumstances,
        "articles": len(documents),
        "train_seconds": round(seconds, 1),
        "flags": flags,
        "losses": {line["step"]: line["loss"] for line in lines if "loss" in line},
        "validation_losses": {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line},
        "test_by_stride": scores,
    }


def jaxtron(*words: object) -> None:
    """A command of Jaxtron's in a process of its own, its output on the standard error; UserError where it fails."""
    done = subprocess.run([sys.executable, "-m", "jaxtron", *map(str, words)], stdout=sys.stderr)
    if done.returncode:
        raise UserError(f"jaxtron {words[0]} ended with exit code {done.returncode}")


if __name__ == "__main__":
    sys.exit(run_command(main))
