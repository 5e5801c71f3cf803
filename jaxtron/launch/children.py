"""This host's processes: started, asked to save, killed; with their share of the host's GPUs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jaxtron.launch.codes import exit_code, worst

# between the wish for stacks (SIGUSR2: `train/watch/stacks.py`) and the end
STACKS_SECONDS = 1.0
# of a process that is killed: then the machine itself is in trouble
DEATH_SECONDS = 30.0


def alone(command: Sequence[str]) -> list[str]:
    """The command line of a process that is killed when this one ends, however that ends."""
    return [sys.executable, "-m", "jaxtron.launch.child", str(os.getpid()), *command]


def visible_gpus(devices: Path = Path("/dev")) -> list[str]:
    """The GPUs of this host that CUDA shows, by the names that `CUDA_VISIBLE_DEVICES` takes."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name]
    found = [path.name.removeprefix("nvidia") for path in devices.glob("nvidia[0-9]*")]
    return sorted(found, key=int)


class Children:
    """The processes of one line-up at a time."""

    def __init__(self, command: Sequence[str], gpus: Sequence[str]) -> None:
        self._command, self._gpus = list(command), list(gpus)
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, flags: Sequence[Sequence[str]]) -> None:
        """One process for each list of further flags; what they print is printed here."""
        share = len(self._gpus) // len(flags)
        for local, own in enumerate(flags):
            environment = dict(os.environ)
            if share and len(flags) > 1:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus[local * share : (local + 1) * share])
            # a session of its own: Ctrl-C of a terminal is passed on by the supervisor
            self._running.append(
                subprocess.Popen(
                    alone([*self._command, *own]), env=environment, stdin=subprocess.DEVNULL, start_new_session=True
                )
            )

    def code(self) -> int | None:
        """The worst exit code once all have ended, else None."""
        found = [process.poll() for process in self._running]
        ended = [exit_code(code) for code in found if code is not None]
        return worst(ended) if len(ended) == len(found) else None

    def terminate(self) -> None:
        """Asks those that run to save and end."""
        self._send(signal.SIGTERM)

    def kill(self, *, stacks: bool = False) -> None:
        """Ends those that run, after they have shown their stacks where that is wanted."""
        if stacks and self._send(signal.SIGUSR2):
            time.sleep(STACKS_SECONDS)
        self._send(signal.SIGKILL)
        for process in self._running:
            process.wait(DEATH_SECONDS)
        self._running = []

    def _send(self, number: int) -> bool:
        """Whether there was anyone to tell."""
        running = [process for process in self._running if process.poll() is None]
        for process in running:
            process.send_signal(number)
        return bool(running)
