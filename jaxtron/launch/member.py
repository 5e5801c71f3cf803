"""What a supervisor says of itself, and what the leader says to all: two records that travel as JSON."""

import json
from dataclasses import asdict, dataclass

READY, BUSY, ENDED, GONE = "ready", "busy", "ended", "gone"
# what the leader wants of members: to save and end; while it gathers, to show where those that hang are
SAVE, STACKS = "save", "stacks"


@dataclass(frozen=True)
class LifeSign:
    """A supervisor's word on itself, written again and again; `count` shows that it lives.

    `state` is ready for the line-up `number`, busy in it, ended, with the worst exit `code` of its processes, or gone,
    for it has read that all is over. `leaving`: this host was asked to stop.
    """

    member: str
    host: str
    count: int
    state: str = READY
    number: int = 0
    code: int | None = None
    leaving: bool = False

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> "LifeSign":
        """That of a text."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Lineup:
    """Who trains: `members` in the order of their processes, none while the leader gathers them.

    `service` names the leader's own life: another one counts anew. `stop` is what is asked of members: nothing, to
    save and end, or stacks of what is ended. `over` is the exit code of all supervisors once nothing goes on, and
    `note` why.
    """

    service: str
    number: int
    members: tuple[str, ...] = ()
    coordinator: str = ""
    flags: tuple[str, ...] = ()
    stop: str = ""
    over: int | None = None
    note: str = ""

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> "Lineup":
        """That of a text."""
        found = json.loads(text)
        return cls(**found | {"members": tuple(found["members"]), "flags": tuple(found["flags"])})
