"""Directories of Hugging Face weights whose tokenizer has a word for each token."""

from pathlib import Path

from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from tests.hugging_face import fixtures

SENTINELS = ("<extra_id_0>", "<extra_id_1>")


def write_t5(folder: Path, name: str = "t5_v1_1") -> Path:
    """A T5 of the fixtures: padding, the end of a text, words w2 to w37, and two sentinels."""
    config, weights, _ = fixtures.load_batch("seq2seq", name)
    fixtures.write(folder, config, weights)
    words = ["<pad>", "</s>", *(f"w{number}" for number in range(2, 38)), *SENTINELS]
    tokenizer = FastTokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in ("<pad>", "</s>", *SENTINELS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_llama(folder: Path) -> Path:
    """The Llama of the fixtures: words w0 to w39."""
    fixture = fixtures.load("llama")
    fixtures.write(folder, fixture.config, fixture.weights)
    tokenizer = FastTokenizer(models.WordLevel({f"w{number}": number for number in range(40)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
