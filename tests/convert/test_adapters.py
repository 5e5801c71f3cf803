"""Adapters of a run in peft's files, a run that begins with them, and one that learns to answer."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtron.config import load
from jaxtron.convert import __main__ as convert
from jaxtron.evaluate import __main__ as evaluate
from jaxtron.run.configuration import Configuration
from jaxtron.run.restored import restore_model
from jaxtron.run.session import make_session
from jaxtron.train import __main__ as training
from jaxtron.train.initial import begin
from tests.convert.test_upcycle_weights import weights
from tests.support.commands import run_main
from tests.support.equivalence import by_name
from tests.train.test_initial import configuration, train


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("config.yaml", "--output config.yaml is a file; give a new directory"),
        ("config.yaml/new", "--output config.yaml/new: "),
        ("link", "--output link is there already"),
        (".", "--output . is not empty"),
    ],
)
def test_adapters_go_to_a_new_directory(output: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("train:\n  lora:\n    rank: 4\n")
    Path("link").symlink_to("nowhere")
    ended = run_main(convert.main, ["adapters", ".", "--base", ".", "--output", output])
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1, ended
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "link"]


@pytest.mark.slow
def test_a_run_with_adapters_goes_on_elsewhere_and_its_adapters_go_to_peft_and_back(tmp_path: Path):
    source, run, peft = weights(tmp_path / "dense"), tmp_path / "run", tmp_path / "peft"
    lora = ["--train.lora.rank", 4, "--train.lora.alpha", 8, "--optimizer.learning_rate", 0.01]
    begun = ["--checkpoint.initialize_from", source, "--run.directory", run]
    ended = train(tmp_path, *begun, *lora, "--mesh.tensor", 2)
    assert (ended.code, ended.err) == (0, ""), ended
    # two more steps on another mesh, where the weights are not needed
    further = ("--mesh.pipe", 2, "--train.microbatches", 2, "--train.steps", 4, "--train.lora.dropout", 0.05)
    ended = train(tmp_path, *begun, *lora, *further)
    assert ended.code == 0 and "checkpoint of step 2 found: continuing" in ended.out, ended
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    peft.mkdir()
    ended = run_main(convert.main, ["adapters", run, "--base", source, "--output", peft])
    assert (ended.code, ended.err) == (0, "") and "6 kinds of layers of step 4" in ended.out, ended
    assert not list(tmp_path.glob(".*"))
    # the model with its adapters merged says what the run says
    ended = run_main(convert.main, ["--from", run, "--to", tmp_path / "merged"])
    assert (ended.code, ended.err) == (0, "") and "adapters merged" in ended.out, ended
    (tmp_path / "rows.json").write_text(json.dumps([list(range(1, 9)), [5] * 8]))
    said = []
    for model in (run, tmp_path / "merged", source):
        flags = [model, "--token_ids", tmp_path / "rows.json", "--logits", tmp_path / "logits.npy"]
        ended = run_main(evaluate.main, flags)
        assert (ended.code, ended.err) == (0, ""), ended
        said.append(np.load(tmp_path / "logits.npy"))
        (tmp_path / "logits.npy").unlink()
    np.testing.assert_allclose(said[1], said[0], rtol=0, atol=1e-5 * np.abs(said[0]).max())
    assert np.abs(said[2] - said[0]).max() > 1e-2 * np.abs(said[0]).max()
    flags = ["--checkpoint.initialize_from", source, "--checkpoint.initialize_adapters", peft, *lora]
    session = make_session(configuration(*flags, "--mesh.pipe", 2, "--train.microbatches", 2), jax.devices()[:2])
    state, _ = begin(session, "")
    ended = run_main(convert.main, ["adapters", run, "--base", source, "--output", peft])
    assert ended.code == 2 and "is not empty" in ended.err
    # those of the run's checkpoint
    trained = load(Configuration, run / "config.yaml").resolved()
    alone = make_session(configuration(*flags, "--mesh.data", 1), jax.devices()[:1], trains=False)
    with alone.use():
        expected = by_name(restore_model(alone, run, trained, None).params, alone.trainer)
    with session.use():
        found = by_name(state.model, session.trainer)
    assert found.keys() == expected.keys() and sum("lora" in name for name in found) == 12
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert array.any(), name


@pytest.mark.slow
def test_an_imported_model_learns_to_answer(tmp_path: Path):
    """Adapters alone, on conversations whose answers are of two lengths and weigh the same."""
    pairs = {"the cat": "sat", "off to see": "what made such noise and ran off"}
    lines = [{"instruction": f"{word} {ask}", "output": pairs[ask]} for word in "acdefhiknostuw" for ask in pairs]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "chat.jinja").write_text("{% for message in messages %}{{ message.content }}{{ '\n' }}{% endfor %}")
    source, run = weights(tmp_path / "dense"), tmp_path / "run"
    flags = ["--checkpoint.initialize_from", source, "--run.directory", run, "--run.log_every", 1]
    flags += ["--data.format", "chat", "--data.path", tmp_path / "chat.jsonl", "--data.validation_fraction", 0]
    flags += ["--data.chat.template", tmp_path / "chat.jinja", "--data.chat.normalize", "answers"]
    flags += ["--data.cache_directory", tmp_path / "tokens", "--data.sequence_length", 48]
    flags += ["--train.steps", 30, "--train.global_batch", 4, "--train.sample_tokens", 0, "--mesh.fsdp", 2]
    flags += ["--train.lora.rank", 4, "--optimizer.learning_rate", 0.01, "--optimizer.warmup_steps", 0]
    ended = run_main(training.main, [*flags, "--mesh.tensor", 2])
    assert ended.code == 0, ended
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) >= 30 and losses[-1] < 0.7 * losses[0], losses
