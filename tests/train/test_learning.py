"""A small model learns a small text, and one run with what the other tests leave at its default."""

import json
import math
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.support.command_runs import records, run_here, small, write_text

SENTENCE = "the quick brown fox jumps over the lazy dog. "


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_text_that_repeats_is_learned_by_heart(precision: str, tmp_path: Path):
    (tmp_path / "text.txt").write_text(SENTENCE * 400)
    flags = ["--train.precision", precision, "--train.steps", "250", "--optimizer.learning_rate", "1e-2"]
    flags += ["--train.sample_tokens", "90", "--run.log_every", "50"]
    ended = run_here(*small(tmp_path), *flags)
    assert ended.code == 0 and ended.err == ""
    assert records(tmp_path / "run")[-1]["validation_loss"] < 0.2
    (sample,) = re.findall("\nSample\n(.*)\n\nRun\n", ended.out)
    assert len(sample) == 16 + 90 and sample in SENTENCE * 4


def train_tokenizer(text: Path, path: Path) -> int:
    """Makes a tokenizer.json of whole words; the size of its vocabulary."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unknown>", "<|endoftext|>"]
    tokenizer.train([str(text)], trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    tokenizer.save(str(path))
    return tokenizer.get_vocab_size()


@pytest.mark.slow
def test_settings_that_the_other_tests_leave_alone(tmp_path: Path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_text(folder / "a.txt", seed=1)
    file = write_text(tmp_path / "b.txt", seed=2)
    vocabulary = train_tokenizer(file, tmp_path / "tokenizer.json")
    flags = f"""
        --data.path {folder} {file} --data.tokenizer {tmp_path / "tokenizer.json"} --model.vocab_size {vocabulary}
        --train.precision fp16 --optimizer.name sgd --optimizer.momentum 0.8 --optimizer.nesterov
        --optimizer.schedule warmup_stable_decay --optimizer.learning_rate 0.1 --optimizer.warmup_steps 2
        --optimizer.anneal_steps 3 --optimizer.anneal_style cosine --train.steps 8 --run.profile_steps 3 5
        --mesh.fsdp 2 --mesh.tensor 2 --train.microbatches 2 --train.sample_tokens 9
        --model.activation swiglu --model.norm rms_norm --model.position rotary --model.recompute full
    """.split()
    ended = run_here(*small(tmp_path), *flags)
    assert ended.code == 0 and ended.err == ""
    lines = records(tmp_path / "run")
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] < rates[1] < rates[2] == rates[3] == pytest.approx(0.1) and rates[4] > rates[6] > rates[7]
    assert all(math.log2(line["loss_scale"]).is_integer() for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    (sample,) = re.findall("\nSample\n(.*)\n\nRun\n", ended.out, re.DOTALL)
    assert set(sample.split()) <= set(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "inverse_square_root", "warmup_stable_decay"])
def test_every_schedule(schedule: str, tmp_path: Path):
    ended = run_here(*small(tmp_path), "--optimizer.schedule", schedule, "--train.steps", "5")
    assert ended.code == 0 and ended.err == ""
    assert len(records(tmp_path / "run")) == 5
