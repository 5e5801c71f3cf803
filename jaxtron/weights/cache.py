"""Where the weights of a repository's name are on this machine: in Hugging Face's cache, or fetched into it.

The only file that knows the optional package huggingface_hub (the extra `hub`).
"""

import importlib
import os
import re
from pathlib import Path
from typing import Any

from jaxtron.config import UserError, expand_home
from jaxtron.weights.config_json import CONFIG_JSON

# an owner and a name, as meta-llama/Llama-3.1-8B
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# the branch that a repository's name means
BRANCH = "main"
FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
PACKAGE = "huggingface_hub"
NOWHERE = "directory, nor a repository in Hugging Face's cache"


def find_weights(name: str) -> Path | None:
    """The directory of a path, or of the newest copy of a repository in the cache; None where there is neither."""
    path = Path(name)
    return path if path.is_dir() else _cached(name)


def named_weights(word: str) -> Path:
    """The directory that a word of a command line means: a path, or a repository's copy in the cache.

    What is neither is a path, which is not there.
    """
    if not word:
        raise UserError("an empty word names no directory; give one of a run, or of Hugging Face weights")
    name = expand_home(word)
    return find_weights(name) or Path(name)


def fetch_weights(name: str) -> Path:
    """As `find_weights`, but a repository that is not in the cache is fetched; `UserError` where it cannot be."""
    found = find_weights(name)
    if found is not None:
        return found
    if not REPOSITORY.fullmatch(name):
        raise UserError(f"no directory {name}; give one of a run, of Hugging Face weights, or a repository's name")
    try:
        hub: Any = importlib.import_module(PACKAGE)
    except ImportError:
        raise UserError(
            f"{name} is no {NOWHERE} ({cache_directory()}); give a directory, or pip install 'jaxtron[hub]' to fetch it"
        ) from None
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:
        # of many kinds, by what is missing: the network, the repository, the permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name} is no {NOWHERE}, and cannot be fetched: {reason}") from None


def cache_directory() -> Path:
    """Hugging Face's, by its environment variables."""
    if given := os.environ.get("HF_HUB_CACHE"):
        return Path(given).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    return Path(home).expanduser() / "hub"


def _cached(name: str) -> Path | None:
    """The copy that the branch is of, else the newest with a config.json."""
    if not REPOSITORY.fullmatch(name):
        return None
    folder = cache_directory() / f"models--{name.replace('/', '--')}"
    copies = [path for path in folder.glob("snapshots/*") if (path / CONFIG_JSON).is_file()]
    try:
        commit = (folder / "refs" / BRANCH).read_text().strip()
    except OSError:
        commit = ""
    return max(copies, key=lambda path: (path.name == commit, path.stat().st_mtime), default=None)
