"""`python -m jaxtron.train CONFIG.yaml [--setting value ...]`: train a model, or continue a run."""

import sys
from collections.abc import Sequence
from typing import Any

from jaxtron import interrupts  # noqa: F401  (answers Ctrl-C while the rest is imported)
from jaxtron.command import configure, hand_over, run_command
from jaxtron.config import take_file
from jaxtron.run.beginning import settings_below
from jaxtron.run.configuration import configuration_type
from jaxtron.runtime.machine import is_first_process

PROGRAM = "python -m jaxtron.train"
USAGE = f"""usage: {PROGRAM} CONFIG.yaml [--name value ...]

  {PROGRAM} configs/gpt_tiny.yaml    a small GPT on Python's own source code, minutes on a CPU

--help lists every setting, --help SECTION (mesh, model.attention, ...) those of one section,
--print_config prints the configuration that would run."""


def main(argv: list[str], hooks: Sequence[Any] = ()) -> int:
    """Trains as the command line asks; 130 if a signal ended the run early, with a checkpoint.

    `hooks` are a program's own, of `jaxtron.train.hooks.RunHook`: docs/runs.md.
    """
    if not argv:
        print(USAGE)
        return 2
    config_type = configuration_type(argv)
    config = configure(config_type, argv, program=PROGRAM, purpose="Train a model.", under=settings_below)
    if config is None:
        return 0
    hand_over("jaxtron.train.early", jax=False).check_early(config)
    if is_first_process(config.runtime):
        print("starting JAX", flush=True)
    path, _ = take_file(config_type, argv)
    sampler = hand_over("jaxtron.generate.text").continue_tokens
    return hand_over("jaxtron.train.run").run(config, path.stem if path else "train", sampler, hooks)


if __name__ == "__main__":
    sys.exit(run_command(main))
