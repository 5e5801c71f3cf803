"""`python -m jaxtron.serve RUN_OR_WEIGHTS`: a trained model at an address, by OpenAI's protocol."""

import sys

from jaxtron import interrupts  # noqa: F401  (answers Ctrl-C while the rest is imported)
from jaxtron.command import hand_over, run_command
from jaxtron.generate.source import read_continuing
from jaxtron.serve.request import USAGE, parse


def main(argv: list[str]) -> int:
    """Serves a model until it is told to stop."""
    if not argv:
        print(f"usage: {USAGE}\n\n--help lists the flags.")
        return 2
    request = parse(argv)
    hand_over("jaxtron.serve.run").serve(request, read_continuing(request.source, "a server"))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
