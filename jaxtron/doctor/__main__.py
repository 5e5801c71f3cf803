"""`python -m jaxtron.doctor [CONFIG.yaml]`: what of a machine would end or spoil a run, before it begins."""

import dataclasses
import sys

from jaxtron import interrupts  # noqa: F401  (answers Ctrl-C while the rest is imported)
from jaxtron.command import configure, hand_over, run_command
from jaxtron.config import take_file
from jaxtron.doctor.request import FLAGS, PROGRAM, PURPOSE, USAGE, parse
from jaxtron.run.beginning import settings_below
from jaxtron.run.configuration import configuration_type


def main(argv: list[str]) -> int:
    """Prints the findings; 1 where one is a fault, 2 where the settings do not read."""
    if argv in (["-h"], ["--help"]):
        print(f"{USAGE}\n{FLAGS}")
        return 0
    config_type = configuration_type(argv)
    request, words = parse(argv, config_type)
    config = None
    if words:
        texts = {"program": PROGRAM, "purpose": PURPOSE, "flags": FLAGS}
        config = configure(config_type, words, under=settings_below, **texts)
        if config is None:
            return 0
        path, _ = take_file(config_type, words)
        request = dataclasses.replace(request, name=path.stem if path else "train")
        config = config.resolved()
    return hand_over("jaxtron.doctor.run").examine(config, request)


if __name__ == "__main__":
    sys.exit(run_command(main))
