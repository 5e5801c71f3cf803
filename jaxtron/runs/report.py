"""What each subcommand prints and writes."""

import importlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtron.command import write_whole
from jaxtron.config import UserError, format_value
from jaxtron.plan.table import aligned
from jaxtron.runs.compare import comparison, comparison_lines
from jaxtron.runs.curve import TextCurve, draw
from jaxtron.runs.folder import DAMAGED, RunFolder, find_runs, is_run, open_run
from jaxtron.runs.request import MOST_COMPARED, STANDARD_OUTPUT, RunsRequest
from jaxtron.runs.settings import beside_defaults, model_text, num_parameters, parameters_text, planned_steps
from jaxtron.words import plural, printable, readable_count

LETTERS = "abcdefghijklmnopqrstuvwxyz"
HEAD = ("run", "state", "model", "parameters", "steps", "loss", "best", "validation", "tokens", "last written (UTC)")
NUMBERS = range(3, 9)


def report(request: RunsRequest) -> None:
    """Does what a command line asks for."""
    {"list": _list, "show": _show, "compare": _compare}[request.kind](request)


def _list(request: RunsRequest) -> None:
    folders = list(dict.fromkeys(run for folder in request.directories for run in find_runs(folder)))
    common = folders[0] if len(folders) == 1 else Path(os.path.commonpath([path.absolute() for path in folders]))
    runs = [open_run(folder) for folder in folders]
    if request.state:
        runs = [run for run in runs if run.state in request.state]
        if not runs:
            raise UserError(f"none of {plural(len(folders), 'run')} is {' or '.join(request.state)}; leave --state out")
    runs.sort(key=lambda run: _sort_key(run, request.sort))
    if request.json is not None and _write(request.json, {"runs": [summary(run) for run in runs]}):
        return
    rows = [HEAD, *(_row(run, _relative(run.directory, common)) for run in runs)]
    print("\n".join(aligned(rows, right=NUMBERS)))
    told = [f"{_relative(run.directory, common)}: {run.why}" for run in runs if run.state == DAMAGED]
    if told:
        print("\n" + printable("\n".join(told)))
    if any(run.losses.is_sample for run in runs):
        print("\n~ of a sample of its lines, for the file is large")


def _sort_key(run: RunFolder, sort: str) -> tuple[Any, ...]:
    """What is not known comes first."""
    lines = run.losses
    best = lines.best("loss")
    value: Any = {
        "when": run.time,
        "name": str(run.directory),
        "steps": run.step,
        "loss": lines.latest("loss"),
        "best": None if best is None else best.loss,
        "validation": lines.latest("validation"),
        "parameters": None if run.settings is None or sort != "parameters" else num_parameters(run.settings),
        "tokens": run.tokens,
    }[sort]
    return (value is not None, value if value is not None else 0, str(run.directory))


def _relative(path: Path, common: Path) -> str:
    text = os.path.relpath(path.absolute(), common.absolute())
    return printable(path.name if text == "." else text)


def _row(run: RunFolder, name: str) -> tuple[str, ...]:
    best = run.losses.best("loss")
    about = "~" if run.losses.is_sample else ""
    planned = planned_steps(run.settings)
    steps = "-" if run.step is None else f"{run.step:,}"
    return (
        name,
        run.state,
        "?" if run.settings is None else printable(model_text(run.settings)),
        parameters_text(run.settings),
        f"{steps}/{'?' if planned is None else f'{planned:,}'}",
        _loss(run.losses.latest("loss")),
        "-" if best is None else f"{about}{_loss(best.loss)}",
        _loss(run.losses.latest("validation")),
        "-" if run.tokens is None else readable_count(run.tokens),
        _time(run.time),
    )


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3g}"


def _time(text: str | None) -> str:
    return "-" if text is None else printable(text[:16].replace("T", " "))


def summary(run: RunFolder) -> dict[str, Any]:
    """A run for machines."""
    last, best, validation = run.losses.last, run.losses.best("loss"), run.losses.best("validation")
    return {
        "name": run.name,
        "directory": printable(str(run.directory)),
        "state": run.state,
        "why": run.why,
        "problems": list(run.problems),
        "parameters": None if run.settings is None else num_parameters(run.settings),
        "step": run.step,
        "steps": planned_steps(run.settings),
        "tokens": run.tokens,
        "time": run.time,
        "loss": None if last is None else last.loss,
        "best_loss": None if best is None else {"step": best.step, "loss": best.loss},
        "validation_loss": run.losses.latest("validation"),
        "best_validation_loss": None
        if validation is None
        else {"step": validation.step, "validation_loss": validation.validation},
        "is_sample": run.losses.is_sample,
        "checkpoints": list(run.checkpoints),
    }


def _show(request: RunsRequest) -> None:
    run = _opened(request.directories[0])
    settings = {} if run.settings is None else beside_defaults(run.settings)
    if request.png is not None:
        _draw([run], [run.name], request.by, request.png)
    content = summary(run) | {"settings": settings, "history": list(run.history)}
    if request.json is not None and _write(request.json, content):
        return
    print("\n".join([*_facts(run), "", *_settings_lines(run, settings), *_history_lines(run), ""]))
    kinds = (("*", "training", "loss"), ("o", "validation", "validation"))
    curves = [_curve(run, letter, label, kind, request.by) for letter, label, kind in kinds]
    print("\n".join(draw([curve for curve in curves if curve.points], request.by)))


def _facts(run: RunFolder) -> list[str]:
    best, validation = run.losses.best("loss"), run.losses.best("validation")
    planned, about = planned_steps(run.settings), "about " if run.losses.is_sample else ""
    rows = [("run", str(run.directory)), ("state", f"{run.state}{run.why and f': {run.why}'}")]
    if run.settings is not None:
        rows.append(("model", f"{model_text(run.settings)}, {parameters_text(run.settings)} parameters"))
    rows.append(("steps", f"{run.step or 0:,} of {'?' if planned is None else f'{planned:,}'}"))
    if run.tokens is not None:
        rows.append(("tokens", f"{run.tokens:,}"))
    if best is not None:
        latest = _loss(run.losses.latest("loss"))
        rows.append(("training loss", f"{latest}, at best {about}{_loss(best.loss)} at step {best.step:,}"))
    if validation is not None:
        latest = _loss(run.losses.latest("validation"))
        rows.append(
            ("validation loss", f"{latest}, at best {about}{_loss(validation.validation)} at step {validation.step:,}")
        )
    if run.time is not None:
        rows.append(("last written", f"{_time(run.time)} UTC"))
    if run.checkpoints:
        rows.append(("checkpoints", ", ".join(f"{step:,}" for step in run.checkpoints)))
    if run.state != DAMAGED:
        rows += [("damaged", problem) for problem in run.problems]
    return [printable(f"{what:<17}{value}") for what, value in rows]


def _settings_lines(run: RunFolder, settings: dict[str, Any]) -> list[str]:
    if run.settings is None:
        return ["no settings are known"]
    if not settings:
        return ["all settings are the defaults"]
    rows = [(f"  {name}", _value(value)) for name, value in settings.items()]
    return ["settings that differ from the defaults", *aligned(rows)]


def _value(value: Any) -> str:
    return printable(" ".join(format_value(value).split())) or "''"


def _history_lines(run: RunFolder) -> list[str]:
    rows = []
    for entry in run.history:
        devices = entry.get("devices") if isinstance(entry.get("devices"), dict) else {}
        changes = entry.get("changes") if isinstance(entry.get("changes"), dict) else {}
        changed = [
            f"{name} {_value(pair[0])} -> {_value(pair[1])}"
            for name, pair in changes.items()
            if isinstance(pair, list) and len(pair) == 2
        ]
        if "ended" in entry:
            what = f"{entry['ended']}: {entry.get('reason', '')}"
        else:
            where = f"{devices.get('count', '?')} {devices.get('kind', 'devices')}"
            what = f"on {where}{', ' + ', '.join(changed) if changed else ''}"
        rows.append((f"  {_time(str(entry.get('time', '-')))}", f"step {entry.get('step', '?')}", _value(what)))
    return ["", "history", *aligned(rows)] if rows else []


def _compare(request: RunsRequest) -> None:
    if len(request.directories) < 2:
        raise UserError(f"only {request.directories[0]} to compare; give two runs or more, or use show")
    if len(request.directories) > MOST_COMPARED:
        raise UserError(f"{len(request.directories)} runs are more than {MOST_COMPARED} to compare; give fewer")
    where: dict[str, Path] = {}
    for path in request.directories:
        real = os.path.realpath(path)
        if real in where:
            raise UserError(f"{path} is given twice; give each run once")
        where[real] = path
    runs = [_opened(path) for path in request.directories]
    names = names_of(request.directories)
    found = comparison(runs, request.by)
    if request.png is not None:
        _draw(runs, names, request.by, request.png)
    content = {"runs": [summary(run) for run in runs], "by": request.by, **found.content()}
    if request.json is not None and _write(request.json, content):
        return
    letters = LETTERS[: len(runs)]
    rows = [("", *HEAD), *((letter, *_row(run, name)) for letter, run, name in zip(letters, runs, names, strict=True))]
    print("\n".join(aligned(rows, right=[number + 1 for number in NUMBERS])))
    print("\n" + "\n".join(comparison_lines(found, letters, _value)) + "\n")
    curves = [
        _curve(run, letter, name, "loss", request.by) for letter, run, name in zip(letters, runs, names, strict=True)
    ]
    print("\n".join(draw(curves, request.by)))


def names_of(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart."""
    parts = [Path(os.path.realpath(path)).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            break
    return [printable(name) for name in names]


def _curve(run: RunFolder, letter: str, label: str, kind: str, by: str) -> TextCurve:
    return TextCurve(letter, label, run.losses.points(kind, by))


def _opened(directory: Path) -> RunFolder:
    if not os.path.isdir(directory):
        what = "is a file" if os.path.exists(directory) else "is not there"
        raise UserError(f"{directory} {what}; give the directory of a run, python -m jaxtron.runs list shows them")
    if not is_run(directory):
        inside = "it has runs in it, give one" if _has_runs(directory) else "nothing there is of a training"
        raise UserError(f"{directory} is no run: {inside}; python -m jaxtron.runs list {directory} shows them")
    return open_run(directory, deep=True)


def _has_runs(directory: Path) -> bool:
    try:
        return bool(find_runs(directory))
    except UserError:
        return False


def _draw(runs: Sequence[RunFolder], names: Sequence[str], by: str, path: Path) -> None:
    # matplotlib takes a second to import
    importlib.import_module("jaxtron.runs.picture").write_picture(runs, names, by, path)


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have, which a file may hold all the same."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, content: dict[str, Any]) -> bool:
    """Writes JSON; True if that was to the standard output, which has nothing else then."""
    text = json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"
    if path == STANDARD_OUTPUT:
        print(text, end="")
        return True
    write_whole(path, text, advice="choose another --json")
    return False
