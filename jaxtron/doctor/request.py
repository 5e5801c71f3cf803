"""What the doctor is asked for, from its command line."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtron.command import HELP, PRINT, FlagParser, natural, positive_number
from jaxtron.config import settings
from jaxtron.run.configuration import Configuration

PROGRAM = "python -m jaxtron.doctor"
PURPOSE = "Checks a machine, and several together, before a run; changes nothing."
USAGE = f"""usage: {PROGRAM} [CONFIG.yaml] [--name value ...] [--gpus N] [--json] [--wait SECONDS]

  {PROGRAM}                            this machine: driver, GPUs, JAX, CUDA, disks, limits
  {PROGRAM} configs/gpt_tiny.yaml      also the run's settings, data and directories
  srun --ntasks-per-node=1 {PROGRAM} CONFIG.yaml    also the network, clocks and versions of all machines

The words of a training's command line are taken as they are. One line a finding, with what mends it; the exit code
is 0, or 1 where there is a fault."""
FLAGS = """
  --gpus N          GPUs that this machine has to have; 0: it is to run on the CPU
  --json            print the findings as JSON
  --wait SECONDS    how long process 0 waits for the others, and they for it (30)"""


@dataclass(frozen=True)
class DoctorRequest:
    """The doctor's own flags; `name` is that of the run."""

    gpus: int | None = None
    json: bool = False
    wait: float = 30.0
    name: str = "train"


def parse(argv: Sequence[str], config_type: type[Configuration]) -> tuple[DoctorRequest, list[str]]:
    """The doctor's own flags, and the words that are a training's."""
    others = {*settings(config_type), *(word.lstrip("-") for word in (*HELP, *PRINT)), ""}
    parser = FlagParser(PROGRAM, "", others=others, add_help=False)
    parser.add_argument("--gpus", type=natural)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--wait", type=positive_number, default=30.0)
    found, words = parser.parse_known_args(argv)
    return DoctorRequest(gpus=found.gpus, json=found.json, wait=found.wait), words
