"""What a pair of token files holds."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxtron.config import UserError
from jaxtron.data.megatron.indexed import IndexedReader
from jaxtron.data.tokenizers import load_tokenizer
from jaxtron.preprocess.request import Inspect


def inspect(request: Inspect) -> dict[str, Any]:
    """Sizes in bytes, dtype, counts, lengths of sequences in tokens, and the first ids; `UserError` if damaged."""
    reader = IndexedReader(request.prefix)
    lengths, counts = reader.lengths, np.diff(reader.documents)
    ids: list[int] = []
    for number in range(len(reader)):
        ids += reader.get(number, 0, min(int(lengths[number]), request.tokens - len(ids))).tolist()
        if len(ids) == request.tokens:
            break
    found = {
        "prefix": request.prefix,
        "bin_bytes": Path(f"{request.prefix}.bin").stat().st_size,
        "idx_bytes": Path(f"{request.prefix}.idx").stat().st_size,
        "dtype": reader.dtype.name,
        "multimodal": reader.modes is not None,
        "documents": len(counts),
        "empty_documents": int(np.count_nonzero(counts == 0)),
        "sequences": len(reader),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "shortest_sequence": int(lengths.min()) if len(reader) else None,
        "longest_sequence": int(lengths.max()) if len(reader) else None,
        "first_ids": ids,
    }
    if request.tokenizer is not None:
        found["first_text"] = _decode(request.tokenizer, ids)
    return found


def text(found: dict[str, Any]) -> str:
    """The same for a reader."""
    shown = {name: f"{value:,}" if type(value) is int else value for name, value in found.items()}
    shown["first_ids"] = " ".join(map(str, found["first_ids"]))
    return "\n".join(f"{name.replace('_', ' '):<18}{value}" for name, value in shown.items())


def _decode(name: str, ids: list[int]) -> str:
    tokenizer = load_tokenizer(name)
    if tokenizer is None:
        raise UserError("characters have no vocabulary without the data; give another --tokenizer")
    return tokenizer.decode(np.array(ids, np.int64))
