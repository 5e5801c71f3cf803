"""Who trains, decided by one: the supervisor that serves the rendezvous. No process, clock or network is in here.

The others say of themselves how they are, and do what the line-up says. There is nothing to agree on: where the
leader's host is lost, so is process 0, and the run begins anew with another leader.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol, runtime_checkable

from jaxtron.interrupts import TRY_AGAIN
from jaxtron.launch.codes import LOST, is_error, worst
from jaxtron.launch.member import ENDED, GONE, READY, SAVE, STACKS, LifeSign, Lineup
from jaxtron.launch.request import LaunchRequest
from jaxtron.words import plural

# without a new sign for so long a supervisor counts as lost, and its host with it
SILENCE_SECONDS = 15.0
# between the first process that ended and the end of those that hang
GRACE_SECONDS = 15.0
# for others to be ready again, once a line-up is over; what still is not by then is left out
REGATHER_SECONDS, STUCK_SECONDS = 5.0, 60.0
# a line-up that trained for longer is no start that failed
STEADY_SECONDS = 600.0
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0


@runtime_checkable
class Fits(Protocol):
    """Which numbers of hosts can train, and how: `fitting.py`."""

    def flags(self, hosts: int) -> tuple[str, ...]:
        """What is added to the command line for so many hosts."""
        ...

    def largest(self, available: int, fewest: int) -> int | None:
        """The most hosts of those available that fit; None where no number of them does."""
        ...


class Leader:
    """Decides line-ups from signs of life; `me` is the member beside it, `coordinator` gives an address for process 0.

    Call `decide` again and again, with a clock that only goes forward; `say` is told what changes and why.
    """

    def __init__(
        self,
        request: LaunchRequest,
        fits: Fits,
        me: str,
        *,
        service: str,
        coordinator: Callable[[], str],
        say: Callable[[str], None],
    ) -> None:
        self._request, self._fits, self._me = request, fits, me
        self._coordinator, self._say = coordinator, say
        self._lineup = Lineup(service, 1)
        # of each member its last count, and when that was new
        self._heard: dict[str, tuple[int, float]] = {}
        self._hosts: dict[str, str] = {}
        self._gathering: float | None = None
        self._joined = self._formed = self._not_before = 0.0
        self._first_end: float | None = None
        self._failures = 0
        self._trained: tuple[str, ...] = ()

    def decide(self, now: float, signs: Iterable[LifeSign]) -> Lineup:
        """The line-up that holds from this moment on."""
        if self._gathering is None:
            self._gathering = now
        alive = self._alive(now, signs)
        if self._lineup.over is None:
            if self._lineup.members:
                self._watch(now, alive)
            else:
                self._gather(now, alive)
        return self._lineup

    def has_company(self, now: float, signs: Iterable[LifeSign]) -> bool:
        """Whether others live that have not read yet that all is over."""
        return any(sign.state != GONE and sign.member != self._me for sign in self._alive(now, signs).values())

    def _alive(self, now: float, signs: Iterable[LifeSign]) -> dict[str, LifeSign]:
        """The signs of members that live, by member."""
        found: dict[str, LifeSign] = {}
        for sign in signs:
            count, since = self._heard.get(sign.member, (None, now))
            if sign.count != count:
                if count is None or now - since > SILENCE_SECONDS:
                    self._joined = now
                since = now
            self._heard[sign.member] = sign.count, since
            self._hosts[sign.member] = sign.host
            if now - since <= SILENCE_SECONDS:
                found[sign.member] = sign
        return found

    def _gather(self, now: float, alive: dict[str, LifeSign]) -> None:
        """Forms the line-up once those are ready that can be."""
        assert self._gathering is not None
        present = {name: sign for name, sign in alive.items() if not sign.leaving and sign.state != GONE}
        if self._me not in present:
            self._end(
                worst(sign.code or 0 for sign in alive.values() if sign.leaving) or 130, "this host was asked to stop"
            )
            return
        ready = [name for name, sign in present.items() if _is_ready(sign, self._lineup)]
        hosts = self._fits.largest(min(len(ready), self._request.most), self._request.fewest)
        waited, settled = now - self._gathering, now - max(self._joined, self._gathering)
        settle = self._request.settle_seconds if self._formed == 0 else REGATHER_SECONDS
        is_quiet = settled >= (settle if len(ready) == len(present) else max(settle, STUCK_SECONDS))
        if hosts is not None and now >= self._not_before and (len(ready) >= self._request.most or is_quiet):
            self._form(now, ready, hosts)
        elif hosts is None and waited >= self._request.wait_seconds:
            there = f"{plural(len(ready), 'host')} of {self._request.fewest} or more came in {waited:.0f} s"
            if len(ready) >= self._request.fewest:
                there = f"no number of hosts up to {len(ready)} fits the settings"
            self._end(TRY_AGAIN, there)

    def _form(self, now: float, ready: list[str], hosts: int) -> None:
        # those that trained before stay, and this host has process 0
        ready.sort(key=lambda name: (name != self._me, name not in self._trained, self._hosts[name], name))
        members = sorted(ready[:hosts], key=lambda name: (name != self._me, self._hosts[name], name))
        self._formed, self._first_end, self._trained = now, None, tuple(members)
        self._lineup = replace(
            self._lineup,
            members=self._trained,
            coordinator=self._coordinator(),
            flags=self._fits.flags(hosts),
            stop="",
            note="",
        )
        spare = f", {plural(len(ready) - hosts, 'spare host')} waiting" if len(ready) > hosts else ""
        flags = f" with {' '.join(self._lineup.flags)}" if self._lineup.flags else ""
        names = ", ".join(self._hosts[name] for name in members)
        self._say(f"round {self._lineup.number}: {plural(hosts, 'host')} ({names}){flags}{spare}")

    def _watch(self, now: float, alive: dict[str, LifeSign]) -> None:
        """Looks whether the line-up goes on, is over, or would be larger with those that wait."""
        members = self._lineup.members
        lost = [name for name in members if name not in alive]
        if lost:
            names = ", ".join(self._hosts[name] for name in lost)
            self._fail(now, f"{names} gave no sign of life for {SILENCE_SECONDS:g} s")
            return
        mine = [alive[name] for name in members]
        ended = [sign for sign in mine if sign.state == ENDED and sign.number == self._lineup.number]
        if not ended:
            self._grow(now, alive)
            return
        self._first_end = now if self._first_end is None else self._first_end
        hanging = [sign.host for sign in mine if sign not in ended]
        if not hanging or now - self._first_end >= GRACE_SECONDS:
            self._conclude(now, ended, hanging, alive)

    def _conclude(self, now: float, ended: list[LifeSign], hanging: list[str], alive: dict[str, LifeSign]) -> None:
        """What becomes of the run after the codes of a line-up, and hosts that hang."""
        code = worst(sign.code or 0 for sign in ended)
        leaving = [sign for sign in alive.values() if sign.leaving]
        if is_error(code):
            self._end(code, f"exit code {code} on {_hosts_with(code, ended)}, which would come again")
        elif code == 0 and not hanging:
            self._end(0, "")
        elif self._lineup.stop == SAVE and not hanging:
            self._again("taking in those that wait")
        elif leaving:
            left = sum(1 for sign in alive.values() if not sign.leaving and sign.state != GONE)
            if left < self._request.fewest or any(sign.member == self._me for sign in leaving):
                self._end(130 if code in LOST else code, "asked to stop")
            else:
                self._again(f"{', '.join(sign.host for sign in leaving)} was asked to stop, and the others go on")
        elif hanging:
            why = f"{', '.join(hanging)} did not end within {GRACE_SECONDS:g} s of the others (exit code {code})"
            self._fail(now, why, stop=STACKS)
        elif code in LOST:
            self._fail(now, f"exit code {code} on {_hosts_with(code, ended)}")
        else:
            self._end(code, "")

    def _grow(self, now: float, alive: dict[str, LifeSign]) -> None:
        """Asks a line-up to save and end where more hosts could train."""
        if self._lineup.stop or now - self._formed < self._request.grow_seconds:
            return
        members = self._lineup.members
        waiting = [name for name, sign in alive.items() if name not in members and _is_ready(sign, self._lineup)]
        available = min(len(members) + len(waiting), self._request.most)
        larger = self._fits.largest(available, self._request.fewest)
        if waiting and larger is not None and larger > len(members):
            self._lineup = replace(self._lineup, stop=SAVE)
            self._say(f"saving, to go on with {plural(larger, 'host')}")

    def _fail(self, now: float, why: str, *, stop: str = "") -> None:
        """Begins anew after a while, unless that happened too often."""
        is_steady = now - self._formed >= STEADY_SECONDS
        self._failures = 1 if is_steady else self._failures + 1
        if self._failures > self._request.restarts:
            self._end(TRY_AGAIN, f"{why}; lost {plural(self._failures, 'time')} in a row, giving up")
            return
        self._not_before = now + min(FIRST_PAUSE * 2 ** (self._failures - 1), LONGEST_PAUSE)
        self._again(why, stop=stop)

    def _again(self, why: str, *, stop: str = "") -> None:
        service, number = self._lineup.service, self._lineup.number
        self._lineup = Lineup(service, number + 1, stop=stop, note=why)
        self._gathering = None
        self._say(f"round {number} is over: {why}")

    def _end(self, code: int, why: str) -> None:
        self._lineup = replace(self._lineup, over=code, note=why)


def _is_ready(sign: LifeSign, lineup: Lineup) -> bool:
    return sign.state == READY and sign.number == lineup.number and not sign.leaving


def _hosts_with(code: int, ended: list[LifeSign]) -> str:
    return ", ".join(sign.host for sign in ended if sign.code == code)
