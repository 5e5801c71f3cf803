"""A run that tells its memory now and then: `long_run.py FLAGS ...`, a line of JSON in the end."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from jaxtron.command import run_command
from jaxtron.train.__main__ import main
from jaxtron.train.hooks import RunHook, StepInfo

PAGE = os.sysconf("SC_PAGE_SIZE")


class Memory(RunHook):
    """Resident bytes of this process by step."""

    every = 100

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []

    def after(self, info: StepInfo) -> None:
        """Look."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.found.append((info.step, pages * PAGE))


memory = Memory()
code = run_command(lambda words: main(words, [memory]), sys.argv[1:])
told: dict[str, Any] = {"code": code, "memory": memory.found}
print("\n" + json.dumps(told), flush=True)
