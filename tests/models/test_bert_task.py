"""Tasks of texts on a BERT: examples of files, what is wrong with a row, and a small set learned to an accuracy."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.config import NoEffect, UserError
from jaxtron.data.config import DataConfig
from jaxtron.data.dataset import Data
from jaxtron.data.masked.bert import BertVocabulary
from jaxtron.data.tokenizers import load_tokenizer
from jaxtron.models.bert.stack import Texts
from jaxtron.models.bert.task.answer import answer_sums
from jaxtron.models.bert.task.config import BertTaskConfig
from jaxtron.models.bert.task.data import make_row, open_data
from jaxtron.models.bert.task.program import figures
from jaxtron.models.bert.task.questions import Question, windows
from jaxtron.run.metrics import read_metrics
from jaxtron.sharding.rules import use
from jaxtron.train.__main__ import main as train
from tests.hugging_face.fixtures import load_batch, write
from tests.support.commands import run_main
from tests.support.tiny_tokenizer import write_tokenizer

LENGTH = 24
CLS, SEP, PAD = 257, 258, 260
SMALL = {"family": "bert_task", "num_layers": 1, "hidden_size": 32, "num_heads": 2, "vocab_size": 261}


def config(**changes: Any) -> BertTaskConfig:
    return BertTaskConfig.model_validate(SMALL | changes)


def read(file: Path, model: BertTaskConfig, **data: Any) -> Data:
    given = {"path": str(file), "sequence_length": LENGTH, "cache_directory": str(file.parent / "cache")} | data
    return open_data(model, DataConfig.model_validate(given), seed=3, train_samples=None)


def text_of(ids: np.ndarray) -> str:
    return "".join({CLS: "^", SEP: "|", PAD: ""}.get(number, chr(number % 256)) for number in ids.tolist())


@pytest.mark.parametrize("form", ["tsv", "jsonl"])
def test_examples_are_rows_of_a_file(form: str, tmp_path: Path):
    golds = ("yes", "no")
    rows = [
        {"id": str(number), "a": f"is {number}", "b": f"was {number}", "gold": golds[number % 2]}
        for number in range(20)
    ]
    path = tmp_path / f"pairs.{form}"
    lines = ["\t".join(rows[0])] + ["\t".join(row.values()) for row in rows]
    path.write_text("\n".join(lines if form == "tsv" else map(json.dumps, rows)) + "\n")
    data = read(path, config(columns=("a", "b", "gold"), labels=("no", "yes")), validation_fraction=0.25)
    assert (len(data.train), len(data.validation)) == (15, 5)
    found = [part[number] for part in (data.train, data.validation) for number in range(len(part))]
    texts = {text_of(one.tokens[0]): int(one.label) for one in found}
    assert texts == {f"^is {number}|was {number}|": 1 - number % 2 for number in range(20)}
    one = found[0]
    size = len(text_of(one.tokens[0]))
    assert one.segments[0].tolist() == [1] * size + [0] * (LENGTH - size) and one.weights == 1
    second = text_of(one.tokens[0]).index("|") + 1
    assert one.token_types[0].tolist() == [0] * second + [1] * (size - second) + [0] * (LENGTH - size)
    # one text alone, and files for each part
    one_text = config(columns=("a", "gold"), labels=("no", "yes"))
    alone = read(path, one_text, path="python:stdlib", train=str(path), validation=str(path))
    assert text_of(alone.train[3].tokens[0]) == "^is 3|" and len(alone.validation) == 20
    assert alone.fingerprint != data.fingerprint


def test_answers_are_texts_of_their_own(tmp_path: Path):
    path = tmp_path / "race.jsonl"
    rows = [
        {"article": "It rains.", "question": "What?", "options": ["sun", "rain"], "answer": "B"},
        {"article": "It rains.", "question": "A _ fell", "options": ["rain", "sun"], "answer": 0},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = read(path, config(task="choose", choices=2), validation_fraction=0)
    found = {tuple(map(text_of, data.train[number].tokens)): int(data.train[number].label) for number in range(2)}
    assert found == {
        ("^It rains.|What? sun|", "^It rains.|What? rain|"): 1,
        ("^It rains.|A rain fell|", "^It rains.|A sun fell|"): 0,
    }


ANSWERED = {"question": "what?", "context": "a red fox", "answers": {"text": ["red"], "answer_start": [2]}}


def test_answers_are_places_in_a_text(tmp_path: Path):
    rows = [ANSWERED, ANSWERED | {"context": "é red fox"}, ANSWERED | {"answers": []}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # SQuAD's own form: one object
    asked = [
        {"id": "one", "question": "what?", "answers": [{"text": "red", "answer_start": 2}]},
        {"id": "two", "question": "what?", "answers": [{"text": "red", "answer_start": 2}], "is_impossible": True},
    ]
    paragraphs = [{"context": "a red fox", "qas": asked}]
    (tmp_path / "squad.json").write_text(json.dumps({"version": "2.0", "data": [{"paragraphs": paragraphs}]}))
    found = {}
    for name in ("rows.jsonl", "squad.json"):
        data = read(tmp_path / name, config(task="answer"), validation_fraction=0)
        found[name] = sorted(
            (text_of(one.tokens[0]), *divmod(int(one.label), LENGTH))
            for one in (data.train[number] for number in range(len(data.train)))
        )
    # behind `^what?|`
    here, none = ("^what?|a red fox|", 9, 11), ("^what?|a red fox|", 0, 0)
    # a letter of two bytes
    assert found["rows.jsonl"] == [none, here, ("^what?|\xc3\xa9 red fox|", 10, 12)]
    assert found["squad.json"] == [none, here]


def test_a_long_text_is_several_windows():
    tokenizer = load_tokenizer("bytes")
    asked = Question("what?", "0123456789abcdefghijklmno", (20, 22))
    model = config(task="answer", window_step=8, question_tokens=4)
    found = list(windows(model, asked, 23, tokenizer))
    assert [text_of(part.context) for part in found] == ["0123456789abcdef", "89abcdefghijklmn", "ghijklmno"]
    assert {text_of(part.question) for part in found} == {"what"}
    # of the second, which begins at 8; the first ends before it
    assert [(part.first, part.last) for part in found] == [(0, 0), (6 + 12, 6 + 13), (6 + 4, 6 + 5)]
    with pytest.raises(UserError, match="data.sequence_length 7 leaves no room for a text beside a question of 4"):
        list(windows(model, asked, 7, tokenizer))


def test_what_is_found_is_the_likeliest_stretch_of_the_text(rules_for, in_region):
    # [CLS] question [SEP] four tokens [SEP] padding
    types, segments = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 0]]), np.array([[1, 1, 1, 1, 1, 1, 1, 1, 0]])
    begins, ends = np.zeros((2, 9), np.float32)
    # in the question and in the padding nothing is found; an end is not before its beginning, nor far behind it
    begins[[1, 3, 4, 6, 8]], ends[[1, 3, 6, 8]] = [9, -9, 3, 1, 9], [9, 8, 4, 9]
    logits = np.stack([begins, ends], axis=-1)[None]

    def sums(logits: np.ndarray, right: tuple[int, int], longest: int = 30) -> tuple[float, ...]:
        def whole(logits: Any, types: Any, segments: Any, label: Any) -> Any:
            return answer_sums(logits, Texts(types, types, segments), label, jnp.ones(1), longest)

        with use(rules_for(data=1)):
            found = in_region(whole)(logits, types, segments, np.array([right[0] * 9 + right[1]]))
        return tuple(map(float, found))

    loss, exact, overlap = sums(logits, (4, 5))
    plain = [np.log(np.exp(numbers[:8]).sum()) - numbers[place] for numbers, place in ((begins, 4), (ends, 5))]
    np.testing.assert_allclose(loss, np.mean(plain), rtol=1e-6)
    # found are 4 to 6: two of three, both of two
    assert exact == 0 and overlap == pytest.approx(2 * 2 / (3 + 2))
    assert sums(logits, (4, 6))[1:] == (1, 1)
    # of two tokens at most: 6 alone
    assert sums(logits, (6, 6), longest=2)[1:] == (1, 1)
    # none is said at [CLS]
    assert sums(np.where(np.arange(9)[None, :, None] == 0, 20, logits), (0, 0))[1:] == (1, 1)


def test_of_parts_too_long_the_longer_is_cut():
    vocabulary = BertVocabulary(classify=CLS, separate=SEP, mask=259, pad=PAD, size=257)

    def ids(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def cut(a: str, b: str | None) -> str:
        return text_of(make_row(ids(a), None if b is None else ids(b), 13, vocabulary)[0])

    assert cut("a" * 30, "bb") == f"^{'a' * 8}|bb|"
    assert cut("aa", "b" * 30) == f"^aa|{'b' * 8}|"
    assert cut("a" * 30, "b" * 30) == f"^{'a' * 5}|{'b' * 5}|"
    assert cut("a" * 30, None) == f"^{'a' * 11}|"


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("a\tb\tlabel\nx\ty\n", {}, "line 2 has 2 columns and its header 3"),
        ("a\tb\tlabel\nx\ty\t0\n", {}, "line 2 has no column sentence1, only a, b, label; name the columns"),
        (
            "a\tb\tlabel\nx\ty\tmaybe\n",
            {"columns": ("a", "b", "label")},
            "the class 'maybe' in label: classes are 0, 1",
        ),
        ('{"a": 1, "label": 0}\n', {"columns": ("a", "label")}, "line 1 has no text in a"),
        ('{"a": "x", "label": 0}\n[]\n', {"columns": ("a", "label")}, "line 2 is no JSON object"),
        ('{"a": "x", "label": 0}\n{\n', {"columns": ("a", "label")}, "line 2 is not JSON"),
        ("a\tlabel\n", {"columns": ("a", "label")}, "data.path has no example"),
        (
            '{"article": "x", "question": "y", "options": ["a"], "answer": "A"}\n',
            {"task": "choose", "choices": 2},
            "line 1 has 1 answers, and model.choices is 2",
        ),
        (
            '{"article": "x", "question": "y", "options": ["a", "b"], "answer": "C"}\n',
            {"task": "choose", "choices": 2},
            "line 1 has 'C' in answer: it is a letter from A to B, or a number from 0",
        ),
        ('{"question": "a", "context": "b"}\n', {"task": "answer"}, "line 1 has no column answers, only question"),
        ('{"question": "a", "context": 1, "answers": []}\n', {"task": "answer"}, "line 1 has no text in context"),
        (
            '{"question": "a", "context": "b", "answers": ["b"]}\n',
            {"task": "answer"},
            "line 1 has no answers in answers: give {text",
        ),
        (
            '{"question": "a", "context": "b c", "answers": {"text": ["c"], "answer_start": [1]}}\n',
            {"task": "answer"},
            "line 1: the answer 'c' does not stand at character 1 of the text, which has ' ' there",
        ),
        ('{"data": [{"paragraphs": 3}]}\n', {"task": "answer"}, "line 1 has no list of objects in paragraphs"),
    ],
)
def test_what_is_wrong_with_a_row_is_told(text: str, changes: dict, message: str, tmp_path: Path):
    (tmp_path / "rows.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "rows.txt", config(**changes))


def test_settings_that_mean_nothing_are_refused(tmp_path: Path):
    (tmp_path / "rows.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\t0\n")
    with pytest.raises(NoEffect, match="data.reset_attention"):
        read(tmp_path / "rows.tsv", config(), reset_attention=True)
    with pytest.raises(UserError, match="model.family bert_task reads examples: give --data.path FILE"):
        read(tmp_path / "rows.tsv", config(), path="python:stdlib")
    for changes, message in (
        ({"task": "choose", "labels": ("a", "b")}, "model.labels"),
        ({"choices": 3}, "model.choices"),
        ({"window_step": 3}, "model.window_step"),
        ({"task": "answer", "columns": ("a", "b")}, "must be 3 different names for model.task answer"),
        ({"labels": ("a", "a")}, "must be two classes or more, each once"),
        ({"columns": ("a", "b", "c", "d")}, "must be 2 or 3 different names for model.task classify"),
        ({"task": "choose", "columns": ("a", "b")}, "must be 4 different names for model.task choose"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**changes)


def test_f1_is_of_the_second_class():
    sums = {"accuracy": 6.0, "wanted": 5.0, "told": 3.0, "hits": 2.0}
    assert figures(config(), sums, {"examples": 10.0}) == {"accuracy": 0.6, "f1": 2 * 2 / (5 + 3)}
    assert figures(config(), {**sums, "wanted": 0.0, "told": 0.0, "hits": 0.0}, {"examples": 10.0})["f1"] == 0
    found = {**sums, "overlap": 7.5}
    assert figures(config(task="answer"), found, {"examples": 10.0}) == {"exact": 0.6, "f1": 0.75}
    assert figures(config(labels=("a", "b", "c")), sums, {"examples": 10.0}) == {"accuracy": 0.6}


def write_words(path: Path, count: int, seed: int) -> Path:
    """Pairs whose second text has the first letter of the first, or not."""
    random = np.random.default_rng(seed)
    rows = ["sentence1\tsentence2\tlabel"]
    for _ in range(count):
        letter, others = random.choice([*"abcd"], 2, replace=False)
        label = int(random.integers(2))
        rows.append(f"{letter}\t{letter if label else others}\t{label}")
    path.write_text("\n".join(rows) + "\n")
    return path


WORDS = """
--model.family bert_task --model.num_layers 2 --model.hidden_size 32 --model.num_heads 2 --model.vocab_size 261
--model.initial_std 0.1 --data.sequence_length 8 --train.global_batch 32 --train.steps 150 --train.validate_every 0
--train.validation_batches none --train.precision fp32 --optimizer.learning_rate 3e-3 --optimizer.warmup_steps 10
--checkpoint.every 150 --devices 8
"""


def test_a_small_set_is_learned(tmp_path: Path, monkeypatch):
    """Whether two letters are the same, which no token by itself tells."""
    monkeypatch.chdir(tmp_path)
    files = [str(write_words(tmp_path / f"{count}.tsv", count, seed=count)) for count in (400, 64)]
    train([*WORDS.split(), "--data.train", files[0], "--data.validation", files[1], "--run.directory", "run"])
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["validation_accuracy"] > 0.95 and last["validation_f1"] > 0.95


def write_questions(path: Path, count: int, seed: int) -> Path:
    """Where a letter stands, once or more, among others; it may be missing."""
    random, lines = np.random.default_rng(seed), []
    for _ in range(count):
        letters, sizes = random.permutation([*"abcd"]).tolist(), random.integers(1, 4, 4).tolist()
        context = "".join(letter * size for letter, size in zip(letters[:3], sizes, strict=False))
        asked = int(random.integers(4))
        found = {"text": [], "answer_start": []}
        if asked < 3:
            text = letters[asked] * sizes[asked]
            found = {"text": [text], "answer_start": [context.index(text)]}
        lines.append(json.dumps({"question": letters[asked], "context": context, "answers": found}))
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_answers_are_learned(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [str(write_questions(tmp_path / f"{count}.jsonl", count, seed=count)) for count in (2000, 64)]
    words = WORDS.replace("sequence_length 8", "sequence_length 16 --model.task answer").replace(" 150", " 300")
    train([*words.split(), "--data.train", files[0], "--data.validation", files[1], "--run.directory", "run"])
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["validation_exact"] > 0.9 and last["validation_f1"] >= last["validation_exact"]


BEGINS = "--checkpoint.allow_missing choice.* --checkpoint.allow_unused masked.* pairs.*"


def test_a_family_that_begins_with_another_says_what_may_differ(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model:\n  family: bert\n  num_layers: 2\n")
    ended = run_main(train, [*WORDS.split(), "--data.path", "x.tsv", "--checkpoint.initialize_from", "run"])
    assert "is of model.family bert, and here it is bert_task: name what of it is not here" in ended.err


@pytest.mark.slow
def test_a_task_begins_with_a_pretrained_model(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(f"a line {number}" for number in range(300)))
    words = WORDS.replace("bert_task", "bert").replace("steps 150", "steps 2").replace("every 150", "every 2")
    train([*words.split(), "--data.path", "text.txt", "--data.cache_directory", "cache", "--run.directory", "bert"])
    file = str(write_words(tmp_path / "pairs.tsv", 64, seed=1))
    words = WORDS.replace("steps 150", "steps 1").replace("every 150", "every 1")
    capsys.readouterr()
    given = ["--checkpoint.initialize_from", "bert", *BEGINS.split(), "--data.path", file, "--run.directory", "task"]
    train([*words.split(), *given])
    told = capsys.readouterr().out
    assert "the model is that of step 2 of bert" in told
    assert "drawn, not there: choice.dense.bias, choice.dense.kernel" in told


@pytest.mark.slow
def test_a_task_begins_with_files_of_hugging_face(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings, weights, _ = load_batch("encoders", "bert")
    write(tmp_path / "bert", settings, weights)
    write_tokenizer(tmp_path / "bert", special=("[PAD]", "[CLS]", "[SEP]", "[MASK]"))
    file = str(write_words(tmp_path / "pairs.tsv", 32, seed=1))
    words = "--model.family bert_task --data.sequence_length 8 --train.global_batch 8 --train.steps 1 --devices 8"
    given = ["--checkpoint.initialize_from", "bert", "--checkpoint.allow_missing", "choice.*", "--data.path", file]
    ended = run_main(train, [*words.split(), *given, "--checkpoint.allow_unused", "pairs.*"])
    assert "the model here has no place for cls.predictions.bias" in ended.err
    capsys.readouterr()
    train([*words.split(), *given, "--checkpoint.allow_unused", "cls.*", "--run.directory", "task"])
    assert "drawn, not there: choice.dense.bias, choice.dense.kernel" in capsys.readouterr().out
    # sizes are those of the files
    assert "hidden_size: 32" in (tmp_path / "task" / "config.yaml").read_text()
