"""What a setting of data paths says: names, weights of a blend, and whether these are token files."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtron.config import UserError
from jaxtron.data.blend import parse_blend
from jaxtron.data.config import PYTHON_STDLIB, Blend
from jaxtron.data.files import read_document
from jaxtron.data.storage import is_remote

TOKEN_FILES = (".idx", ".bin")


@dataclass(frozen=True)
class DataPath:
    """Prefixes of token files, or files and folders; a weight each, or none; and the setting that has them."""

    names: list[str]
    weights: list[float] | None
    setting: str

    @property
    def is_tokens(self) -> bool:
        """Whether it means token files: where one of them is there, or there are weights, which nothing else has."""
        return self.weights is not None or any(map(has_index, self.names))

    def prefixes(self) -> list[str]:
        """The prefixes of token files; UserError names the one that is not there."""
        found = [_prefix(name) for name in self.names]
        for name, prefix in zip(self.names, found, strict=True):
            if not has_index(name):
                raise UserError(f"{self.setting}: {self._missing(name, prefix)}")
        return found

    def files(self) -> list[str]:
        """The files and folders; UserError where they have weights."""
        if self.weights is not None:
            weights = " ".join(map("{:g}".format, self.weights))
            raise UserError(f"{self.setting}: the weights {weights} are for token files; leave them out")
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


def has_index(name: str) -> bool:
    """Whether a name is the prefix of token files, or one of the two; of those far away it is believed."""
    return name != PYTHON_STDLIB and (is_remote(name) or os.path.exists(f"{_prefix(name)}.idx"))


def _prefix(name: str) -> str:
    """A path without the ending of one of its two files."""
    return name[:-4] if name.endswith(TOKEN_FILES) else name


def _words(items: Sequence[str]) -> list[str]:
    """The words, or those of the file that the only one names."""
    is_list = len(items) == 1 and items[0].endswith((".blend", ".list")) and os.path.isfile(items[0])
    return read_document(Path(items[0])).split() if is_list else [item.strip() for item in items]
