"""`python -m benchmarks.pairs FOLDER`: texts and answers that a small encoder-decoder learns to the letter.

A text is some letters, none twice; its answer has them in the order of the alphabet. `train.jsonl` has none of the
answers of `held_out.jsonl`, so that nobody knows these by heart.
"""

import argparse
import json
import random
import string
import sys
from collections.abc import Iterable
from pathlib import Path

from jaxtron.command import run_command

SHORTEST, LONGEST = 3, 10


def main(argv: list[str]) -> int:
    """Writes both files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pairs", description=__doc__)
    parser.add_argument("folder", type=Path, help="gets train.jsonl and held_out.jsonl")
    parser.add_argument("--train", type=int, default=50_000, help="pairs to train on (default: %(default)s)")
    parser.add_argument("--held_out", type=int, default=500, help="pairs to score (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    given = parser.parse_args(argv)
    write(given.folder, given.train, given.held_out, given.seed)
    return 0


def write(folder: Path, train: int, held_out: int, seed: int = 0) -> None:
    """So many pairs to train on and to score, drawn with this seed."""
    generator, kept = random.Random(seed), set[str]()
    scored: list[str] = []
    while len(scored) < held_out:
        text = _draw(generator)
        if _answer(text) not in kept:
            kept.add(_answer(text))
            scored.append(text)
    texts: list[str] = []
    while len(texts) < train:
        text = _draw(generator)
        texts += [] if _answer(text) in kept else [text]
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("train", texts), ("held_out", scored)):
        (folder / f"{name}.jsonl").write_text("".join(_lines(lines)), encoding="utf-8")


def _draw(generator: random.Random) -> str:
    return "".join(generator.sample(string.ascii_lowercase, generator.randint(SHORTEST, LONGEST)))


def _answer(text: str) -> str:
    return "".join(sorted(text))


def _lines(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": _answer(text)}]
        yield json.dumps({"messages": turns}) + "\n"


if __name__ == "__main__":
    sys.exit(run_command(main))
