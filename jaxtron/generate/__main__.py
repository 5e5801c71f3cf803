"""`python -m jaxtron.generate RUN_OR_WEIGHTS --prompt TEXT`: text that a trained model makes."""

import sys

from jaxtron import interrupts  # noqa: F401  (answers Ctrl-C while the rest is imported)
from jaxtron.command import hand_over, run_command
from jaxtron.generate.request import USAGE, parse
from jaxtron.generate.source import read_model


def main(argv: list[str]) -> int:
    """Prints the text of a model, and writes it where asked to."""
    if not argv:
        print(f"usage: {USAGE}\n\n--help lists the flags.")
        return 2
    request = parse(argv)
    hand_over("jaxtron.generate.write").write(request, read_model(request.source))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
