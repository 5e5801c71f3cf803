"""`python -m jaxtron.runs list | show RUN | compare RUN RUN ...`: runs of a directory, from their files alone."""

import sys

from jaxtron import interrupts  # noqa: F401  (answers Ctrl-C while the rest is imported)
from jaxtron.command import hand_over, run_command
from jaxtron.runs.request import parse


def main(argv: list[str]) -> int:
    """Lists, shows or compares; nothing of a run is changed, and none is waited for."""
    request = parse(argv)
    if isinstance(request, str):
        print(request)
        return 0 if argv else 2
    hand_over("jaxtron.runs.report", jax=False).report(request)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
