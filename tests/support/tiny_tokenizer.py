"""A tokenizer.json of a few letters, for models with so few tokens."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"


def write_tokenizer(folder: Path, size: int = 40) -> Path:
    """Writes it and its tokenizer_config.json, with `size` tokens: an end of text, letters, and others."""
    names = ["<|endoftext|>", *LETTERS, *(f"<unused{number}>" for number in range(size - len(LETTERS) - 1))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unused0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder / "tokenizer.json"
