"""`python -m jaxtron.convert upcycle RUN_OR_WEIGHTS --output DIRECTORY`: a dense model becomes a mixture of experts.

`python -m jaxtron.convert adapters RUN --base WEIGHTS --output DIRECTORY`: the adapters of a run as peft's files.
"""

import sys

from jaxtron import interrupts  # noqa: F401  (answers Ctrl-C while the rest is imported)
from jaxtron.command import hand_over, run_command
from jaxtron.config import UserError
from jaxtron.convert.adapters_request import ADAPTERS_USAGE, adapters_configuration, parse_adapters
from jaxtron.convert.request import PROGRAM, USAGE, parse, read_configuration


def main(argv: list[str]) -> int:
    """Runs the subcommand that the line begins with."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {USAGE}\n       {ADAPTERS_USAGE}\n\n{PROGRAM} upcycle --help lists the flags.")
        return 0 if argv else 2
    subcommand, *words = argv
    if subcommand == "adapters":
        asked = parse_adapters(words)
        trained = adapters_configuration(asked)
        hand_over("jaxtron.convert.adapters").export_adapters(asked, trained)
        return 0
    if subcommand != "upcycle":
        raise UserError(f"unknown subcommand {subcommand!r}; there are upcycle and adapters: {USAGE}")
    request = parse(words)
    dense, mixture = read_configuration(request)
    hand_over("jaxtron.convert.upcycle").upcycle(request, dense, mixture)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
