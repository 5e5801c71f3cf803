"""`python -m jaxtron.convert upcycle RUN_OR_WEIGHTS --output DIRECTORY`: a dense model becomes a mixture of experts."""

import sys

from jaxtron import interrupts  # noqa: F401  (answers Ctrl-C while the rest is imported)
from jaxtron.command import hand_over, run_command
from jaxtron.config import UserError
from jaxtron.convert.request import PROGRAM, USAGE, parse, read_configuration


def main(argv: list[str]) -> int:
    """Runs the subcommand that the line begins with."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {USAGE}\n\n{PROGRAM} upcycle --help lists the flags.")
        return 0 if argv else 2
    subcommand, *words = argv
    if subcommand != "upcycle":
        raise UserError(f"unknown subcommand {subcommand!r}; there is upcycle: {USAGE}")
    request = parse(words)
    dense, mixture = read_configuration(request)
    hand_over("jaxtron.convert.upcycle").upcycle(request, dense, mixture)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
