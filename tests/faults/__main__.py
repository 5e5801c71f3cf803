"""`python -m tests.faults fuzz|soak|grid [--flag value ...]`: what `make fuzz`, `make soak` and `make grid` run."""

import importlib
import os
import sys

from tests.support import compiling

MODULES = {"fuzz": "tests.faults.fuzz", "soak": "tests.faults.soak", "grid": "tests.conformance.grid"}


def main(arguments: list[str]) -> int:
    """Runs one of them, JAX being imported only once its environment is set."""
    name, *rest = arguments or [""]
    if name not in MODULES:
        print(f"error: give one of {', '.join(MODULES)}; --help after it lists its flags", file=sys.stderr)
        return 2
    compiling.eight_devices()
    # its threads begin at its import, and a process that has some cannot be forked
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    return importlib.import_module(MODULES[name]).main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
