"""One host's part: it says how it is, and starts and ends its processes as the line-up wants."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from jaxtron.launch.member import BUSY, ENDED, GONE, READY, SAVE, STACKS, LifeSign, Lineup


@runtime_checkable
class Processes(Protocol):
    """This host's processes of a line-up: `children.py`."""

    def start(self, flags: Sequence[Sequence[str]]) -> None:
        """One process for each list of further flags."""
        ...

    def code(self) -> int | None:
        """The worst exit code once all have ended, else None."""
        ...

    def terminate(self) -> None:
        """Asks those that run to save and end."""
        ...

    def kill(self, *, stacks: bool = False) -> None:
        """Ends those that run, after they have shown their stacks where that is wanted."""
        ...


class Supervisor:
    """A member's state; `count` processes on this host. Call `follow` with each line-up, `sign` before it."""

    def __init__(self, member: str, host: str, processes: Processes, *, count: int, say: Callable[[str], None]) -> None:
        self._sign = LifeSign(member, host, 0)
        self._processes, self._num_processes, self._say = processes, count, say
        self._service = ""
        self._is_asked = False

    def sign(self, *, leaving: bool = False) -> LifeSign:
        """How this host is now; once it is leaving, its processes are asked to save and end."""
        if leaving and not self._sign.leaving:
            self._processes.terminate()
        self._sign = replace(self._sign, count=self._sign.count + 1, leaving=self._sign.leaving or leaving)
        if self._sign.state == BUSY and (code := self._processes.code()) is not None:
            self._sign = replace(self._sign, state=ENDED, code=code)
        return self._sign

    def follow(self, lineup: Lineup) -> int | None:
        """Does what the line-up says; the exit code of this supervisor once it has nothing to do any more."""
        if lineup.over is not None:
            self._end(lineup)
            self._sign = replace(self._sign, state=GONE)
            return lineup.over
        if lineup.service != self._service:
            # another leader, who counts anew
            self._end(lineup)
            self._service = lineup.service
            self._sign = replace(self._sign, state=READY, number=lineup.number, code=None)
        elif lineup.number != self._sign.number:
            self._end(lineup)
            if self._sign.leaving:
                return self._sign.code if self._sign.code else 130
            self._sign = replace(self._sign, state=READY, number=lineup.number, code=None)
        if self._sign.leaving and self._sign.state == READY:
            return 130
        member = self._sign.member
        if member in lineup.members and self._sign.state == READY:
            self._is_asked = False
            self._processes.start(self._flags(lineup))
            self._sign = replace(self._sign, state=BUSY)
        elif self._sign.state == BUSY and lineup.stop == SAVE and lineup.members[0] == member and not self._is_asked:
            # one of the run's processes is enough
            self._is_asked = True
            self._processes.terminate()
        return None

    def lost(self) -> None:
        """Nobody leads any more: without the others the processes here have nothing to do."""
        self._processes.kill()
        self._sign = replace(self._sign, state=READY, number=0, code=None)
        self._service = ""

    def _end(self, lineup: Lineup) -> None:
        if self._sign.state == BUSY:
            self._processes.kill(stacks=lineup.stop == STACKS)

    def _flags(self, lineup: Lineup) -> list[list[str]]:
        """What is added to the command line of each process."""
        first, per_host = lineup.members.index(self._sign.member), self._num_processes
        common = [
            *("--runtime.coordinator_address", lineup.coordinator),
            *("--runtime.num_processes", str(len(lineup.members) * per_host)),
        ]
        return [
            [*lineup.flags, *common, "--runtime.process_id", str(first * per_host + local)] for local in range(per_host)
        ]
