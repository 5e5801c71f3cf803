"""BERT: what its samples are made of, that padding changes nothing, what its settings refuse."""

import functools
import json
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers

from jaxtron.config import UserError
from jaxtron.data.batch import TokenBatch, stack_samples
from jaxtron.data.config import DataConfig
from jaxtron.data.masked.sentences import SentenceSource
from jaxtron.data.tokenizers import ByteTokenizer, load_tokenizer
from jaxtron.models.bert.batch import BertBatch
from jaxtron.models.bert.config import BertConfig
from jaxtron.models.bert.data import MaskedTexts, open_data, samples_of_text, vocabulary_of
from jaxtron.run.configuration import configuration_of
from jaxtron.run.session import make_trainer
from jaxtron.run.step import batch_sharding
from jaxtron.sharding.rules import use
from tests.support.equivalence import make_params, rules_for

LENGTH = 24
SMALL = {"family": "bert", "num_layers": 2, "hidden_size": 16, "num_heads": 2, "vocab_size": 68, "vocab_multiple": 8}


def config(**changes) -> BertConfig:
    return BertConfig.model_validate(SMALL | changes)


@pytest.fixture
def word_pieces(tmp_path):
    """A WordPiece tokenizer of a few words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##kind", "##ly", "word", "##s", "a"]
    tokenizer = FastTokenizer(
        models.WordPiece(
            {word: place for place, word in enumerate(words)}, unk_token="[UNK]", max_input_chars_per_word=50
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_special_tokens_are_the_tokenizers_or_the_last_ids(word_pieces):
    pieces = load_tokenizer(str(word_pieces))
    assert pieces is not None
    assert pieces.encode("unkindly words a").tolist() == [5, 6, 7, 8, 9, 10]
    found = vocabulary_of(config(), pieces)
    assert (found.classify, found.separate, found.mask, found.pad, found.size) == (2, 3, 4, 0, 11)
    assert np.flatnonzero(found.continues).tolist() == [6, 7, 9]
    assert vocabulary_of(config(masking={"whole_words": False}), pieces).continues is None
    own = vocabulary_of(config(vocab_size=261), ByteTokenizer())
    assert (own.classify, own.separate, own.mask, own.pad, own.size) == (257, 258, 259, 260, 257)
    assert own.continues is None
    with pytest.raises(UserError, match="leave no ids of model.vocab_size 260 .* set --model.vocab_size 261"):
        vocabulary_of(config(vocab_size=260), ByteTokenizer())
    words = json.loads(word_pieces.read_text())
    words["model"]["vocab"].pop("[MASK]")
    words["added_tokens"] = [token for token in words["added_tokens"] if token["content"] != "[MASK]"]
    word_pieces.write_text(json.dumps(words))
    with pytest.raises(UserError, match=r"the tokenizer has no token \[MASK\], which encoders need"):
        vocabulary_of(config(), load_tokenizer(str(word_pieces)))


@pytest.mark.parametrize("pairs", ["order", "next", "none"])
def test_sentences_of_text_become_pairs(pairs, tmp_path):
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name * 9}{number}" for number in range(9)))
    data = DataConfig(path=str(tmp_path), sequence_length=LENGTH, cache_directory=str(tmp_path / "cache"))
    found = open_data(config(vocab_size=261, pairs=pairs), data, seed=1, train_samples=200)
    samples = [found.train[index] for index in range(200)]
    assert all(isinstance(sample, BertBatch) for sample in samples) and len(found.validation) > 0
    assert {float(sample.pair_weights) for sample in samples} == {0.0 if pairs == "none" else 1.0}
    swapped = np.mean([sample.is_swapped for sample in samples])
    assert swapped == 0 if pairs == "none" else 0.3 < swapped < 0.7
    for sample in samples:
        text = sample.segments == 1
        assert sample.tokens[0] == 257 and (sample.targets[~text] == 260).all() and not sample.weights[~text].any()
        assert (sample.targets == 258)[text].sum() == (1 if pairs == "none" else 2)
        # what is not masked is what it was
        assert (sample.tokens == sample.targets)[sample.weights == 0].all()
        letters = {chr(token)[0] for token in sample.targets[text] if 97 <= token < 103}
        assert len(letters) <= (2 if pairs == "next" and sample.is_swapped else 1)
    assert np.mean([sample.weights.sum() for sample in samples]) > 1


def test_ids_that_the_model_does_not_know_are_told(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(["zz"] * 40))
    data = DataConfig(path=str(tmp_path), sequence_length=LENGTH, cache_directory=str(tmp_path / "cache"))
    found = open_data(config(vocab_size=261), data, seed=1, train_samples=2).train
    assert isinstance(found, SentenceSource) and isinstance(found._source, MaskedTexts)
    wrong = replace(found._source, tokens=100)
    with pytest.raises(UserError, match="the data has the id [0-9]+, but ids here are 0 to 99"):
        wrong[0]


@functools.cache
def evaluated(changes: str = "{}"):
    """A small model on one device, and what gives the sums of a batch."""
    settings = json.loads(changes)
    whole = configuration_of("bert").model_validate(
        {
            "model": SMALL | settings,
            "data": {"sequence_length": LENGTH},
            "train": {"precision": "fp32", "global_batch": 4},
            "mesh": {"data": 1},
        }
    )
    with use(rules_for({})):
        trainer = make_trainer(whole.resolved())
        params = make_params(trainer)

    def sums(batch):
        with use(rules_for({})):
            found, counted = jax.jit(trainer.evaluate)(params, jax.device_put(batch, batch_sharding()))
        return {name: float(value) for name, value in found.items()}, {n: float(v) for n, v in counted.items()}

    return sums


class Texts(list[TokenBatch]):
    """A source of samples that are there already."""

    sequence_length = LENGTH


def batch_of(lengths, **changes) -> BertBatch:
    random = np.random.default_rng(0)
    tokens = [random.integers(0, 64, LENGTH, dtype=np.int32) for _ in lengths]
    weighs = [(np.arange(LENGTH) < size).astype(np.float32) for size in lengths]

    texts: Any = Texts(TokenBatch(row, row, weight) for row, weight in zip(tokens, weighs, strict=True))
    samples = samples_of_text(config(**changes), texts, None)
    return stack_samples([samples[index] for index in range(len(lengths))])


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_padding_changes_nothing(placement):
    batch = batch_of([15, 9, 20, 4])
    run = evaluated(json.dumps({"norm_placement": placement}))
    sums, counts = run(batch)
    assert 0 < counts["pairs"] == 4 and counts["masked tokens"] == batch.weights.sum()
    # other tokens, kinds and targets where nothing is
    padding = batch.segments == 0
    noise = np.random.default_rng(1).integers(0, 64, padding.shape).astype(np.int32)
    other = replace(
        batch,
        tokens=np.where(padding, noise, batch.tokens),
        targets=np.where(padding, noise, batch.targets),
        token_types=np.where(padding, noise % 2, batch.token_types),
    )
    assert padding.sum() > 20 and run(other)[0] == pytest.approx(sums, rel=1e-6)
    # and other text changes all
    moved = replace(batch, tokens=np.where(padding, batch.tokens, (batch.tokens + 1) % 64))
    assert run(moved)[0]["masked"] != pytest.approx(sums["masked"], rel=1e-3)


def test_all_tokens_see_all_others_and_the_first_tells_of_the_whole():
    """The last token changes what is predicted of the first, and of the pair."""
    batch = batch_of([20, 20, 20, 20])
    last = batch.segments.sum(1) - 1
    changed = batch.tokens.copy()
    changed[np.arange(4), last] = 5
    only_first = np.zeros_like(batch.weights)
    only_first[:, 1] = 1.0
    one, other = (
        evaluated()(replace(batch, tokens=tokens, weights=only_first))[0] for tokens in (batch.tokens, changed)
    )
    assert abs(one["masked"] - other["masked"]) > 1e-4 and abs(one["pairs"] - other["pairs"]) > 1e-5


def test_each_loss_has_its_own_mean():
    """Rows without a pair weigh in the one alone, and rows without masks in the other."""
    batch = batch_of([20, 12, 6, 17])
    weights = batch.weights.copy()
    weights[3] = 0
    batch = replace(batch, weights=weights, pair_weights=np.array([1, 1, 0, 1], np.float32))
    sums, counts = evaluated()(batch)
    assert counts == {"masked tokens": weights.sum(), "pairs": 3.0}
    alone = [
        evaluated()(jax.tree.map(lambda array, row=row: np.repeat(array[row : row + 1], 4, 0), batch))[0]
        for row in range(4)
    ]
    for name in sums:
        assert sums[name] == pytest.approx(sum(one[name] for one in alone) / 4, rel=1e-5)


def test_without_pairs_there_is_neither_pooler_nor_their_loss():
    batch = batch_of([20, 12, 6, 17], pairs="none")
    sums, counts = evaluated(json.dumps({"pairs": "none"}))(batch)
    assert counts["pairs"] == 0 and sums["pairs"] == 0 and sums["masked"] > 0


def test_what_does_not_fit_is_told():
    with pytest.raises(ValueError, match="model.hidden_size 16 is not a multiple of model.num_heads 3"):
        config(num_heads=3)
    whole = configuration_of("bert").model_validate({"model": SMALL, "data": {"sequence_length": 8}})
    with pytest.raises(UserError, match="model.num_heads 2 is not a multiple of mesh.tensor 4"):
        whole.check_model({"pipe": 1, "data": 1, "fsdp": 1, "context": 1, "tensor": 4})
    with pytest.raises(Exception, match="data.sequence_length 8 is longer than model.max_positions 4"):
        configuration_of("bert").model_validate({"model": SMALL | {"max_positions": 4}, "data": {"sequence_length": 8}})
