"""A directory of a Megatron-LM checkpoint: which iteration, in which of its formats, and the arguments of its run."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxtron.config import UserError, shown
from jaxtron.weights.megatron.distributed import METADATA, read_index
from jaxtron.weights.megatron.pickles import PickledRecord
from jaxtron.weights.megatron.torch_file import open_torch_file

TRACKER = "latest_checkpointed_iteration.txt"
DESCRIPTION, COMMON, COMMON_STATE = "metadata.json", "common.pt", "common_state/"
RANKS, LEGACY = "mp_rank_*", "model_optim_rng.pt"
RANK = re.compile(r"mp_rank_\d{2}(_\d{3}){0,2}")
Format = Literal["torch_dist", "torch"]


@dataclass(frozen=True)
class Checkpoint:
    """One iteration's files."""

    directory: Path
    format: Format


@dataclass(frozen=True)
class Arguments:
    """What a run's command line came to, as its checkpoint has it."""

    path: Path
    """The file."""
    values: dict[str, Any]
    version: float
    """`checkpoint_version`: how queries, keys and values lie in old files."""


def is_megatron(directory: Path) -> bool:
    """Whether a directory looks like one of Megatron-LM's checkpoints: that of a run, or of one iteration."""
    if (directory / "config.yaml").is_file():
        return False
    return (directory / TRACKER).is_file() or _format(directory) is not None


def find_checkpoint(directory: Path) -> Checkpoint:
    """The newest iteration of a run's directory, or that which the directory is; `UserError` where it is not there."""
    tracker = directory / TRACKER
    if tracker.is_file():
        try:
            word = tracker.read_bytes()[:100].decode().strip()
        except (OSError, UnicodeDecodeError):
            word = ""
        if not word.isdecimal() and word != "release":
            raise UserError(f"{tracker} must be the number of an iteration or release, not {shown(word)}")
        name = word if word == "release" else f"iter_{int(word):07d}"
        if not (directory / name).is_dir():
            raise UserError(f"{tracker} says that {name} is the newest, and it is not there; give another by its name")
        directory /= name
    found = _format(directory)
    if found is None:
        raise UserError(f"{directory} has neither {METADATA} nor {RANKS}/{LEGACY}: it is no checkpoint of Megatron-LM")
    return Checkpoint(directory, found)


def _format(directory: Path) -> Format | None:
    if (directory / METADATA).is_file():
        return "torch_dist"
    return "torch" if any(directory.glob(f"{RANKS}/{LEGACY}")) else None


def rank_files(checkpoint: Checkpoint) -> list[Path]:
    """The files of all ranks of the older format, by name; `UserError` where one's name is none that is known."""
    found = sorted(checkpoint.directory.glob(f"{RANKS}/{LEGACY}"))
    for path in found:
        if not RANK.fullmatch(path.parent.name):
            raise UserError(f"{path.parent} is no rank's folder, such as mp_rank_00 or mp_rank_01_003; remove it")
    return found


def read_arguments(checkpoint: Checkpoint) -> Arguments:
    """The arguments that a checkpoint has; `UserError` where it has none."""
    if checkpoint.format == "torch_dist":
        path, value = _common(checkpoint.directory)
    else:
        path = rank_files(checkpoint)[0]
        value = open_torch_file(path).value
    arguments = value.get("args") if isinstance(value, dict) else None
    if not isinstance(arguments, PickledRecord) or not arguments.attributes:
        raise UserError(
            f"{path} has no args, which say what the model is: only checkpoints of Megatron-LM's own training are read"
        )
    version = value.get("checkpoint_version", 0.0)
    if isinstance(version, bool) or not isinstance(version, int | float):
        raise UserError(f"{path} has checkpoint_version {shown(version)}: it must be a number")
    return Arguments(path, arguments.attributes, float(version))


def _common(directory: Path) -> tuple[Path, Any]:
    """What is no tensor in a distributed checkpoint: in a file of its own, or in older days among the tensors."""
    path = directory / DESCRIPTION
    try:
        backend = json.loads(path.read_text(encoding="utf-8")).get("sharded_backend")
    except (OSError, ValueError, RecursionError, AttributeError):
        raise UserError(f"{path} is not the JSON of a finished checkpoint; bring back a good copy") from None
    if backend != "torch_dist":
        raise UserError(
            f"{path} has sharded_backend {shown(backend)}: only torch_dist is read; convert it in Megatron-LM"
        )
    if (directory / COMMON).is_file():
        return directory / COMMON, open_torch_file(directory / COMMON).value
    blobs = [blob for name, blob in read_index(directory).values.items() if name.startswith(COMMON_STATE)]
    if len(blobs) != 1:
        raise UserError(f"{directory} has neither {COMMON} nor a common_state in its {METADATA}; bring back all files")
    value = blobs[0].read("common_state").value
    return blobs[0].path, value[0] if isinstance(value, list) and len(value) == 1 else value
