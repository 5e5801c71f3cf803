"""`python -m jaxtron.plan --layout|--schedule [CONFIG.yaml] [--setting value ...]`: a run before anything runs."""

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxtron.command import configure, run_command
from jaxtron.config import UserError
from jaxtron.pipeline.table_file import write_csv
from jaxtron.plan import layout, schedule
from jaxtron.plan.activations import layer_bytes
from jaxtron.sharding import build_mesh, make_rules, use
from jaxtron.sharding.mesh import AXES
from jaxtron.train.config import Configuration
from jaxtron.train.runtime import start_runtime
from jaxtron.train.setup import make_trainer

PROGRAM = "python -m jaxtron.plan"
PURPOSES = {
    "--layout": "Show every parameter's layout (--layout): shape, logical axes, spec, bytes a device, replicas.",
    "--schedule": "Draw the pipeline's schedule (--schedule): ticks by stages, bubble, microbatches in flight and "
    "activation bytes of each stage; --png FILE draws its timeline too, --csv FILE writes its table, which "
    "--pipeline.schedule FILE.csv runs. Axes of the mesh that are -1 count as 1 without --devices.",
}


@dataclass(frozen=True)
class Request:
    """What to show, the words of the configuration, and the files to write."""

    what: str | None
    words: list[str]
    png: Path | None
    csv: Path | None


def main(argv: list[str]) -> int:
    """Prints what was asked for about the configuration on its mesh."""
    request = _request(argv)
    purposes = PURPOSES.values() if request.what is None else [PURPOSES[request.what]]
    program = f"{PROGRAM} {request.what or '|'.join(PURPOSES)}"
    config = configure(Configuration, request.words, program=program, purpose=" ".join(purposes))
    if config is None:
        return 0
    if request.what is None:
        raise UserError(f"say what to show: {PROGRAM} {' or '.join(PURPOSES)} CONFIG.yaml [--setting value ...]")
    show: Callable[[Configuration, Request], None] = show_layout if request.what == "--layout" else show_schedule
    show(config.resolved(), request)
    return 0


def show_layout(config: Configuration, request: Request) -> None:
    """Every parameter's layout on the machine's devices, or simulated ones."""
    start_runtime(config.runtime, devices=config.devices)
    devices = jax.devices()
    config.check_mesh(config.mesh.shape(len(devices)))
    with use(make_rules(build_mesh(config.mesh, devices), config.sharding)):
        print(layout.text(make_trainer(config).blueprint))


def show_schedule(config: Configuration, request: Request) -> None:
    """The schedule drawn, without devices: simulated ones tell the bytes of a layer."""
    known = math.prod(size for size in (getattr(config.mesh, axis) for axis in AXES) if size != -1)
    sizes = config.mesh.shape(config.devices or known)
    config.check_mesh(sizes)
    table, partition = config.schedule(sizes["pipe"]), config.partition(sizes["pipe"])
    start_runtime(config.runtime, devices=config.devices or sizes["tensor"])
    each = layer_bytes(config, sizes)
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
    width, color = shutil.get_terminal_size((120, 24)).columns, sys.stdout.isatty()
    if request.csv is not None:
        _write(write_csv, table, request.csv)
    if request.png is not None:
        schedule.png(table, request.png)
    print(f"mesh: {mesh}")
    print(schedule.text(table, width=width, color=color, chunk_bytes=partition.chunk_rows * each))
    print(f"layers    {_lengths(partition.lengths)}; one keeps {each:,} bytes of a microbatch on a device")
    if partition.num_stages > 1:
        print("memory    one program runs on all stages, so every device makes room for the fullest one's activations")
    for path in (request.csv, request.png):
        if path is not None:
            print(f"written   {path}")


def _lengths(lengths: tuple[int, ...]) -> str:
    if len(set(lengths)) == 1:
        return f"{lengths[0]} in each of {len(lengths)} parts"
    return f"{', '.join(map(str, lengths))} in the parts"


def _write(write: Callable, table, path: Path) -> None:
    try:
        write(table, path)
    except OSError as error:
        raise UserError(f"cannot write the schedule into {path}: {error.strerror}") from None


def _request(argv: list[str]) -> Request:
    words = list(argv)
    what = [word for word in PURPOSES if word in words]
    if len(what) > 1:
        raise UserError(f"{' and '.join(what)}: one at a time")
    files = {flag: _take_file(words, flag) for flag in ("--png", "--csv")}
    for flag, path in files.items():
        if path is not None and what != ["--schedule"]:
            raise UserError(f"{flag} {path} has no effect without --schedule")
    words = [word for word in words if word not in PURPOSES]
    return Request(what[0] if what else None, words, files["--png"], files["--csv"])


def _take_file(words: list[str], flag: str) -> Path | None:
    """The file after a flag (`--png FILE` or `--png=FILE`), removed from the words."""
    for index, word in enumerate(words):
        if word == flag:
            if index + 1 == len(words) or words[index + 1].startswith("--"):
                raise UserError(f"{flag} needs a file")
            del words[index]
            return Path(words.pop(index))
        if word.startswith(f"{flag}="):
            return Path(words.pop(index).partition("=")[2])
    return None


if __name__ == "__main__":
    sys.exit(run_command(main))
