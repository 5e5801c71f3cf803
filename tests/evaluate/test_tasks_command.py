"""`python -m jaxtron.evaluate RUN --tasks ... | --last_words FILE`: figures of a run, and one line for bad input."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.data.tokenizers import CharacterTokenizer
from jaxtron.evaluate.__main__ import main
from jaxtron.evaluate.harness import simple_evaluate
from jaxtron.evaluate.last_words import read_texts, score_last_words
from tests.support.evaluate_runs import TrainedRun


class Alphabet:
    """An engine that is sure of the next letter of the alphabet."""

    rows, room, vocab = 2, 8, 27

    def begin(self, row, prompt, settings) -> None:
        raise NotImplementedError

    step = end = begin

    def score(self, sequences, top=1):
        assert all(len(one) <= self.room + 1 for one in sequences)
        found = []
        for one in sequences:
            best = np.where(one[:-1] == 0, 1, one[:-1] + 1)
            found.append((np.where(one[1:] == best, math.log(0.5), math.log(0.25)), best[:, None], best[:, None]))
        return found


def test_a_last_word_is_right_where_each_of_its_tokens_is_the_likeliest() -> None:
    texts = ["xy abc", "xy ba", "abcdefghijklm abcd"]
    tokenizer = CharacterTokenizer(" abcdefghijklmnopqrstuvwxyz")
    # after a space it expects an a; no letter of the second is right, and the third is cut on the left
    found = score_last_words(Alphabet(), tokenizer, texts)
    # the space before the word is one of its tokens
    assert (found.texts, found.right) == (3, 0)
    quarter, half = -math.log(0.25), -math.log(0.5)
    assert found.nll == pytest.approx((quarter + 3 * half) + (quarter + 2 * quarter) + (quarter + 4 * half))
    assert found.perplexity == pytest.approx(math.exp(found.nll / 3))


def test_a_last_word_longer_than_the_room_or_without_numbers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, engine = CharacterTokenizer(" abcdefghijklmnopqrstuvwxyz"), Alphabet()
    assert score_last_words(engine, tokenizer, ["xy abcdefg"]).texts == 1
    with pytest.raises(UserError, match="last word 'abcdefgh' has 9 tokens, and the model reads 8; raise --room"):
        score_last_words(engine, tokenizer, ["xy abcdefgh"])
    of_one = engine.score([np.zeros(3, np.int32)])[0]
    monkeypatch.setattr(engine, "score", lambda sequences: [(np.full(2, np.nan), *of_one[1:])])
    with pytest.raises(FloatingPointError, match="not finite"):
        score_last_words(engine, tokenizer, ["xy a"])


def test_lines_end_where_json_does(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b\x85 c"}\r\n\r\n{"text": "d e"}'.encode())
    assert read_texts(path) == ["a\u2028b\x85 c", "d e"]


def test_last_words_of_a_run_are_a_line_and_a_file(trained: TrainedRun, tmp_path: Path, capfd) -> None:
    texts, out = tmp_path / "texts.jsonl", tmp_path / "out.json"
    texts.write_text('{"text": "the cat sat on a mat"}\n\n{"text": "and then ran off to"}\n')
    assert main([str(trained.directory), "--last_words", str(texts), "--json", str(out), "--rows", "2"]) == 0
    found = json.loads(out.read_text())
    assert found["texts"] == 2 and 0 <= found["accuracy"] <= 1 and found["perplexity"] > 1
    assert f"2 texts: accuracy {found['accuracy']:.4f}" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "hellaswag", "--last_words", "FILE"], "give one of --tasks NAME"),
        (["--tasks", ","], "give one of --tasks NAME"),
        (["--last_words", "FILE", "--num_fewshot", "3"], "--num_fewshot has no effect with --last_words"),
        (["--last_words", "FILE", "--add_bos_token"], "--add_bos_token has no effect with --last_words"),
        (["--last_words", "missing.jsonl"], "cannot read --last_words missing.jsonl: No such file"),
        (["--tasks", "hellaswag", "--task_path", "nowhere"], "--task_path nowhere is no directory"),
        (["--tasks", "hellaswag", "--limit", "0"], "--limit"),
        (["--tasks", "jx_no_such_task"], "jx_no_such_task: no such task" if simple_evaluate else "jaxtron[eval]"),
        (["--last_words", "FILE", "--model.num_layers", "2"], "--model.num_layers is the model's own"),
        (["--last_words", "FILE", "--chat_template", "x"], "--chat_template has no effect here"),
    ],
)
def test_bad_lines_are_told_in_one(trained: TrainedRun, tmp_path: Path, flags: list[str], message: str) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "the cat"}\n')
    with pytest.raises(UserError) as told:
        main([str(trained.directory), *(str(texts) if word == "FILE" else word for word in flags)])
    assert message in str(told.value) and str(told.value).count("\n") <= 1


@pytest.mark.parametrize(
    "line",
    ['{"text": "a \\ud800"}', "{", "[]", '{"texts": "a b"}', '{"text": 3}', '{"text": "one"}', '{"text": ""}', "nul\0"],
)
def test_lines_that_are_no_texts_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(f'{{"text": "a b"}}\n{line}\n')
    with pytest.raises(UserError, match="line 2 "):
        read_texts(path)
