"""`python -m jaxtron.curate --input FILES --output FOLDER --steps ...`: a corpus without poor and repeated text."""

import sys

from jaxtron import interrupts  # noqa: F401  (answers Ctrl-C while the rest is imported)
from jaxtron.command import configure, hand_over, run_command
from jaxtron.config import UserError
from jaxtron.curate.config import PROGRAM, PURPOSE, Curation

# flags of tokenizing, and the settings here that are like them
CURATED = {"--json-key": "--text_field", "--skip-damaged": "--damaged drop"}


def main(argv: list[str]) -> int:
    """Curates, or prints the settings or help."""
    for flag in (word.partition("=")[0].replace("_", "-") for word in argv):
        if flag in CURATED:
            raise UserError(f"unknown setting {flag.removeprefix('--')}; curate has {CURATED[flag]} for it")
    config = configure(Curation, argv, program=PROGRAM, purpose=PURPOSE)
    if config is not None:
        hand_over("jaxtron.curate.run", jax=False).run(config)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
