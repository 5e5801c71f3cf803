"""A tokenizer.json of a few letters, for models with so few tokens."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"


def write_tokenizer(folder: Path, size: int = 40, special: tuple[str, ...] = ()) -> Path:
    """Writes it and its tokenizer_config.json, of `size` tokens: an end of text, letters, `special`, and others."""
    names = ["<|endoftext|>", *LETTERS, *special]
    names += [f"<unused{number}>" for number in range(size - len(names))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unused0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|endoftext|>", *special)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder / "tokenizer.json"
