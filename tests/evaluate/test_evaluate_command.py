"""`python -m jaxtron.evaluate`: the numbers of a plain loop, on any mesh, and one line for bad input."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxtron.data.batch import TokenBatch
from jaxtron.evaluate.model import open_model
from jaxtron.evaluate.request import parse, read_configuration
from tests.support.evaluate_runs import TrainedRun, figures, run


def plain_loop(trained: TrainedRun, text: Path, stride: int) -> float:
    """Sum of the negative log-likelihood: one token at a time, each with the window that its place asks for."""
    request = parse([str(trained.directory), "--text", str(text)])
    with open_model(request, *read_configuration(request)) as model:
        tokens, length = model.tokenizer.encode(text.read_text()), model.sequence_length

        @jax.jit
        def nll(params, window, place):
            weights = (jnp.arange(length) == place).astype(jnp.float32)[None]
            batch = TokenBatch(window[None, :-1], window[None, 1:], weights)
            return model.session.trainer.evaluate(params, batch, num_microbatches=1)[0]["loss"]

        total = 0.0
        for target in range(1, len(tokens)):
            start = max(0, -(-(target - length) // stride)) * stride
            # what follows the target is not there yet
            window = [int(token) for token in tokens[start : target + 1]]
            padded = jnp.array(window + [0] * (length + 1 - len(window)), jnp.int32)
            total += float(nll(model.params, padded, target - start - 1))
        return total


@pytest.mark.parametrize("stride", [32, 7])
def test_a_plain_loop_gives_the_same(trained: TrainedRun, text: Path, tmp_path: Path, stride: int):
    found = figures(tmp_path, trained.directory, "--text", text, "--stride", stride, "--batch", 3)
    assert found["tokens"] == len(text.read_text()) == 237
    assert found["nll"] == pytest.approx(plain_loop(trained, text, stride), rel=1e-5)


def test_a_text_shorter_than_a_window(trained: TrainedRun, tmp_path: Path):
    short = tmp_path / "short.txt"
    short.write_text("the cat")
    found = figures(tmp_path, trained.directory, "--text", short, "--stride", 5)
    assert found["nll"] == pytest.approx(plain_loop(trained, short, 5), rel=1e-5)
    assert (found["tokens"], found["words"]) == (7, 2)
    assert found["word_perplexity"] == pytest.approx(math.exp(min(20, found["nll"])))


def test_the_loss_of_the_training_on_what_it_held_out(trained: TrainedRun, tmp_path: Path):
    found = figures(tmp_path, trained.directory, "--text", trained.held_out)
    assert found["nll_per_token"] == pytest.approx(trained.metrics["validation_loss"], rel=1e-5)
    assert found["step"] == 4 and found["stride"] == 32
    assert found["perplexity"] == pytest.approx(math.exp(found["nll_per_token"]))
    ratio = (found["tokens"] - 1) / (len(trained.held_out.read_text().strip().split(" ")) - 1)
    assert found["token_ratio"] == pytest.approx(ratio)
    assert found["bits_per_byte"] == pytest.approx(found["nll"] / math.log(2) / found["text_bytes"])


MESHES = [
    {"data": 2, "tensor": 2},
    pytest.param({"fsdp": 4}, marks=pytest.mark.slow),
    {"data": 2, "pipe": 2},
    pytest.param({"context": 2, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"data": -1}, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def on_one_device(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return figures(tmp_path_factory.mktemp("one"), trained.directory, "--text", trained.held_out, "--stride", 9)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_gives_the_same(trained: TrainedRun, tmp_path: Path, on_one_device: dict, mesh: dict[str, int]):
    flags = [word for axis, size in mesh.items() for word in (f"--mesh.{axis}", size)]
    found = figures(tmp_path, trained.directory, "--text", trained.held_out, "--stride", 9, *flags)
    assert on_one_device["devices"] == 1 and found["devices"] == (8 if -1 in mesh.values() else 4)
    assert found["nll"] == pytest.approx(on_one_device["nll"], rel=1e-5)
    assert {**found, "nll": 0, "devices": 0}.keys() == on_one_device.keys()


def test_an_earlier_checkpoint_and_several_files(trained: TrainedRun, tmp_path: Path):
    whole = trained.held_out.read_text()
    parts = tmp_path / "a.txt", tmp_path / "b.txt"
    for path, piece in zip(parts, (whole[:500], whole[500:]), strict=True):
        path.write_text(piece)
    early = figures(tmp_path, trained.directory, "--text", *parts, "--step", 2)
    late = figures(tmp_path, trained.directory, "--text", *parts, "--data.sequence_length", 16)
    assert early["step"] == 2 and early["tokens"] == late["tokens"] == len(whole)
    assert early["nll_per_token"] > trained.metrics["validation_loss"] * 1.01
    assert late["sequence_length"] == 16


def test_what_is_detokenized_is_counted_as_it_was(trained: TrainedRun, tmp_path: Path):
    path = tmp_path / "wiki.txt"
    path.write_text("the cat 's mat\n the sea ".replace("'", "\n"))
    plain = figures(tmp_path, trained.directory, "--text", path)
    joined = figures(tmp_path, trained.directory, "--text", path, "--detokenize", "wikitext")
    assert plain["tokens"] == plain["text_bytes"] == joined["text_bytes"]
    # " \n" and "\n " lose their spaces
    assert joined["tokens"] == plain["tokens"] - 2
    assert joined["words"] == plain["words"] == 6


def test_as_a_user_types_it(trained: TrainedRun, text: Path):
    """One process of its own, a device of four: figures on the screen, and the run is left as it was."""
    before = sorted(trained.directory.rglob("*"))
    words = [str(trained.directory), "--text", str(text), "--devices", "4", "--mesh.tensor", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxtron", "evaluate", *words], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["checkpoint"] == f"step 4 of {trained.directory}" and rows["tokens"] == "237"
    assert rows["loss"].endswith("nats a token") and rows["word perplexity"].endswith("tokens a word)")
    assert sorted(trained.directory.rglob("*")) == before


def one_line(*arguments: object) -> str:
    ended = run(*arguments)
    assert (ended.code, ended.out) == (2, "") and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended
    return ended.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--stride 33", "--stride 33 is longer than a sequence of 32 tokens"),
        ("--stride 0", "--stride: '0' must be a whole number above 0"),
        ("--batch 3 --mesh.data 2", "--batch 3 is not a multiple of mesh.data 2 x mesh.fsdp 1 = 2"),
        ("--step 3", "no finished checkpoint of step 3 in"),
        ("--mesh.data 16", "mesh.data 16 needs 16 devices, there are 8"),
        ("--mesh.tensor 4", "model.num_heads 2 is not a multiple of mesh.tensor 4"),
        ("--mesh.tenor 4", "unknown flag --mesh.tenor; did you mean --mesh.tensor?"),
        ("--model.num_layers 3", "--model.num_layers is the model's own: leave it out"),
        ("--data.sequence_length 64", "data.sequence_length 64 is longer than model.max_positions 32"),
        ("--data.tokenizer nowhere.json", "no tokenizer nowhere.json"),
        ("--data.tokenizer bytes", "the tokenizer bytes has 257 tokens, more than the model's 32"),
        ("--detokenize ptb", "--detokenize: invalid choice: 'ptb'"),
        ("--json /dev/null/a.json", "--json /dev/null/a.json: /dev/null is no folder"),
        ("--text", "--text: expected at least one argument"),
    ],
)
def test_bad_flags(trained: TrainedRun, text: Path, flags: str, message: str):
    words = flags.split()
    ended = run(trained.directory, *(() if "--text" in words else ("--text", text)), *words)
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert ended.err.startswith("error: ") and message in ended.err


def test_bad_texts(trained: TrainedRun, tmp_path: Path):
    paths = {name: tmp_path / f"{name}.txt" for name in ("missing", "latin", "one", "none", "foreign")}
    paths["lines"] = tmp_path / "part-00000"
    paths["lines"].write_text('{"text": "the cat"}\n{"text": "sat"}\n')
    for name, content in (("latin", b"caf\xe9"), ("one", b"a"), ("none", b""), ("foreign", "a ß".encode())):
        paths[name].write_bytes(content)
    for name, message in {
        "missing": f"cannot read --text {paths['missing']}: No such file or directory",
        "latin": f"--text {paths['latin']} is not UTF-8 text: byte 0xe9 at offset 3",
        "one": f"{paths['one']} has 1 token, and the first is not scored",
        "lines": f"--text {paths['lines']} is JSON lines, not text; write the texts of its documents to a file",
        "none": f"{paths['none']} has no text to score",
        "foreign": f"{paths['foreign']}: the character 'ß' (U+00DF) is not among the",
    }.items():
        assert message in one_line(trained.directory, "--text", paths[name])


def test_bad_runs(trained: TrainedRun, text: Path, tmp_path: Path):
    assert "no run directory; give it first" in one_line("--text", text)
    assert "unknown flag --textt; did you mean --text?" in one_line("run", "--textt", text)
    assert "unexpected argument 'b'" in one_line("a", "b", "--text", text)
    assert "no directory nowhere; give the --run.directory" in one_line("nowhere", "--text", text)
    assert f"{tmp_path} has no config.yaml" in one_line(tmp_path, "--text", text)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(trained.directory / "config.yaml", bare)
    assert "no checkpoint in" in one_line(bare, "--text", text)
    assert "there is none at all" in one_line(bare, "--text", text, "--step", 2)
    shutil.copytree(trained.directory, tmp_path / "copy")
    saved = tmp_path / "copy" / "config.yaml"
    for old, new in (("hidden_size: 32", "hidden_size: 64"), ("activation: gelu_tanh", "activation: relu")):
        before = saved.read_text()
        saved.write_text(before.replace(old, new))
        (name, was), (_, now) = old.split(": "), new.split(": ")
        message = f"{saved} was changed since the checkpoint was trained: model.{name} {was} -> {now}; put the old"
        assert message in one_line(saved.parent, "--text", text)
        saved.write_text(before)


def test_a_damaged_checkpoint_is_passed_over(trained: TrainedRun, text: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(trained.directory, copy)
    record = copy / "checkpoints" / "step_00000004" / "jaxtron.json"
    record.write_text("{}")
    ended = run(copy, "--text", text, "--json", tmp_path / "figures.json")
    assert ended.code == 0 and json.loads((tmp_path / "figures.json").read_text())["step"] == 2
    assert ended.err.startswith("warning: checkpoint ") and "step_00000004 is not used" in ended.err
    assert "no checkpoint in" in one_line(copy, "--text", text, "--step", 4)


def test_the_characters_of_the_training_must_be_there(trained: TrainedRun, text: Path, tmp_path: Path):
    copy, other = tmp_path / "copy", tmp_path / "other.txt"
    shutil.copytree(trained.directory, copy)
    other.write_text("xyz " * 500)
    saved = copy / "config.yaml"
    saved.write_text(saved.read_text().replace(str(trained.directory.parent / "text.txt"), str(other)))
    assert "the data of the training has changed" in one_line(copy, "--text", text)
    other.unlink()
    assert f"no such file or folder {other}" in one_line(copy, "--text", text)


def test_help():
    ended = subprocess.run(
        [sys.executable, "-m", "jaxtron.evaluate", "--help"], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0 and ended.stderr == ""
    for flag in ("--text", "--stride", "--batch", "--step", "--detokenize", "--json", "--mesh.*"):
        assert flag in ended.stdout


def test_json_is_what_is_printed(trained: TrainedRun, text: Path, tmp_path: Path):
    ended = run(trained.directory, "--text", text, "--json", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert f"{found['nll_per_token']:.4f} nats a token" in ended.out
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".new"] == []
