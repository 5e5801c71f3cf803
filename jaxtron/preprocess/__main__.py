"""`python -m jaxtron.preprocess --input *.jsonl --tokenizer NAME --output PREFIX`: text to Megatron's token files."""

import json
import sys
from collections.abc import Callable

from jaxtron.command import run_command
from jaxtron.config import UserError
from jaxtron.data.gpt_index import order_digest
from jaxtron.preprocess import curate
from jaxtron.preprocess.inspect import inspect, text
from jaxtron.preprocess.merge import merge
from jaxtron.preprocess.request import parse_inspect, parse_merge, parse_order, parse_tokenize
from jaxtron.preprocess.tokenize import tokenize


def main(argv: list[str]) -> int:
    """Tokenizes, or runs the subcommand that the line begins with."""
    if argv and argv[0] in SUBCOMMANDS:
        return SUBCOMMANDS[argv[0]](argv[1:])
    if argv and not argv[0].startswith("-"):
        raise UserError(f"unknown subcommand {argv[0]!r}; give --input for tokenizing, or {', '.join(SUBCOMMANDS)}")
    outcome = tokenize(parse_tokenize(argv))
    left_out = f", {outcome.damaged:,} damaged entries left out" if outcome.damaged else ""
    print(f"{outcome.documents:,} documents, {outcome.tokens:,} tokens{left_out}")
    print(f"{outcome.text_bytes / 1e6:,.1f} MB of text in {outcome.seconds:.1f} s", end=", ")
    print(f"{outcome.text_bytes / 1e6 / outcome.seconds:,.1f} MB/s")
    for prefix in outcome.prefixes:
        print(f"written   {prefix}.bin and .idx")
    return 0


def run_merge(argv: list[str]) -> int:
    """`merge --input PREFIX ... --output PREFIX`."""
    request = parse_merge(argv)
    merge(request)
    print(f"written   {request.output}.bin and .idx")
    return 0


def run_inspect(argv: list[str]) -> int:
    """`inspect PREFIX [--json]`."""
    request = parse_inspect(argv)
    found = inspect(request)
    print(json.dumps(found, indent=1) if request.json else text(found))
    return 0


def run_order(argv: list[str]) -> int:
    """`order PREFIX --sequence-length S --samples N --seed K --split A,B,C [--json]`."""
    request = parse_order(argv)
    digest = order_digest(
        request.prefix,
        sequence_length=request.sequence_length,
        samples=request.samples,
        seed=request.seed,
        split=request.split,
    )
    if request.json:
        print(json.dumps(digest, indent=1))
    else:
        for name, index in digest.items():
            print(f"{name:<16}{index['length']:>14,}  {index['sha256']}")
    return 0


SUBCOMMANDS: dict[str, Callable[[list[str]], int]] = {
    "merge": run_merge,
    "inspect": run_inspect,
    "order": run_order,
    "curate": curate.main,
}


if __name__ == "__main__":
    sys.exit(run_command(main))
