"""Files of a Hugging Face directory beside its weights, such as tokenizers, which a run keeps and gives back."""

import json
import shutil
from pathlib import Path
from typing import Any

from jaxtron.config import UserError
from jaxtron.run.configuration import HISTORY_FILE
from jaxtron.weights.config_json import CONFIG_JSON
from jaxtron.weights.hub import TOKENIZER, TOKENIZERS, is_hub

# where a run has them
KEPT = "huggingface"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
# a run that began with a run that began with ...
MOST_RUNS = 20


def keep(directory: Path, run: Path) -> None:
    """Copies a directory's files beside its weights into a run."""
    _copy(directory, run / KEPT, (CONFIG_JSON, GENERATION, *TOKENIZER_FILES))


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


def give_back(directory: Path | None, tokenizer: str, target: Path) -> bool:
    """Copies to an export what a run's directory kept, where the run's tokenizer is from there; else its tokenizer.

    Whether what was kept is still right.
    """
    own = Path(tokenizer)
    if directory is not None and own.name in TOKENIZERS and _same(own, directory / own.name):
        _copy(directory, target, (GENERATION, *TOKENIZER_FILES))
        return True
    if own.is_dir() and (own / TOKENIZER).is_file():
        own = own / TOKENIZER
    if own.is_file() and own.suffix in (".json", ".model"):
        name = TOKENIZER if own.suffix == ".json" else "tokenizer.model"
        shutil.copyfile(own, target / name)
    return False


def _same(first: Path, second: Path) -> bool:
    try:
        return first.read_bytes() == second.read_bytes()
    except OSError:
        return False


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_file():
            try:
                content = (source / name).read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {source / name}: {error.strerror}") from None
            (target / name).write_bytes(content)
