"""Tokenizers: round trips, ends of documents, and what they refuse."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from jaxtron.config import UserError
from jaxtron.data.tokenizers import ByteTokenizer, CharacterTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer

TEXT = "Grüße, 世界!\r\n\tto be 🙂 or not to be\n"


def write_tokenizer(path, *, special=("<|endoftext|>", "</s>"), limit=None):
    """A small byte-level BPE, saved as tokenizer.json."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["to be or not to be " * 10], trainer)
    if limit is not None:
        tokenizer.enable_truncation(limit)
        tokenizer.enable_padding(length=limit)
    tokenizer.save(str(path))
    return path


def test_bytes_round_trip():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(TEXT)
    assert ids.tolist() == list(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)


def test_bytes_decode_what_a_model_may_write():
    # half of a two-byte character, an end of document, an id of the padded vocabulary
    assert ByteTokenizer().decode(np.array([97, 0xC3, 256, 98, 300])) == "a\ufffdb"


def test_characters_round_trip_over_a_sorted_vocabulary():
    tokenizer = CharacterTokenizer(TEXT)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.vocabulary == "".join(sorted(set(TEXT)))
    assert tokenizer.vocab_size == len(set(TEXT)) and tokenizer.end_of_document is None
    assert ids.tolist() == [tokenizer.vocabulary.index(character) for character in TEXT]
    assert tokenizer.decode(np.array([0, 10_000])) == tokenizer.vocabulary[0]


@pytest.mark.parametrize("text", ["a~", "a!", "am"])
def test_an_unknown_character_is_named(text):
    with pytest.raises(UserError, match=rf"'{text[1]}' \(U\+00{ord(text[1]):X}\) is not among the 2 of the training"):
        CharacterTokenizer("az").encode(text)


def test_fingerprints_tell_vocabularies_apart():
    assert CharacterTokenizer("abc").fingerprint == CharacterTokenizer("cbaa").fingerprint
    assert CharacterTokenizer("abc").fingerprint != CharacterTokenizer("abd").fingerprint


def test_hugging_face_round_trip(tmp_path):
    tokenizer = HuggingFaceTokenizer(write_tokenizer(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert len(ids) < len(TEXT.encode()) and ids.max() < tokenizer.vocab_size
    assert tokenizer.end_of_document == 0
    assert tokenizer.decode(np.array([*ids, tokenizer.end_of_document, tokenizer.vocab_size])) == TEXT


def test_hugging_face_end_of_document_by_name_or_by_convention(tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer.json")
    named = HuggingFaceTokenizer(path, end_of_document="</s>")
    assert named.end_of_document == 1
    assert named.fingerprint != HuggingFaceTokenizer(path).fingerprint
    assert HuggingFaceTokenizer(write_tokenizer(tmp_path / "none.json", special=())).end_of_document is None
    with pytest.raises(UserError, match="has no token '<stop>'; set the end of document to one of its"):
        HuggingFaceTokenizer(path, end_of_document="<stop>")


def write_marked(path, *, special=(), added=(), ordinary=(), declared=None):
    """A tokenizer.json of words with special tokens, added ones that are not, and some of the vocabulary by names."""
    words = [*ordinary, "to", "be", *added, *special]
    tokenizer = FastTokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in added])
    tokenizer.save(str(path))
    if declared is not None:
        path.with_name("tokenizer_config.json").write_text(json.dumps(declared))
    return HuggingFaceTokenizer(path), words


@pytest.mark.parametrize(
    ("tokens", "end", "pad"),
    [
        ({"special": ["<eos>"], "ordinary": ["</s>"]}, "<eos>", None),
        ({"special": ["<eos>", "</s>"], "ordinary": ["<|endoftext|>"]}, "</s>", None),
        ({"special": ["<stop>"], "ordinary": ["</s>", "<pad>"]}, None, None),
        ({"special": ["<eos>", "<PAD>"], "ordinary": ["<pad>"]}, "<eos>", "<PAD>"),
        ({"added": ["<eos>"], "ordinary": ["</s>"]}, "<eos>", None),
        ({"ordinary": ["<eos>"]}, "<eos>", None),
        # what the tokenizer itself says goes before any name, in both spellings
        ({"special": ["<stop>", "</s>"], "declared": {"eos_token": "<stop>"}}, "<stop>", None),
        ({"special": ["<stop>", "</s>"], "declared": {"eos_token": {"content": "<stop>"}}}, "<stop>", None),
        ({"special": ["<stop>", "<a>"], "declared": {"pad_token": "<a>", "eos_token": "<stop>"}}, "<stop>", "<a>"),
        ({"special": ["</s>"], "declared": {"eos_token": "</s>", "pad_token": "</s>"}}, "</s>", None),
        ({"special": ["</s>"], "declared": {"eos_token": "<gone>", "model_max_length": 9}}, "</s>", None),
        ({"special": ["</s>"], "declared": ["no", "object"]}, "</s>", None),
    ],
    ids=str,
)
def test_ends_and_pads_are_special_tokens_not_text_that_looks_like_them(tokens, end, pad, tmp_path):
    tokenizer, words = write_marked(tmp_path / "tokenizer.json", **tokens)
    names = [None if token is None else words[token] for token in (tokenizer.end_of_document, tokenizer.pad)]
    assert names == [end, pad]


def test_a_damaged_tokenizer_config_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*tokenizer_config.json: .*; mend it, or remove it"):
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ')
        write_marked(tmp_path / "tokenizer.json", special=["</s>"])


def test_hugging_face_truncation_and_padding_of_the_file_are_off(tmp_path):
    tokenizer = HuggingFaceTokenizer(write_tokenizer(tmp_path / "tokenizer.json", limit=8))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert len(tokenizer.encode("a")) == 1


def test_a_wrong_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no tokenizer byte; give bytes, characters .* a Hugging Face tokenizer.json"):
        load_tokenizer("byte")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="tokenizer.json is not a Hugging Face tokenizer.json: "):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read the tokenizer .*tokenizer.json: "):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="the end of document </s> has no effect with the bytes tokenizer"):
        load_tokenizer("bytes", end_of_document="</s>")


def test_a_batch_is_each_text_by_itself(tmp_path):
    texts = [TEXT, "", "to be", "<|endoftext|>"]
    tokenizers = [ByteTokenizer(), CharacterTokenizer("".join(texts))]
    tokenizers.append(HuggingFaceTokenizer(write_tokenizer(tmp_path / "tokenizer.json")))
    for tokenizer in tokenizers:
        batch = tokenizer.encode_batch(texts)
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in texts]
        assert isinstance(tokenizer, Tokenizer)


@pytest.mark.parametrize(
    ("special", "padding", "expected"),
    [
        (("</s>", "<pad>"), None, 1),
        (("</s>",), None, None),
        (("</s>",), "</s>", None),  # what many files say: the end of document, which is learned
        (("</s>", "<fill>"), "<fill>", 1),
        (("</s>", "<pad>"), "</s>", None),
        (("</s>", "<pad>"), "[unknown]", 1),
    ],
)
def test_a_pad_is_never_the_end_of_document(special, padding, expected, tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer.json", special=special)
    if padding is not None:
        tokenizer = FastTokenizer.from_file(str(path))
        tokenizer.enable_padding(pad_token=padding, pad_id=0)
        tokenizer.save(str(path))
    assert HuggingFaceTokenizer(path).pad == expected


def test_a_folder_means_its_tokenizer_json(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    assert load_tokenizer(str(tmp_path)).fingerprint == load_tokenizer(str(tmp_path / "tokenizer.json")).fingerprint
