"""Files of a Hugging Face directory beside its weights, such as tokenizers, which a run keeps and gives back."""

import shutil
from pathlib import Path

from jaxtron.config import UserError
from jaxtron.generate.origin import KEPT, has_tokenizer
from jaxtron.weights.config_json import CONFIG_JSON
from jaxtron.weights.hub import TOKENIZER

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


def keep(directory: Path, run: Path) -> None:
    """Copies a directory's files beside its weights into a run."""
    _copy(directory, run / KEPT, (CONFIG_JSON, GENERATION, *TOKENIZER_FILES))


def give_back(directory: Path | None, tokenizer: str, target: Path) -> bool:
    """Copies to an export what a run's directory kept, where the run's tokenizer is from there; else its tokenizer.

    Whether what was kept is still right.
    """
    own = Path(tokenizer)
    if directory is not None and has_tokenizer(directory, tokenizer):
        _copy(directory, target, (GENERATION, *TOKENIZER_FILES))
        return True
    if own.is_dir() and (own / TOKENIZER).is_file():
        own = own / TOKENIZER
    if own.is_file() and own.suffix in (".json", ".model"):
        name = TOKENIZER if own.suffix == ".json" else "tokenizer.model"
        shutil.copyfile(own, target / name)
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
