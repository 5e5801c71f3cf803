"""`python -m jaxtron.evaluate .. --token_ids`: logits of transformers on any mesh; and texts under weights."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxtron.convert import __main__ as convert
from jaxtron.evaluate import __main__ as evaluating
from tests.hugging_face import fixtures
from tests.support.commands import Ended, run_main
from tests.support.evaluate_runs import figures
from tests.support.tiny_tokenizer import write_tokenizer


def source(folder: Path, name: str) -> Path:
    """A directory of weights, and beside it the tokens of its fixture."""
    fixture = fixtures.load(name)
    hub = fixtures.write(folder / name, fixture.config, fixture.weights)
    write_tokenizer(hub)
    (folder / "ids.json").write_text(json.dumps(fixture.tokens.tolist()))
    return hub


def evaluate(*words: object) -> Ended:
    return run_main(evaluating.main, words)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama", "data 2 context 2 tensor 2"),
        # rows of 12 tokens need room on four pairs of pieces
        ("llama", "context 4 fsdp 2"),
        ("qwen2", "pipe 3 data 2"),
        ("gpt2", "pipe 2 tensor 2 fsdp 2"),
        pytest.param("nemotron", "data 1", marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_transformers_on_any_mesh(name: str, mesh: str, tmp_path: Path):
    hub, out = source(tmp_path, name), tmp_path / "logits.npy"
    words = mesh.split()
    flags = [word for axis, size in zip(words[::2], words[1::2], strict=True) for word in (f"--mesh.{axis}", size)]
    ended = evaluate(hub, "--token_ids", tmp_path / "ids.json", "--logits", out, *flags)
    assert (ended.code, ended.err) == (0, ""), ended
    found, expected = np.load(out), fixtures.load(name).logits
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert not list(tmp_path.glob(".*"))


def test_logits_of_a_run_are_those_of_its_weights(tmp_path: Path):
    hub, run = source(tmp_path, "llama"), tmp_path / "run"
    assert run_main(convert.main, ["--from", hub, "--to", run, "--data.sequence_length", 16]).code == 0
    rows = [[1, 5, 39], [4, 4, 0], [7, 8, 9]]
    (tmp_path / "three.json").write_text(json.dumps(rows))
    found = {}
    for directory in (hub, run):
        ended = evaluate(directory, "--token_ids", tmp_path / "three.json", "--logits", tmp_path / "out.npy")
        assert ended.code == 0 and "3 x 3 tokens, 40 of each" in ended.out, ended
        found[directory] = np.load(tmp_path / "out.npy")
    assert np.array_equal(found[hub], found[run]) and found[hub].shape == (3, 3, 40)


def test_a_text_under_weights_is_scored_as_under_their_run(tmp_path: Path):
    hub, run, text = source(tmp_path, "gpt2"), tmp_path / "run", tmp_path / "text.txt"
    text.write_text("a cabbage had a bag. " * 20)
    assert run_main(convert.main, ["--from", hub, "--to", run]).code == 0
    # its positions are fewer than the usual sequence
    nll, expected = (figures(tmp_path, one, "--text", text) for one in (hub, run))
    assert nll["nll"] == expected["nll"] and nll["step"] is None and nll["sequence_length"] == 20
    ended = evaluate(hub, "--text", text)
    assert ended.code == 0 and f"checkpoint         the weights of {hub}" in ended.out, ended


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        ("[[1, 2], [3]]", "", "has rows of 1 and of 2 tokens"),
        ("[[1, 40]]", "", "has the token 40, and the model knows 0 to 39"),
        ("[[-1]]", "", "has the token -1"),
        ("[[1.5]]", "", "must be rows of whole numbers"),
        ("[[true]]", "", "must be rows of whole numbers"),
        ("[]", "", "must be rows of whole numbers"),
        ("[[]]", "", "must be rows of whole numbers"),
        ("[[1", "", "is not JSON: "),
        ("[[1]]", "--step 3", "--step 3 is of a run's checkpoints"),
        ("[[1]]", "--stride 3", "--stride has no effect with --token_ids"),
        ("[[1]]", "--text ids.json", "--text has no effect with --token_ids"),
        ("[[1]]", "--model.bias true", "--model.bias is the model's own"),
    ],
)
def test_tokens_that_are_none(content: str, words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source(tmp_path, "llama")
    monkeypatch.chdir(tmp_path)
    Path("ids.json").write_text(content)
    ended = evaluate("llama", "--token_ids", "ids.json", "--logits", "out.npy", *words.split())
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1, ended
    assert not Path("out.npy").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("llama", "nothing to score: give --text FILE, --token_ids"),
        ("llama --logits out.npy", "--logits needs --token_ids FILE beside it"),
        ("llama --token_ids ids.json", "--token_ids needs --logits FILE.npy beside it"),
        ("llama --token_ids ids.json --logits ids.json", "no earlier result of such a command"),
        ("llama --token_ids nowhere.json --logits out.npy", "cannot read --token_ids nowhere.json"),
        ("nowhere --token_ids ids.json --logits out.npy", "no directory nowhere"),
        ("bare --text text.txt", "has no tokenizer that is known here"),
    ],
)
def test_what_is_missing(words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source(tmp_path, "llama")
    (source(tmp_path, "llama").rename(tmp_path / "bare") / "tokenizer.json").unlink()
    source(tmp_path, "llama")
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("a bag")
    ended = evaluate(*words.split())
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1, ended
