"""Words that answers share with what was wanted, and ROUGE and BLEU by the packages that have them."""

import pytest

from jaxtron.config import UserError
from jaxtron.evaluate import overlap
from jaxtron.evaluate.overlap import check_package
from jaxtron.evaluate.pairs import word_f1


@pytest.mark.parametrize(
    ("answer", "wanted", "expected"),
    [
        ("a b", "b a", 1.0),
        ("a a b", "a b b", 2 / 3),
        ("a", "b", 0.0),
        ("", "a", 0.0),
        ("", " ", 1.0),
        ("a b", "a", 2 / 3),
    ],
)
def test_f1_of_words_counts_each_as_often_as_it_is_there(answer: str, wanted: str, expected: float) -> None:
    assert word_f1(answer, wanted) == pytest.approx(expected)


@pytest.mark.parametrize(("score", "package"), [("rouge", "rouge-score"), ("bleu", "sacrebleu")])
def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, score: str, package: str) -> None:
    monkeypatch.setitem(overlap.PACKAGES, score, (None, package))
    with pytest.raises(UserError, match=f"--{score} needs {package}: pip install .jaxtron.pairs.."):
        check_package(score)


def test_rouge_is_of_words_and_runs_of_them() -> None:
    pytest.importorskip("rouge_score", reason="needs the extra pairs")
    found = overlap.rouge(["The cat sat", "x"], ["the cat ran, sat.", "y"])
    # three of three and of four words, one of two and of three pairs
    assert found == pytest.approx({"rouge1": 6 / 7 / 2, "rouge2": 2 / 5 / 2, "rougeL": 6 / 7 / 2})


def test_bleu_is_of_all_answers_together() -> None:
    pytest.importorskip("sacrebleu", reason="needs the extra pairs")
    wanted = ["the cat sat on the mat today", "it ran off to see what it was"]
    assert overlap.bleu(wanted, wanted)[0] == pytest.approx(100)
    score, signature = overlap.bleu(["the cat sat on a mat today", "it ran off"], wanted)
    assert 0 < score < 100 and "tok:13a" in signature
