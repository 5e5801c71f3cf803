"""`python -m jaxtron.plan CONFIG.yaml --gpu h100 --nodes 384`: a run weighed before anything runs."""

import sys

from jaxtron.command import configure, hand_over, run_command
from jaxtron.plan.request import PROGRAM, help_text, parse
from jaxtron.train.config import Configuration


def main(argv: list[str]) -> int:
    """Prints what was asked for about the configuration on its mesh."""
    request = parse(argv)
    if {"-h", "--help"} & set(argv):
        print(help_text(), end="\n\n")
    purpose = "Every setting of a run; the planner's own flags are above."
    config = configure(Configuration, request.words, program=PROGRAM, purpose=purpose)
    if config is None:
        return 0
    hand_over("jaxtron.plan.show").SHOW[request.kind](config.resolved(), request)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
