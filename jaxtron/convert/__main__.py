"""`python -m jaxtron.convert --from RUN_OR_WEIGHTS --to DIRECTORY`: a model from others' files or into Hugging Face's.

`python -m jaxtron.convert upcycle RUN_OR_WEIGHTS --output DIRECTORY`: a dense model becomes a mixture of experts.
`python -m jaxtron.convert adapters RUN --base WEIGHTS --output DIRECTORY`: the adapters of a run as peft's files.
"""

import sys

from jaxtron import interrupts  # noqa: F401  (answers Ctrl-C while the rest is imported)
from jaxtron.command import hand_over, run_command
from jaxtron.config import UserError
from jaxtron.convert import request as upcycling
from jaxtron.convert import transfer
from jaxtron.convert.adapters_request import ADAPTERS_USAGE, adapters_configuration, parse_adapters

USAGE = f"{transfer.USAGE}\n       {upcycling.USAGE}\n       {ADAPTERS_USAGE}"
HELP = f"usage: {USAGE}\n\n{transfer.PROGRAM} upcycle --help and {transfer.PROGRAM} --from --help list the flags."


def main(argv: list[str]) -> int:
    """Converts a model, or runs the subcommand that the line begins with."""
    if not argv or argv in (["--help"], ["-h"]):
        print(HELP)
        return 0 if argv else 2
    first, *words = argv
    if first == "upcycle":
        request = upcycling.parse(words)
        dense, mixture = upcycling.read_configuration(request)
        hand_over("jaxtron.convert.upcycle").upcycle(request, dense, mixture)
        return 0
    if first == "adapters":
        asked = parse_adapters(words)
        trained = adapters_configuration(asked)
        hand_over("jaxtron.convert.adapters").export_adapters(asked, trained)
        return 0
    if not first.startswith("-"):
        raise UserError(
            f"unknown subcommand {first!r}; there are upcycle and adapters, or give --from and --to: {transfer.USAGE}"
        )
    transferred = transfer.parse_transfer(argv)
    if transferred.format == transfer.RUN:
        config = transfer.run_configuration(transferred)
        hand_over("jaxtron.convert.from_hub").write_run(transferred, config)
    else:
        trained, said, dtype = transfer.export_configuration(transferred)
        hand_over("jaxtron.convert.to_hub").write_weights(transferred, trained, said, dtype)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
