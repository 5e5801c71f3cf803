"""`python -m jaxtron.launch --nodes MIN:MAX -- python -m jaxtron.train CONFIG.yaml ...`: this host's supervisor."""

import sys

from jaxtron import interrupts  # noqa: F401  (answers Ctrl-C while the rest is imported)
from jaxtron.command import configure, hand_over, run_command
from jaxtron.launch.request import PROGRAM, parse
from jaxtron.run.beginning import settings_below
from jaxtron.run.configuration import configuration_type


def main(argv: list[str]) -> int:
    """Supervises this host's processes of a training to the end of the run; its exit code."""
    request = parse(argv)
    if request is None:
        return 0
    config_type = configuration_type(request.settings)
    config = configure(config_type, request.settings, program=PROGRAM, purpose="Train a model.", under=settings_below)
    if config is None:
        return 0
    return hand_over("jaxtron.launch.run", jax=False).supervise(request, config)


if __name__ == "__main__":
    sys.exit(run_command(main))
