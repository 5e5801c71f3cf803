"""What Jaxtron itself has written among the files of a folder, and is no data."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxtron.data.files.file_kind import INDEX_MAGIC

# of preprocess, of a writer of token files, of a cache: left by what was stopped
UNFINISHED = re.compile(r"\.([0-9a-f]{12}|[0-9a-f]{32})\.partial$")
CACHE_ENTRY = re.compile(r"[0-9a-f]{32}(\.lock)?$")


def describe_folder(folder: Path) -> str | None:
    """In words, what a folder is if one of our commands wrote it."""
    if UNFINISHED.search(folder.name):
        return "unfinished work"

    if _is_run(folder):
        return "a training run"
    # what curate writes names what it was made of, first of all
    if any(_begin(folder / name, 16) == b'{\n "identity": "' for name in ("report.json", "work/settings.json")):
        return "a curation"
    if CACHE_ENTRY.match(folder.name) and os.path.exists(folder / "description.json"):
        return "a cache"
    return None


def without_outputs(paths: Sequence[Path], say: Callable[[str], None]) -> list[Path]:
    """Paths as a person named them, perhaps by `folder/*`: our own among others are left out, which is said."""
    ours = {path: what for path in paths if (what := describe(path)) is not None}
    if len(ours) == len(set(paths)):
        return list(paths)
    for path, what in ours.items():
        say(f"left out: {what}, {path}")
    return [path for path in paths if path not in ours]


def describe(path: Path) -> str | None:
    """In words, what a file or folder is if one of our commands wrote it."""
    if os.path.isdir(path):
        return describe_folder(path)
    return describe_file(path, os.listdir(path.parent)) if path.suffix in (".bin", ".idx", ".partial") else None


def describe_file(file: Path, beside: Sequence[str]) -> str | None:
    """In words, what a file is if one of our commands wrote it; `beside` names all that its folder has."""
    name = file.name
    if UNFINISHED.search(name):
        return "unfinished work"
    if CACHE_ENTRY.match(name) and name.endswith(".lock"):
        return "a cache"
    if name.endswith(".idx"):
        return "token files" if is_token_index(file) else None
    if not name.endswith(".bin"):
        return None
    prefix = name.removesuffix(".bin")
    if f"{prefix}.idx" in beside:
        return "token files" if is_token_index(file.with_suffix(".idx")) else None
    # its .idx is still to come
    begun = [UNFINISHED.sub("", other) for other in beside if UNFINISHED.search(other)]
    return "unfinished work" if any(prefix == other or prefix.startswith(f"{other}_") for other in begun) else None


def is_token_index(path: Path) -> bool:
    """Whether a file begins as a Megatron index."""
    return _begin(path, len(INDEX_MAGIC)) == INDEX_MAGIC


def _is_run(folder: Path) -> bool:
    """Whether a folder has the whole configuration of a training, and something that came of it."""
    if not any(os.path.exists(folder / name) for name in ("checkpoints", "metrics.jsonl")):
        return False
    sections = re.findall(rb"^(\w+):", _begin(folder / "config.yaml", 1 << 20), re.MULTILINE)
    return {b"model", b"data", b"optimizer", b"train"} <= set(sections)


def _begin(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        # not there, or not to be read, which is told by whoever needs it
        return b""
