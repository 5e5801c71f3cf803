"""The flags of the three subcommands."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from jaxtron.command import HELP, FlagParser, check_output, file_path
from jaxtron.config import UserError

PROGRAM = "python -m jaxtron.runs"
USAGE = f"""usage: {PROGRAM} SUBCOMMAND ...

  {PROGRAM} list [DIRECTORY ...]    the runs of a directory: model, steps, losses, state
  {PROGRAM} show RUN                one run: settings beside the defaults, history, losses drawn
  {PROGRAM} compare RUN RUN ...     settings that differ, losses at the same steps, curves in one picture

`{PROGRAM} SUBCOMMAND --help` lists the flags."""
SORTS = ("when", "name", "steps", "loss", "best", "validation", "parameters", "tokens")
# where `--json` goes without a file
STANDARD_OUTPUT = Path("-")
# letters of the curves that a terminal shows
MOST_COMPARED = 26


@dataclass(frozen=True)
class RunsRequest:
    """Which of `list`, `show` and `compare`, the directories, and the files that are to be written.

    `by` is what lies on the axis, `step` or `tokens`; `sort` and `state` are of a list.
    """

    kind: str
    directories: tuple[Path, ...]
    sort: str = "when"
    state: tuple[str, ...] = ()
    by: str = "step"
    png: Path | None = None
    json: Path | None = None


def parse(argv: list[str]) -> RunsRequest | str:
    """The request of a command line, or what is to be printed in its place; a `UserError` for bad flags."""
    if not argv or argv[0] in HELP:
        return USAGE
    kind, *words = argv
    if kind not in PARSERS:
        near = difflib.get_close_matches(kind, PARSERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give list, show RUN or compare RUN RUN; {PROGRAM} --help"
        raise UserError(f"unknown subcommand {kind!r}; {hint}")
    parser = PARSERS[kind]()
    if any(word in HELP for word in words):
        return parser.format_help().rstrip()
    found = vars(parser.parse_args(words))
    directories = tuple(found.pop("directories"))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items() if value}
    for flag in ("png", "json"):
        if flag in given and given[flag] != STANDARD_OUTPUT:
            check_output(f"--{flag}", given[flag])
    if given.get("png") == STANDARD_OUTPUT:
        raise UserError("--png - would put a picture on the terminal; give a file, such as --png loss.png")
    return RunsRequest(kind, directories, **given)


def _parser(kind: str, purpose: str) -> FlagParser:
    parser = FlagParser(f"{PROGRAM} {kind}", purpose)
    parser.add_argument(
        "--json", type=file_path, metavar="FILE", help="write it for machines; - is the standard output, and no text"
    )
    return parser


def _list_parser() -> FlagParser:
    parser = _parser("list", "The runs of a directory and of directories in it, as their files tell them.")
    parser.add_argument(
        "directories", nargs="*", type=file_path, default=[Path("runs")], metavar="DIRECTORY", help="(none: runs)"
    )
    parser.add_argument("--sort", choices=SORTS, metavar="WHAT", help=f"{', '.join(SORTS)}: the largest last")
    parser.add_argument(
        "--state", nargs="+", choices=STATES, metavar="STATE", help=f"only those that are {', '.join(STATES)}"
    )
    return parser


def _show_parser() -> FlagParser:
    parser = _parser("show", "One run: how it stands, settings that differ from the defaults, its history, its losses.")
    parser.add_argument("directories", nargs=1, type=file_path, metavar="RUN", help="its directory")
    _add_drawing(parser)
    return parser


def _compare_parser() -> FlagParser:
    parser = _parser("compare", "Several runs: the settings in which they differ, losses at the same steps, curves.")
    parser.add_argument("directories", nargs="+", type=file_path, metavar="RUN", help="their directories")
    _add_drawing(parser)
    return parser


def _add_drawing(parser: FlagParser) -> None:
    parser.add_argument("--png", type=file_path, metavar="FILE", help="draw the losses")
    parser.add_argument(
        "--by", choices=("step", "tokens"), metavar="WHAT", help="what losses lie at: step or tokens (none: step)"
    )


STATES = ("running", "complete", "stopped", "diverged", "damaged", "new")
PARSERS = {"list": _list_parser, "show": _show_parser, "compare": _compare_parser}
