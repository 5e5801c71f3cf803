"""`python -m jaxtron.train CONFIG.yaml [--setting value ...]`: train a model, or continue a run."""

import sys
from pathlib import Path

from jaxtron.command import configure, hand_over, run_command
from jaxtron.config import split_arguments
from jaxtron.train.config import Configuration
from jaxtron.train.machine import is_first_process, known_devices

PROGRAM = "python -m jaxtron.train"


def main(argv: list[str]) -> int:
    """Trains as the command line asks; 130 if a signal ended the run early, with a checkpoint."""
    config = configure(Configuration, argv, program=PROGRAM, purpose="Train a decoder.")
    if config is None:
        return 0
    if (devices := known_devices(config)) is not None:
        config.check_mesh(config.mesh.shape(devices))
    if is_first_process(config):
        print("starting JAX", flush=True)
    files, _ = split_arguments(Configuration, argv)
    return hand_over("jaxtron.train.run").run(config, Path(files[0]).stem if files else "train")


if __name__ == "__main__":
    sys.exit(run_command(main))
