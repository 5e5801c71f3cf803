"""What a supervisor is asked for, from its command line."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtron.command import FlagParser, natural, positive, positive_number
from jaxtron.config import UserError

PROGRAM = "python -m jaxtron.launch"
USAGE = f"{PROGRAM} --nodes MIN:MAX [--name value ...] -- python -m jaxtron.train CONFIG.yaml ..."
PURPOSE = (
    "Starts a training's processes on this host, and again when they or other hosts are lost. One supervisor a host, "
    "all with the same line; the run goes on with as many hosts as there are, from MIN to MAX."
)
FURTHER = (
    "The settings are those of a run on MAX hosts. With fewer the data axis is filled with what there is (or the axis "
    "that is -1), and train.microbatches grows, so that the global batch stays. docs/clusters.md says what becomes "
    "of each fault."
)
MODULE = "jaxtron.train"


@dataclass(frozen=True)
class LaunchRequest:
    """The supervisor's own flags; `command` starts a training's process, and `settings` are the words for it."""

    fewest: int
    most: int
    command: tuple[str, ...]
    settings: tuple[str, ...]
    rendezvous: tuple[str, int] | None = None
    processes: int = 1
    restarts: int = 3
    wait_seconds: float = 600.0
    settle_seconds: float = 30.0
    grow_seconds: float = 300.0


def parse(argv: Sequence[str]) -> LaunchRequest | None:
    """The request of a command line; None where only help was asked for, which is printed."""
    own, dashes, rest = _split(argv)
    parser = FlagParser(PROGRAM, PURPOSE, usage=USAGE, further=FURTHER)
    parser.add_argument("--nodes", metavar="MIN:MAX", help="hosts that the run needs and may have; 4 is 4:4")
    parser.add_argument(
        "--rendezvous",
        metavar="HOST:PORT",
        help="where supervisors meet: a port of the first host, by a name that all reach (Slurm: its first node)",
    )
    parser.add_argument(
        "--processes-per-node",
        metavar="N",
        type=positive,
        default=1,
        help="processes of a host, which share its GPUs (1)",
    )
    parser.add_argument(
        "--restarts", metavar="N", type=natural, default=3, help="how often in a row, each within ten minutes (3)"
    )
    parser.add_argument(
        "--wait", metavar="SECONDS", type=positive_number, default=600.0, help="for hosts, and for the rendezvous (600)"
    )
    parser.add_argument(
        "--settle",
        metavar="SECONDS",
        type=positive_number,
        default=30.0,
        help="for more than MIN hosts at the start (30)",
    )
    parser.add_argument(
        "--grow-after",
        metavar="SECONDS",
        type=positive_number,
        default=300.0,
        help="how long fewer than MAX hosts train before the run saves and takes in those that came (300)",
    )
    if not argv or own[:1] in (["-h"], ["--help"]):
        parser.print_help()
        return None
    found = parser.parse_args(own)
    if found.nodes is None:
        raise UserError(
            f"--nodes is missing: how many hosts the run needs and may have, such as --nodes 2:4; {PROGRAM} --help"
        )
    fewest, most = _nodes(found.nodes)
    if not dashes:
        raise UserError(f"what to start is missing: {USAGE}")
    command, settings = _command(rest)
    return LaunchRequest(
        fewest=fewest,
        most=most,
        command=command,
        settings=settings,
        rendezvous=None if found.rendezvous is None else _address(found.rendezvous),
        processes=found.processes_per_node,
        restarts=found.restarts,
        wait_seconds=found.wait,
        settle_seconds=found.settle,
        grow_seconds=found.grow_after,
    )


def _split(argv: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    words = list(argv)
    if "--" not in words:
        return words, False, []
    place = words.index("--")
    return words[:place], True, words[place + 1 :]


def _nodes(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?", text)
    fewest, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= fewest <= most:
        raise UserError(f"--nodes {text} is no range of hosts: give MIN:MAX, such as 2:4, or one number")
    return fewest, most


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or re.search(r"\s", host) or not re.fullmatch(r"\d{1,5}", port) or not 0 < int(port) < 2**16:
        raise UserError(f"--rendezvous {text} is not HOST:PORT, such as node001:29400")
    return host.strip("[]"), int(port)


def _command(words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What starts a process, and the words of its command line."""
    for end in range(2, len(words) + 1):
        # python -m jaxtron.train, or jaxtron train
        before, last = words[end - 2], words[end - 1]
        if (before, last) == ("-m", MODULE) or (before.rpartition("/")[2], last) == tuple(MODULE.split(".")):
            return tuple(words[:end]), tuple(words[end:])
    raise UserError(
        f"{' '.join(words) or 'nothing'} is no training to start: after -- comes python -m {MODULE} CONFIG.yaml ..."
    )
