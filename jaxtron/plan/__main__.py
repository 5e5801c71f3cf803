"""`python -m jaxtron.plan CONFIG.yaml --gpu h100 --nodes 384`: a run weighed before anything runs."""

import sys

from jaxtron import interrupts  # noqa: F401  (answers Ctrl-C while the rest is imported)
from jaxtron.command import configure, hand_over, run_command
from jaxtron.plan.request import PURPOSES, USAGE, flags_text, parse, program_of
from jaxtron.run.beginning import check_beginning, settings_below
from jaxtron.run.configuration import configuration_type


def main(argv: list[str]) -> int:
    """Prints what was asked for about the configuration on its mesh; without a word, how to ask."""
    if not argv:
        print(USAGE)
        return 2
    request = parse(argv)
    kind = request.kind
    texts = {"program": program_of(kind), "purpose": PURPOSES[kind], "flags": flags_text(kind)}
    config = configure(configuration_type(argv), request.words, under=settings_below, **texts)
    if config is None:
        return 0
    check_beginning(config)
    hand_over("jaxtron.plan.show").SHOW[kind](config.resolved(), request)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
