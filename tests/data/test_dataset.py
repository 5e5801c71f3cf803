"""From settings to samples: windows, the split, and every message about them."""

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers

from jaxtron.config import UserError
from jaxtron.data.config import DataConfig
from jaxtron.data.dataset import open_data
from jaxtron.data.loader import validation_batches
from jaxtron.data.window_source import WindowSource


@pytest.fixture
def digits(tmp_path):
    path = tmp_path / "digits.txt"
    path.write_text("".join(str(i % 10) for i in range(100)))
    return path


def open_digits(path, *, seed=0, **settings):
    settings = {
        "tokenizer": "characters",
        "sequence_length": 8,
        "cache_directory": str(path.parent / "cache"),
    } | settings
    return open_data(DataConfig(path=str(path), **settings), seed=seed)


def test_the_last_tenth_is_kept_for_validation(digits):
    data = open_digits(digits)
    assert data.tokenizer.vocab_size == 10
    # 90 tokens: the last window of 8 that still has a target begins at 80
    assert len(data.train) == 11 and data.train[10].tokens[0] == 0
    assert data.validation[0].tokens.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_windows_follow_one_another_and_targets_are_one_ahead(digits):
    data = open_digits(digits)
    samples = [data.train[i] for i in range(len(data.train))]
    tokens = np.concatenate([sample.tokens for sample in samples])
    targets = np.concatenate([sample.targets for sample in samples])
    np.testing.assert_array_equal(tokens, np.arange(88) % 10)
    np.testing.assert_array_equal(targets, np.arange(1, 89) % 10)
    assert all(sample.weights.dtype == np.float32 and sample.weights.all() for sample in samples)


def test_the_last_validation_window_is_padded(digits):
    # 10 tokens have 9 targets: one whole window of 8, and 1 of the next
    data = open_digits(digits)
    assert len(data.validation) == 2
    last = data.validation[1]
    assert last.weights.tolist() == [1] + [0] * 7
    assert (last.tokens[0], last.targets[0]) == (8, 9)
    batches = list(validation_batches(data.validation, batch_size=4, local_rows=np.arange))
    assert sum(batch.arrays.weights.sum() for batch in batches) == 9


@pytest.mark.parametrize(("num_tokens", "windows"), [(0, 0), (1, 0), (2, 1), (5, 1), (6, 2)])
def test_padded_windows_hold_every_target_once(num_tokens, windows):
    source = WindowSource(np.arange(num_tokens, dtype=np.uint16), sequence_length=4, pad_last=True)
    assert len(source) == windows
    targets = [int(t) for i in range(windows) for t, w in zip(source[i].targets, source[i].weights, strict=True) if w]
    assert targets == list(range(1, num_tokens))
    with pytest.raises(IndexError):
        source[windows]


def test_no_validation_when_the_fraction_is_zero(digits):
    data = open_digits(digits, validation_fraction=0)
    assert len(data.validation) == 0 and len(data.train) == 12


def test_the_loader_follows_the_settings_and_resumes(digits):
    data = open_digits(digits, workers=2, prefetch=3)
    arguments = {"batch_size": lambda consumed: 4, "local_rows": np.arange}
    with data.train_loader(**arguments) as loader:
        next(loader)
        position = loader.position
        expected = next(loader)
    with data.train_loader(**arguments, position=position) as loader:
        resumed = next(loader)
    assert resumed.start == expected.start == 4
    np.testing.assert_array_equal(resumed.arrays.tokens, expected.arrays.tokens)


def test_the_fingerprint_names_everything_that_a_position_depends_on(digits):
    fingerprint = open_digits(digits).fingerprint
    assert open_digits(digits).fingerprint == fingerprint
    # reading ahead does not change what is read
    assert open_digits(digits, prefetch=9).fingerprint == fingerprint
    others = [
        open_digits(digits, seed=1),
        open_digits(digits, sequence_length=9),
        open_digits(digits, validation_fraction=0.2),
        open_digits(digits, tokenizer="bytes"),
    ]
    assert len({fingerprint, *(other.fingerprint for other in others)}) == 5


def test_the_cache_directory_follows_the_environment(digits, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_digits(digits, cache_directory=None)
    assert len(list((tmp_path / "xdg" / "jaxtron").iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_digits(digits, cache_directory=None)
    assert len(list((tmp_path / "home" / ".cache" / "jaxtron").iterdir())) == 1


def test_a_list_of_paths_is_one_stream(digits, tmp_path):
    (tmp_path / "letters.txt").write_text("abc" * 10)
    config = DataConfig.model_validate(
        {
            "path": [str(tmp_path / "letters.txt"), str(digits)],
            "sequence_length": 32,
            "cache_directory": str(tmp_path / "cache"),
        }
    )
    data = open_data(config, seed=0)
    # the end of the first document, then the start of the second
    assert data.train[0].tokens[-2:].tolist() == [256, ord("0")]
    assert data.tokenizer.decode(data.train[0].tokens) == "abc" * 10 + "0"


def test_the_default_is_the_standard_library(tmp_path):
    data = open_data(DataConfig(cache_directory=str(tmp_path)), seed=0)
    assert data.tokenizer.vocab_size == 257
    assert len(data.train) > 10_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sequence_length": 90},
            "90 of them to train on beside data.validation_fraction 0.1, but one sample needs 91; give more text",
        ),
        ({"validation_fraction": 0.01}, "0.01 of 100 tokens leaves 1 to validate on, but 2 are needed"),
        ({"tokenizer": "characters", "end_of_document": "x"}, "has no effect with the characters tokenizer"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_one_clear_line(digits, settings, message):
    with pytest.raises(UserError, match=message):
        open_digits(digits, **settings)


@pytest.mark.parametrize("path", ["", []])
def test_an_empty_path_is_an_error(path):
    with pytest.raises(UserError, match="--data.path is empty"):
        open_data(DataConfig.model_validate({"path": path}), seed=0)


def test_more_workers_than_batches_would_not_take_effect():
    with pytest.raises(ValidationError, match="data.workers 4 is more than data.prefetch 2"):
        DataConfig(workers=4, prefetch=2)


def test_a_tokenizer_file_serves_the_whole_way(digits, tmp_path):
    words = FastTokenizer(models.WordLevel({"<eos>": 0, **{str(i): i + 1 for i in range(10)}}))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.save(str(tmp_path / "tokenizer.json"))
    data = open_digits(digits, tokenizer=str(tmp_path / "tokenizer.json"))
    assert data.tokenizer.vocab_size == 11
    assert data.train[0].tokens.tolist() == list(range(1, 9))
    assert (
        data.validation[1].targets[:3].tolist() == [10, 0, 0]
        and data.validation[1].weights.tolist() == [1, 1] + [0] * 6
    )
