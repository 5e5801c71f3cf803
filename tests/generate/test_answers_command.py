"""`python -m jaxtron.generate` and what else writes, of models that answer a text with another."""

import json
from pathlib import Path

import pytest

from jaxtron.evaluate import __main__ as evaluate
from jaxtron.generate import __main__ as generate
from jaxtron.serve import __main__ as serve
from tests.support.commands import Ended, run_main
from tests.support.word_models import write_llama, write_t5

COMMANDS = {"generate": generate.main, "evaluate": evaluate.main, "serve": serve.main}
GREEDY = ("--temperature", 0, "--train.precision", "fp32", "--min_new_tokens", 5, "--max_new_tokens", 5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a T5's weights."""
    return write_t5(tmp_path_factory.mktemp("t5"))


def run(*arguments: object) -> Ended:
    return run_main(generate.main, arguments)


def test_answers_of_weights_are_printed_without_their_texts(weights: Path, tmp_path: Path) -> None:
    texts = ["w5 w7 <extra_id_0> w9", "w3", "w4 w4 w4 w4 w4 w4 w4"]
    ended = run(weights, "--prompt", *texts, *GREEDY, "--json", tmp_path / "out.json")
    assert ended.code == 0, ended
    found = json.loads((tmp_path / "out.json").read_text())["texts"]
    # what ends a text stands behind each, and a sentinel is one token
    assert [one["prompt_tokens"] for one in found] == [[5, 7, 38, 9, 1], [3, 1], [4] * 7 + [1]]
    assert all(len(one["tokens"]) == 5 and one["finish_reason"] == "length" for one in found)
    assert len({tuple(one["tokens"]) for one in found}) == 3
    parts = [f"--- {number} of 3\n{one['text']}\n" for number, one in enumerate(found, 1)]
    assert ended.out.endswith(f"\n{''.join(parts)}\n")
    # alone and on another mesh it is the same
    alone = run(weights, "--prompt", texts[0], *GREEDY, "--mesh.tensor", 2)
    assert alone.code == 0 and alone.out.endswith(f"\n{found[0]['text']}\n"), alone


def test_pairs_are_scored_by_the_answers_that_are_wanted(weights: Path, tmp_path: Path) -> None:
    texts = ["w5 w7 w9", "w3", "w4 w4 w4"]
    assert run(weights, "--prompt", *texts, *GREEDY[:4], "--max_new_tokens", 4, "--json", tmp_path / "out").code == 0
    answers = [one["text"] for one in json.loads((tmp_path / "out").read_text())["texts"]]
    words = answers[1].split()
    # all of it, one word more, nothing of it
    wanted = [answers[0], " ".join([*words, "other"]), "other"]
    lines = [{"instruction": text, "output": answer} for text, answer in zip(texts, wanted, strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = (weights, "--pairs", tmp_path / "pairs.jsonl", "--train.precision", "fp32", "--max_new_tokens", 4)
    found = []
    for mesh in ((), ("--mesh.tensor", 2, "--rows", 2)):
        ended = run_main(evaluate.main, (*flags, *mesh, "--json", tmp_path / "figures.json"))
        assert ended.code == 0, ended
        found.append(json.loads((tmp_path / "figures.json").read_text()))
    assert found[0] == found[1] and [one["answer"] for one in found[0]["answers"]] == answers
    f1 = 2 * len(words) / (2 * len(words) + 1)
    assert found[0]["exact_match"] == pytest.approx(1 / 3) and found[0]["word_f1"] == pytest.approx((1 + f1) / 3)
    assert ended.out.splitlines()[-1] == f"3 pairs: exact match 0.3333, F1 of words {(1 + f1) / 3:.4f}"


REFUSED = [
    ("generate {t5} --chat --prompt w3", "answers a text with another, and a conversation is for models that go on"),
    ("generate {t5} --chat", "a conversation is for models that go on with a text: give a decoder, or python -m"),
    ("serve {t5}", "a server is for models that go on with a text"),
    ("evaluate {t5} --last_words {file}", "--last_words is for models that go on with a text"),
    ("evaluate {t5} --tasks hellaswag", "--tasks is for models that go on with a text"),
    ("evaluate {llama} --pairs {file}", "goes on with a text, and --pairs is for models that answer one with another"),
    ("evaluate {t5} --pairs {file} --tasks hellaswag", "give one of --tasks NAME[,NAME ...], --last_words FILE.jsonl"),
    ("evaluate {t5} --pairs {file} --num_fewshot 3", "--num_fewshot has no effect with --pairs; leave it out"),
    ("evaluate {llama} --last_words {file} --bleu", "--bleu has no effect with --last_words; leave it out"),
    ("evaluate {t5} --pairs nowhere.jsonl", "cannot read nowhere.jsonl: No such file"),
    ("evaluate {t5} --pairs {file}", "pairs.jsonl, line 2: it has no answer after a text; give pairs"),
    ("evaluate {t5} --pairs {empty}", "has no pairs; give a file that has"),
    (
        "generate {t5} --prompt w3 --room 1",
        "prompt has 2 tokens, and the model has room for 1 in a text",
    ),
    ("generate {t5} --prompt w3 --mesh.context 2", "going on from a memory needs --mesh.context 1"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_what_it_is_not_for_is_told_in_a_line(weights: Path, tmp_path: Path, line: str, message: str) -> None:
    pairs = [{"instruction": "w3", "output": "w4"}, {"messages": [{"role": "user", "content": "w3"}]}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "empty.jsonl").write_text("\n")
    places = {"t5": weights, "file": tmp_path / "pairs.jsonl", "empty": tmp_path / "empty.jsonl"}
    if "{llama}" in line:
        places["llama"] = write_llama(tmp_path / "llama")
    command, *words = line.format(**places).split()
    ended = run_main(COMMANDS[command], words)
    assert ended.code == 2 and message in ended.err and ended.err.count("\n") == 1, ended


def test_each_pair_that_is_too_long_is_named(weights: Path, tmp_path: Path) -> None:
    lines = [{"instruction": text, "output": "w4"} for text in ("w3", "w3 w3 w3 w3 w3 w3 w3 w3")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ended = run_main(evaluate.main, (weights, "--pairs", tmp_path / "pairs.jsonl", "--room", 8))
    assert (
        ended.code == 2 and "pairs.jsonl, line 2: prompt has 9 tokens, and the model has room for 8 in" in ended.err
    ), ended
