"""The Hugging Face model that a run began with: its files beside the weights, such as tokenizers and chat templates."""

import json
from pathlib import Path
from typing import Any

from jaxtron.run.configuration import HISTORY_FILE
from jaxtron.weights.config_json import CONFIG_JSON
from jaxtron.weights.hub import TOKENIZERS, is_hub

# where a run of weights has them
KEPT = "huggingface"
# a run that began with a run that began with ...
MOST_RUNS = 20


def began_with(run: Path) -> Path | None:
    """The directory with the files of the Hugging Face model that a run began with, itself or by way of other runs."""
    for _ in range(MOST_RUNS):
        if (run / KEPT / CONFIG_JSON).is_file():
            return run / KEPT
        origin = _origin(run)
        if (weights := origin.get("weights")) is not None:
            return Path(weights) if is_hub(Path(weights)) else None
        if not isinstance(origin.get("run"), str):
            return None
        run = Path(origin["run"])
    return None


def _origin(run: Path) -> dict[str, Any]:
    """What the first line of a run's history says of where its model comes from."""
    try:
        with (run / HISTORY_FILE).open(encoding="utf-8") as lines:
            entry = json.loads(lines.readline())
        return next((entry[key] for key in ("initialized_from", "upcycled") if key in entry), {})
    except (OSError, ValueError, TypeError):
        return {}


def began_keys(directory: Path | None) -> dict[str, Any]:
    """The config.json of a directory, as far as it is one."""
    try:
        found = json.loads(((directory or Path()) / CONFIG_JSON).read_text()) if directory is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def has_tokenizer(directory: Path | None, tokenizer: str) -> bool:
    """Whether a tokenizer is that of the directory, so that its tokens' numbers and its template are of use with it."""
    own = Path(tokenizer)
    if directory is None or own.name not in TOKENIZERS:
        return False
    try:
        return own.read_bytes() == (directory / own.name).read_bytes()
    except OSError:
        return False
