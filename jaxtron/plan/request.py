"""The planner's own flags, beside those of the configuration."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jaxtron.command import HELP, PRINT, FlagParser, check_output, file_path, positive, positive_number
from jaxtron.config import UserError, settings
from jaxtron.gpus import GPUS
from jaxtron.run.configuration import Configuration, configuration_type

PROGRAM = "python -m jaxtron.plan"
# what each kind of request shows; "plan" is the one without a flag that chooses another
PURPOSES = {
    "plan": "A run weighed before anything runs: its real step is compiled for GPUs that need not be there. Memory, "
    "communication and FLOPs are read from the compiled program, and the step's time is predicted.",
    "layout": "Every parameter of the model on the mesh: shape, logical axes, what splits them, bytes of a device and "
    "replicas. Nothing is compiled.",
    "schedule": "The pipeline's schedule: its ticks drawn, the bubble, microbatches in flight and their bytes. Nothing "
    "is compiled.",
    "search": "Meshes, schedules, recompute and ZeRO levels for so many GPUs: all that fit are ranked by formula, the "
    "best of them and the configuration's own are compiled and ranked among themselves.",
}
HINTS = {
    "layout": "every parameter on the mesh",
    "schedule": "the pipeline's schedule",
    "search": "layouts for so many GPUs, ranked",
}
KINDS = tuple(kind for kind in PURPOSES if kind != "plan")
USAGE = f"""usage: {PROGRAM} CONFIG.yaml --gpu NAME [--nodes N] [--name value ...]

  {PROGRAM} configs/gpt_1t.yaml --gpu h100 --nodes 384    the step compiled: memory, communication, time
  {PROGRAM} configs/gpt_22b.yaml --search --gpu a100 --nodes 1    layouts for so many GPUs, ranked
  {PROGRAM} configs/gpt_tiny.yaml --layout --devices 8    every parameter on the mesh
  {PROGRAM} configs/gpt_tiny.yaml --schedule --mesh.pipe 4    the pipeline's schedule

GPUs: {", ".join(GPUS)}, or a file with XLA's target description. --help lists the flags and settings of a plan,
--search --help, --layout --help and --schedule --help those of the others."""
# a compiler that plans for more takes hours, and there is no such cluster
GPUS_MOST = 2**20
# the kinds of request that take a flag
KIND_OF = {
    "png": ("plan", "schedule"),
    "csv": ("schedule",),
    "html": ("plan", "search"),
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
# flags of files that are written
OUTPUTS = ("png", "csv", "html", "json", "hlo")
PAGE_ENDINGS = (".html", ".htm")


@dataclass(frozen=True)
class PlanRequest:
    """What to show (plan, layout, schedule or search), for which GPUs, the files, and the configuration's words.

    `command` is what was typed, as a shell takes it.
    """

    kind: str
    words: list[str]
    command: str = ""
    gpu: str | None = None
    gpus: int | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    png: Path | None = None
    csv: Path | None = None
    html: Path | None = None
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


def parse(argv: list[str]) -> PlanRequest:
    """The request of a command line; a `UserError` for flags that do not go together."""
    config_type = configuration_type(argv)
    found, words = _parser(config_type, PROGRAM, *PURPOSES).parse_known_args(argv)
    kinds = [kind for kind in KINDS if getattr(found, kind)]
    if len(kinds) > 1:
        raise UserError(f"{' and '.join(f'--{kind}' for kind in kinds)}: one at a time")
    kind = kinds[0] if kinds else "plan"
    given = {name: value for name, value in vars(found).items() if name not in KINDS and value is not None}
    for name, value in given.items():
        if kind not in KIND_OF[name]:
            place = " or ".join("a plan" if other == "plan" else f"--{other}" for other in KIND_OF[name])
            here = "in a plan" if kind == "plan" else f"with --{kind}"
            raise UserError(f"--{name.replace('_', '-')} {value} has no effect {here}, only with {place}")
    _check_outputs({f"--{name}": given[name] for name in OUTPUTS if name in given})
    return PlanRequest(kind, words, f"{PROGRAM} {shlex.join(argv)}", **given)


def _check_outputs(paths: Mapping[str, Path]) -> None:
    """`UserError` unless each of these files can be written, no two are one, and a page has a page's name."""
    flags: dict[str, str] = {}
    for flag, path in paths.items():
        if flag == "--html" and path.suffix.lower() not in PAGE_ENDINGS:
            raise UserError(f"--html {path}: browsers open files whose names end in .html; give {path.stem}.html")
        check_output(flag, path)
        other = flags.setdefault(os.path.realpath(path), flag)
        if other != flag:
            raise UserError(f"{other} and {flag} {path}: both would write this file; give them two names")


def program_of(kind: str) -> str:
    """What is typed to ask for a kind of request."""
    return PROGRAM if kind == "plan" else f"{PROGRAM} --{kind}"


def flags_text(kind: str) -> str:
    """The planner's own flags that a kind of request takes, a line each; empty where it has none."""
    text = _parser(Configuration, program_of(kind), kind).format_help()
    title = "options:"
    return f"flags{text[text.index(title) + len(title) :]}".rstrip() if title in text else ""


def _parser(config_type: type[Configuration], program: str, *kinds: str) -> FlagParser:
    """The flags of these kinds of request; those that choose another kind belong to a plan."""
    others = {*settings(config_type), *(word.lstrip("-") for word in (*HELP, *PRINT)), ""}
    parser = FlagParser(program, "", others=others, add_help=False)

    def add(flag: str, **options) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        if set(kinds) & set(KIND_OF.get(name, ("plan",))):
            parser.add_argument(flag, **options)

    known = ", ".join(GPUS)
    add("--gpu", metavar="NAME", help=f"compile for this GPU: {known}, or a file with XLA's target description")
    add("--nodes", type=positive, metavar="N", help="nodes of the cluster")
    add("--gpus", type=positive, metavar="N", help="GPUs, instead of nodes (none: what the mesh asks for)")
    add("--gpus-per-node", type=positive, metavar="N", help="GPUs that NVLink joins (none: 8)")
    add(
        "--tokens",
        type=partial(positive_number, example="300e9"),
        metavar="T",
        help="a budget of tokens, such as 300e9: how many days it takes",
    )
    add("--top", type=positive, metavar="N", help="layouts that are compiled beside the configuration's own (none: 3)")
    add("--html", type=file_path, metavar="FILE", help="write a page to look at in a browser (docs/report.md)")
    add("--json", type=file_path, metavar="FILE", help="write all figures")
    add("--hlo", type=file_path, metavar="FILE", help="write the compiled program")
    add("--compare", type=file_path, metavar="FILE", help="tell what changed against a plan that --json wrote")
    add("--machine", type=file_path, metavar="FILE", help="constants of the model of time (docs/prediction.md)")
    fit = "fit them to a run's metrics.jsonl, and write machine.yaml beside it"
    add("--calibrate", type=file_path, metavar="FILE", help=fit)
    add("--png", type=file_path, metavar="FILE", help="draw the timeline of the schedule")
    add("--csv", type=file_path, metavar="FILE", help="write the schedule's table, for --pipeline.schedule FILE.csv")
    for kind in KINDS:
        add(f"--{kind}", action="store_true", help=f"something else: {HINTS[kind]} (--{kind} --help)")
    return parser
