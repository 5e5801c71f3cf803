"""What a setting of data paths says: names, weights of a blend, and whether these are token files."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtron.config import UserError
from jaxtron.data.config import PYTHON_STDLIB, Blend, DataConfig
from jaxtron.data.files.file_kind import TOKEN_FILES, token_prefix
from jaxtron.data.files.reader import missing, read_document
from jaxtron.data.files.storage import is_remote
from jaxtron.data.megatron.blend import number_of, parse_blend


@dataclass(frozen=True)
class DataPath:
    """Prefixes of token files, or files and folders; a weight each, or none; and the setting that has them."""

    names: list[str]
    weights: list[float] | None
    setting: str

    @property
    def is_tokens(self) -> bool:
        """Whether it means token files: where one of them is there; with weights unless all are something else."""
        return any(map(has_index, self.names)) or (self.weights is not None and not all(map(_is_other, self.names)))

    def prefixes(self) -> list[str]:
        """The prefixes of token files; UserError names the one that is not there."""
        found = [token_prefix(name) for name in self.names]
        for name, prefix in zip(self.names, found, strict=True):
            if not has_index(name):
                raise UserError(f"{self.setting}: {self._missing(name, prefix)}")
        return found

    def files(self) -> list[str]:
        """The files and folders; UserError where they have weights."""
        if self.weights is not None:
            weights = " ".join(map("{:g}".format, self.weights))
            raise UserError(
                f"{self.setting}: only token files have weights, and {self.names[0]} is none; leave {weights} out, or "
                "make token files with python -m jaxtron.preprocess"
            )
        return self.names

    def _missing(self, name: str, prefix: str) -> str:
        if os.path.exists(name):
            what = f"{name} has no {prefix}.idx beside it" if name.endswith(".bin") else f"{name} is no token file"
            return f"{what}; make a pair with python -m jaxtron.preprocess, and give its prefix"
        folder = os.path.dirname(prefix)
        there = [path.name.removesuffix(".idx") for path in Path(folder or ".").glob("*.idx")]
        near = difflib.get_close_matches(os.path.basename(prefix), sorted(there), n=1)
        hint = f"did you mean {os.path.join(folder, near[0])}?" if near else "give the prefix of a pair"
        return f"no token files {prefix}.bin and {prefix}.idx; {hint}"


def read_data_path(blend: Blend, setting: str) -> DataPath:
    """The one reading of a blend, whichever part of the data it is for; UserError if it makes no sense."""
    items = (blend,) if isinstance(blend, str) else blend
    pairs = [item for item in items if not isinstance(item, str)]
    words = [str(word).strip() for pair in pairs for word in pair] or _words([str(item) for item in items])
    if not words or not all(words):
        raise UserError(f"--{setting} is empty; give files or folders of text, or prefixes of token files")
    try:
        names, weights = parse_blend(words)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
    if weights is None:
        _check_no_weight(names, setting)
        return DataPath(names, None, setting)
    numbers = words[::2]
    if not any(map(has_index, names)) and all(os.path.exists(word) for word in words):
        return DataPath(words, None, setting)
    same = [word for word in numbers if has_index(word)]
    if same and not pairs:
        raise UserError(
            f"{setting}: {same[0]} is a weight here, and the prefix of {same[0]}.idx; write ./{same[0]} for the prefix "
            f"or {float(same[0]):.4f} for the weight"
        )
    return DataPath(names, weights, setting)


def check_there(config: DataConfig) -> None:
    """`UserError` for what the settings of data name and is not there; nothing is read for it."""
    blends = {"data.path": config.path} if config.train is None else {}
    blends |= {f"data.{part}": getattr(config, part) for part in ("train", "validation", "test")}
    for setting, blend in blends.items():
        if blend is None or config.format == "mock":
            continue
        path = read_data_path(blend, setting)
        if config.format == "tokens" or (config.format == "auto" and (config.train is not None or path.is_tokens)):
            path.prefixes()
            continue
        for name in path.files():
            if name != PYTHON_STDLIB and not is_remote(name) and not os.path.exists(name):
                raise UserError(missing(Path(name)))
    template = config.chat.template
    if template is not None and not os.path.exists(template):
        raise UserError(f"data.chat.template: there is no file {template}")


def _check_no_weight(names: Sequence[str], setting: str) -> None:
    """UserError for a number that names nothing: a weight without its prefix, or after it."""
    if len(names) == 1:
        return
    stray = [name for name in names if number_of(name) is not None and not (os.path.exists(name) or has_index(name))]
    if not stray:
        return
    if stray[-1] == names[-1]:
        what = f"{stray[-1]} at the end is a weight that has no prefix after it"
    else:
        what = f"{stray[0]} is a weight, but not every prefix has one before it"
    raise UserError(f"{setting}: {what}; give weights and prefixes in turn, such as 0.7 a 0.3 b, or prefixes alone")


def _is_other(name: str) -> bool:
    """Whether a name is a file or folder that is none of two token files."""
    return os.path.exists(name) and not name.endswith(TOKEN_FILES)


def has_index(name: str) -> bool:
    """Whether a name is the prefix of token files, or one of the two; of those far away it is believed."""
    return name != PYTHON_STDLIB and (is_remote(name) or os.path.exists(f"{token_prefix(name)}.idx"))


def _words(items: Sequence[str]) -> list[str]:
    """The words, or those of the file that the only one names."""
    is_list = len(items) == 1 and items[0].endswith((".blend", ".list")) and os.path.isfile(items[0])
    return read_document(Path(items[0])).split() if is_list else [item.strip() for item in items]
