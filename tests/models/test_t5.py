"""T5: special tokens and samples, what does not fit, and padding that changes nothing."""

import json
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, models

from jaxtron.config import UserError
from jaxtron.data.batch import TokenBatch
from jaxtron.data.config import DataConfig
from jaxtron.data.masked.ul2 import ul2_denoisers
from jaxtron.data.tokenizers import ByteTokenizer, load_tokenizer
from jaxtron.models.families import family_named
from jaxtron.models.t5.attention_backends import attention_backends
from jaxtron.models.t5.config import T5Config
from jaxtron.models.t5.data import Denoised, open_data, samples_of_text, special_tokens
from jaxtron.models.t5.text import answer_text
from jaxtron.sharding.config import ContextConfig
from jaxtron.sharding.folding import FLAGS
from tests.support.spans_put_back import put_back

HOPPER = "NVIDIA H100 80GB HBM3"
BYTES = ByteTokenizer()


def settings(**changed) -> T5Config:
    own = {"hidden_size": 16, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 290}
    return T5Config.model_validate({**own, "denoising": {"sentinels": 32}, **changed})


class Windows:
    """Texts of bytes, 60 a sample; the last are shorter by ever more."""

    sequence_length = 60

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < 40:
            raise IndexError(index)
        tokens = np.random.default_rng(index).integers(0, 256, 60).astype(np.int32)
        weights = (np.arange(60) < 60 - max(0, index - 25) * 4).astype(np.float32)
        return TokenBatch(tokens, np.roll(tokens, -1), weights)


def test_special_tokens_are_the_last_ids_or_the_tokenizers_own(tmp_path):
    found = special_tokens(settings(), BYTES)
    assert found.vocabulary.sentinels == tuple(range(289, 257, -1)) and found.vocabulary.pad == 257
    assert (found.vocabulary.begin, found.vocabulary.end, found.modes) == (257, BYTES.end_of_document, ())
    # one for each kind of denoiser, and an end where the text has none
    modes = settings(vocab_size=293, denoising={"sentinels": 32, "objective": "ul2", "modes": True})
    assert special_tokens(modes, BYTES).modes == (259, 258, 257)
    assert special_tokens(settings(vocab_size=40, denoising={"sentinels": 4}), None).vocabulary.end == 34
    names = ["<pad>", "</s>", *"abc", *(f"<extra_id_{number}>" for number in (1, 0))]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<pad>"))
    words.save(str(tmp_path / "tokenizer.json"))
    own = load_tokenizer(str(tmp_path / "tokenizer.json"), end_of_document="</s>")
    of_file = special_tokens(settings(denoising={"sentinels": 2}), own)
    assert (of_file.vocabulary.sentinels, of_file.vocabulary.pad, of_file.vocabulary.end) == ((6, 5), 0, 1)
    with pytest.raises(UserError, match="has <extra_id_0> and no <extra_id_2>"):
        special_tokens(settings(denoising={"sentinels": 3}), own)


def test_sentinels_are_texts_whatever_the_tokenizer():
    text = answer_text(settings(), BYTES, None, None)
    vocabulary = special_tokens(settings(), BYTES).vocabulary
    assert (text.begin, text.end, text.shown) == (257, BYTES.end_of_document, frozenset(vocabulary.sentinels))
    written = "é <extra_id_0>b<extra_id_31><extra_id_32>"
    ids = text.tokenizer.encode(written)
    # of the last there is none: it is text
    assert ids.tolist() == [*"é ".encode(), 289, ord("b"), 258, *b"<extra_id_32>"]
    assert text.tokenizer.decode(np.append(ids, [257, 256])) == written
    assert text.tokenizer.token_id("<extra_id_1>") == 288 and text.tokenizer.token_id("<extra_id_32>") is None
    assert text.tokenizer.vocab_size == 290 and "<extra_id_31>" in text.tokenizer.special_texts
    # a model that came with its own has no others
    own = answer_text(settings(vocab_size=258), BYTES, 0, 1)
    assert (own.tokenizer, own.begin, own.end, own.shown) == (BYTES, 0, 1, frozenset())


def test_spans_that_are_taken_out_are_what_the_decoder_writes():
    config = settings(decoder_length=24)
    vocabulary = special_tokens(config, BYTES).vocabulary
    windows, samples = Windows(), samples_of_text(config, Windows(), BYTES)
    assert isinstance(samples, Denoised)
    assert len(samples) == len(windows) and samples.sequence_length == 60
    for number in range(len(windows)):
        window, sample, raw = windows[number], samples[number], samples.source[number]
        text = window.tokens[window.weights > 0]
        np.testing.assert_array_equal(put_back(raw, vocabulary), text)
        np.testing.assert_array_equal(sample.segments, ~raw.encoder_padding)
        taken = round(0.15 * len(text))
        spans = np.isin(sample.tokens, vocabulary.sentinels).sum()
        # its spans and a token before each, the end among them
        assert sample.weights.sum() == sample.decoder_segments.sum() == taken + spans + 1
        assert spans == max(1, round(taken / 3)) and sample.decoder_tokens[0] == vocabulary.begin
        np.testing.assert_array_equal(
            sample.decoder_tokens[1:][sample.weights[1:] > 0], sample.targets[:-1][sample.weights[1:] > 0]
        )


def test_a_mixture_of_denoisers_names_each_by_its_mode():
    config = settings(vocab_size=293, denoising={"sentinels": 32, "objective": "ul2", "modes": True})
    modes, samples = special_tokens(config, BYTES).modes, samples_of_text(config, Windows(), BYTES)
    first = [int(samples[number].tokens[0]) for number in range(len(samples))]
    assert set(first) == set(modes)
    # of seven denoisers four are extreme
    assert len(ul2_denoisers(regular=0, extreme=1, sequential=2)) == 7 and first.count(modes[1]) > len(first) / 3


def test_words_of_sentences_are_taken_out_of_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"sentence number {number} of this text\n" for number in range(300)))
    config = settings(decoder_length=40, denoising={"sentinels": 32, "objective": "words"})
    data = DataConfig(path=str(text), sequence_length=128, cache_directory=str(tmp_path / "cache"))
    found = open_data(config, data, seed=3, train_samples=None)
    sample = found.train[0]
    read = bytes(sample.tokens[(sample.segments > 0) & (sample.tokens < 256)].astype(np.uint8)).decode()
    assert "sentence" in read and sample.weights.sum() > 10
    assert found.train.sequence_length == 128 and len(found.validation) > 0


def test_pairs_are_conversations_whose_last_answer_the_decoder_writes(tmp_path):
    pairs = [(f"add {number} and 1", f"{number + 1}") for number in range(40)] + [("x" * 90, "cut")]
    path = tmp_path / "pairs.jsonl"
    lines = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    data = DataConfig(path=str(path), format="chat", sequence_length=24, validation_fraction=0.25)
    config = settings(decoder_length=8)
    found = open_data(config, data, seed=3, train_samples=None)
    assert found.notes == ("pairs: 41 read, 40 kept",) and len(found.train) + len(found.validation) == 40
    assert 0 < len(found.validation) < 20
    read = {}
    for source in (found.train, found.validation):
        for number in range(len(source)):
            sample = source[number]
            text, answer = (
                bytes(ids[here > 0].astype(np.uint8)[:-1]).decode()
                for ids, here in ((sample.tokens, sample.segments), (sample.targets, sample.weights))
            )
            read[text] = answer
            np.testing.assert_array_equal(
                sample.decoder_tokens[1:], np.where(sample.weights[1:] > 0, sample.targets[:-1], 257)
            )
    assert read == dict(pairs[:40])
    assert (
        found.fingerprint
        != open_data(config, data.model_copy(update={"sequence_length": 32}), seed=3, train_samples=None).fingerprint
    )
    cut = data.model_copy(update={"chat": data.chat.model_copy(update={"too_long": "truncate"})})
    assert open_data(config, cut, seed=3, train_samples=None).notes == ("pairs: 41 read, 41 kept",)
    with pytest.raises(
        UserError, match="41 pairs of 41 are longer than data.sequence_length 4 or model.decoder_length 8"
    ):
        open_data(config, data.model_copy(update={"sequence_length": 4}), seed=3, train_samples=None)
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a text alone"}]}))
    with pytest.raises(UserError, match="line 1: .*answer"):
        open_data(config, data, seed=3, train_samples=None)


BAD = {
    "heads": ({"num_heads": 3}, {}, "model.hidden_size 16 is not a multiple of model.num_heads 3"),
    "buckets": ({"max_distance": 16}, {}, "model.num_buckets 32 must be a multiple of 4, and less than twice"),
    "modes": ({"denoising": {"modes": True}}, {}, "model.denoising.modes are of ul2, not of spans"),
    "rate": ({"denoising": {"objective": "ul2", "rate": 0.5}}, {}, "model.denoising.rate has no effect on ul2"),
    "decoder_length": (
        {"decoder_length": 20},
        {"context": 2, "tensor": 2},
        "model.decoder_length 20 is not a multiple of 2 x mesh.context 2 x mesh.tensor 2 = 8",
    ),
    "tensor": ({"decoder_length": 30}, {"tensor": 4}, "model.decoder_length 30 is not a multiple of mesh.tensor 4"),
    "width": ({"mlp_size": 30}, {"tensor": 4}, "model.mlp_size 30 is not a multiple of mesh.tensor 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_told(name):
    changes, mesh, why = BAD[name]
    with pytest.raises((UserError, ValidationError), match=why):
        config = settings(**changes)
        family_named("t5").check(config, {**dict.fromkeys(FLAGS, 1), **mesh}, 32, ContextConfig())


def test_too_few_ids_or_a_decoder_too_short_are_told():
    with pytest.raises(UserError, match="leaves no ids for 32 sentinels .*; set --model.vocab_size 290"):
        special_tokens(settings(vocab_size=289), BYTES)
    with pytest.raises(UserError, match="decoder_length 12 is too small for texts of 60 tokens; give at least 13"):
        samples_of_text(settings(decoder_length=12), Windows(), BYTES)


def test_backends_are_those_that_know_biases_by_distance():
    found = attention_backends(settings(), "bfloat16", device_kind=HOPPER, length=512)
    assert [found[kind].name for kind in ("encoder", "decoder", "cross")] == ["materialized", "materialized", "mosaic"]
    split = attention_backends(settings(), "bfloat16", device_kind=HOPPER, length=512, parts=2)
    assert [split[kind].name for kind in ("encoder", "decoder", "cross")] == ["xla", "xla", "mosaic"]
    assert "no bias by distance" in split["encoder"].reason
    with pytest.raises(UserError, match="mosaic cannot: it knows no bias by distance .T5."):
        named = settings(attention={"implementation": "mosaic"})
        attention_backends(named, "bfloat16", device_kind=HOPPER, length=512)
