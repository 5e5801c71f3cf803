"""`python -m jaxtron.preprocess --input *.jsonl --tokenizer NAME --output PREFIX`: text to Megatron's token files."""

import sys
from collections.abc import Callable
from typing import Any

from jaxtron import interrupts  # noqa: F401  (answers Ctrl-C while the rest is imported)
from jaxtron.command import hand_over, run_command
from jaxtron.config import UserError
from jaxtron.preprocess.request import parse_inspect, parse_merge, parse_order, parse_tokenize

SUBCOMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "tokenize": parse_tokenize,
    "merge": parse_merge,
    "inspect": parse_inspect,
    "order": parse_order,
}


def main(argv: list[str]) -> int:
    """Tokenizes, or runs the subcommand that the line begins with."""
    subcommand, words = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("tokenize", argv)
    if subcommand == "curate":
        raise UserError("curate is a command of its own: python -m jaxtron.curate")
    if subcommand not in SUBCOMMANDS:
        others = ", ".join(name for name in SUBCOMMANDS if name != "tokenize")
        raise UserError(f"unknown subcommand {subcommand!r}; give --input for tokenizing, or {others}")
    request = SUBCOMMANDS[subcommand](words)
    if request is not None:
        hand_over("jaxtron.preprocess.commands", jax=False).RUN[subcommand](request)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
