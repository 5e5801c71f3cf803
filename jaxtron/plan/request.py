"""The planner's own flags, beside those of the configuration."""

import argparse
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from jaxtron.command import check_output, positive
from jaxtron.config import UserError
from jaxtron.gpus import GPUS

PROGRAM = "python -m jaxtron.plan"
KINDS = ("layout", "schedule", "search")
# a compiler that plans for more takes hours, and there is no such cluster
GPUS_MOST = 2**20
# flags of one kind of request only; "plan" is the one without --layout or --schedule
KIND_OF = {
    "png": ("plan", "schedule"),
    "csv": ("schedule",),
    "json": ("plan", "search"),
    "hlo": ("plan",),
    "compare": ("plan",),
    "tokens": ("plan", "search"),
    "machine": ("plan", "search"),
    "calibrate": ("plan",),
    "gpu": ("plan", "search"),
    "gpus": ("plan", "search"),
    "nodes": ("plan", "search"),
    "gpus_per_node": ("plan", "search"),
    "top": ("search",),
}


@dataclass(frozen=True)
class Request:
    """What to show (plan, layout, schedule or search), for which GPUs, the files, and the configuration's words."""

    kind: str
    words: list[str]
    gpu: str | None = None
    gpus: int | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    png: Path | None = None
    csv: Path | None = None
    json: Path | None = None
    hlo: Path | None = None
    compare: Path | None = None
    tokens: float | None = None
    machine: Path | None = None
    calibrate: Path | None = None
    top: int | None = None

    @property
    def node_size(self) -> int:
        """GPUs of a node: as asked for, or eight, or all where they are fewer."""
        return self.gpus_per_node or 8

    def num_gpus(self, known: int) -> int:
        """GPUs of the cluster; `known` is the product of the mesh's sizes, for want of --nodes or --gpus.

        A `UserError` where they are both given, too many, or leave a node half full.
        """
        if self.nodes is not None and self.gpus is not None:
            raise UserError(f"--nodes {self.nodes} and --gpus {self.gpus}: give one of them")
        if self.nodes is not None:
            count, said = self.nodes * self.node_size, f"--nodes {self.nodes} of {self.node_size} GPUs"
        else:
            count = known if self.gpus is None else self.gpus
            said = f"the mesh's {known:,} GPUs" if self.gpus is None else f"--gpus {self.gpus}"
        if count > GPUS_MOST:
            raise UserError(f"{said}: more than {GPUS_MOST:,} GPUs cannot be planned")
        if count > self.node_size and count % self.node_size:
            raise UserError(
                f"{said} do not fill nodes of {self.node_size}: give a multiple of {self.node_size}, or another "
                "--gpus-per-node"
            )
        return count


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def parse(argv: list[str]) -> Request:
    """The request of a command line; a `UserError` for flags that do not go together."""
    found, words = _parser().parse_known_args(argv)
    kinds = [kind for kind in KINDS if getattr(found, kind)]
    if len(kinds) > 1:
        raise UserError(f"{' and '.join(f'--{kind}' for kind in kinds)}: one at a time")
    kind = kinds[0] if kinds else "plan"
    given = {name: value for name, value in vars(found).items() if name not in KINDS and value is not None}
    for name, value in given.items():
        if kind not in KIND_OF[name]:
            place = " or ".join("a plan" if other == "plan" else f"--{other}" for other in KIND_OF[name])
            raise UserError(f"--{name.replace('_', '-')} {value} has no effect with --{kind}, only with {place}")
    for name in ("png", "csv", "json", "hlo"):
        if name in given:
            check_output(f"--{name}", given[name])
    return Request(kind, words, **given)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0, such as 300e9")
    return value


def help_text() -> str:
    """The planner's own flags."""
    known = ", ".join(GPUS)
    lines = textwrap.wrap(
        "A run weighed before anything runs: its real step is compiled for GPUs that need not be there. --gpu is one "
        f"of {known}, or a file with XLA's target description. --layout, --schedule and --search show something else.",
        100,
    )
    return "\n".join(
        [f"usage: {PROGRAM} CONFIG.yaml --gpu h100 --nodes 384 [--name value ...]", "", *lines, "", _flags()]
    )


def _flags() -> str:
    text = _parser().format_help()
    return text[text.index("options:") :].replace("options:", "flags of the planner", 1)


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--gpu", metavar="NAME", help=f"compile for this GPU: {', '.join(GPUS)}, or a target description (FILE)")
    add("--nodes", type=positive, metavar="N", help="nodes of the cluster")
    add("--gpus", type=positive, metavar="N", help="GPUs, instead of nodes (none: what the mesh asks for)")
    add("--gpus-per-node", type=positive, metavar="N", help="GPUs that NVLink joins (none: 8)")
    add("--tokens", type=_amount, metavar="T", help="a budget of tokens, such as 300e9: how many days it takes")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--hlo", type=Path, metavar="FILE", help="write the compiled program")
    add("--compare", type=Path, metavar="FILE", help="tell what changed against a plan that --json wrote")
    add("--machine", type=Path, metavar="FILE", help="constants of the model of time (docs/prediction.md)")
    add(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="fit them to a run's metrics.jsonl, and write machine.yaml beside it",
    )
    add("--layout", action="store_true", help="every parameter's layout: shape, axes, spec, bytes a device, replicas")
    add("--schedule", action="store_true", help="the pipeline's schedule: ticks, bubble, microbatches in flight, bytes")
    add("--search", action="store_true", help="meshes, schedules and recompute for these GPUs, ranked")
    add("--top", type=positive, metavar="N", help="layouts that a search compiles (none: 3)")
    add("--png", type=Path, metavar="FILE", help="draw the timeline of the schedule")
    add("--csv", type=Path, metavar="FILE", help="write the schedule's table, for --pipeline.schedule FILE.csv")
    return parser
