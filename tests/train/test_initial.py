"""`checkpoint.initialize_from`: a training that begins with Hugging Face weights, or with the model of another run."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtron.config import UserError, gather, load
from jaxtron.convert import __main__ as converting
from jaxtron.plan import __main__ as planning
from jaxtron.run.beginning import check_beginning, settings_below
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import make_session
from jaxtron.run.state import divided
from jaxtron.train import __main__ as training
from jaxtron.train.initial import begin
from jaxtron.weights.load import load_parameters
from tests.convert.test_upcycle_weights import data_flags, weights
from tests.hugging_face import fixtures
from tests.support.command_runs import run_here
from tests.support.commands import Ended, run_main
from tests.support.compiling import programs

STEPS = ["--train.steps", 2, "--train.global_batch", 8, "--train.sample_tokens", 0, "--train.validation_batches", 1]
STEPS += ["--train.precision", "fp32", "--optimizer.warmup_steps", 0]


def train(folder: Path, *flags: object) -> Ended:
    kept = ("--runtime.compilation_cache", programs())
    return run_here(*map(str, [*data_flags(folder), *STEPS, *kept, *flags]))


def configuration(*flags: object) -> Configuration:
    words = list(map(str, flags))
    return load(Configuration, None, words, under=settings_below(gather(Configuration, None, words)))


def test_the_state_begins_with_the_weights_and_nothing_else(tmp_path: Path):
    source = weights(tmp_path / "dense", "qwen3")
    config = configuration(
        "--checkpoint.initialize_from", source, "--mesh.fsdp", 2, "--train.trainable", "!embedding.*", "*"
    )
    assert config.data.tokenizer == str(source / "tokenizer.json") and config.model.qk_norm
    session = make_session(config, jax.devices()[:2])
    state, origin = begin(session, "")
    assert origin == {"initialized_from": {"weights": str(source)}} and int(state.step) == 0
    with session.use():
        params = load_parameters(source, config.model, session.blueprint, session.trainer.partitions)
    fields = divided(session.blueprint, params)
    assert jax.tree.leaves(fields["frozen"])[0].dtype == np.dtype("bfloat16")
    for name, expected in fields.items():
        same = jax.tree.map(lambda found, wanted: bool((found == wanted).all()), getattr(state, name), expected)
        assert all(jax.tree.leaves(same)), name
    assert not any(bool(leaf.any()) for leaf in jax.tree.leaves(state.optimizer))


def test_adapters_are_new_beside_the_weights(tmp_path: Path):
    source = weights(tmp_path / "dense", "qwen3")
    words = ("--checkpoint.initialize_from", source, "--mesh.fsdp", 2, "--mesh.tensor", 2, "--train.lora.rank", 2)
    session, whole = (make_session(configuration(*words[:number]), jax.devices()[:4]) for number in (8, 6))
    state, _ = begin(session, "")
    with session.use():
        params = load_parameters(source, session.config.model, whole.blueprint, whole.trainer.partitions)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.frozen)} == {"bfloat16", "float32"}
    found, new = state.model, session.initial_state().params
    for name, spec in session.blueprint.names.items():
        leaf, wanted = found, new if spec.role == "adapter" else params
        for word in name.split("."):
            key = int(word) if word.isdigit() else word
            leaf, wanted = leaf[key], wanted[key]
        assert (np.asarray(leaf) == np.asarray(wanted).astype(leaf.dtype)).all(), name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model.hidden_size 64", "is of another model: model.hidden_size is 32 there and 64 here; leave settings of"),
        ("--model.rotary.base 5e4", "model.rotary.base is 500.0 there and 50000.0 here"),
        (
            "--model.qk_norm true --model.norm_epsilon 1e-6",
            "model.norm_epsilon is 1e-05 there and 1e-06 here, model.qk",
        ),
        ("", None),
        ("--model.dropout 0.1 --model.recompute full --model.head_dim 12 --model.attention.implementation xla", None),
    ],
)
def test_settings_of_another_model(flags: str, said: str | None, tmp_path: Path):
    config = configuration("--checkpoint.initialize_from", weights(tmp_path / "dense"), *flags.split())
    if said is None:
        check_beginning(config)
        return
    with pytest.raises(UserError) as error:
        check_beginning(config)
    assert said in str(error.value)


@pytest.mark.parametrize("kind", ["weights", "run"])
def test_what_may_be_missing_or_left_over(kind: str, tmp_path: Path):
    # of a tied model one with a head of its own and without norms of queries and keys
    source = weights(tmp_path / "dense", "qwen3")
    if kind == "run":
        moved = run_main(converting.main, ["--from", source, "--to", tmp_path / "run", "--data.sequence_length", 16])
        assert moved.code == 0, moved
    start = tmp_path / "run" if kind == "run" else source
    words = ["--checkpoint.initialize_from", start, "--model.tied_head", "false", "--model.qk_norm", "false"]

    def begun(*allowed: str):
        config = configuration(*words, "--data.sequence_length", 16, *allowed)
        check_beginning(config)
        session = make_session(config, jax.devices()[:2])
        state, origin = begin(session, "")
        return state.params, origin["initialized_from"]

    norms = "self_attn.?_norm.weight" if kind == "weights" else "*.attention.*_norm.scale"
    missing, unused = ("--checkpoint.allow_missing", "head.*"), ("--checkpoint.allow_unused", f"*{norms}")
    params, origin = begun(*missing, *unused)
    assert origin["drawn"] == ["head.table"]
    drawn, table = np.asarray(params["head"]["table"]), np.asarray(params["embedding"]["table"])
    assert 0.01 < drawn.std() < 0.03 and not np.array_equal(drawn, table)
    fixture = fixtures.load("qwen3").weights["model.embed_tokens.weight"]
    assert np.array_equal(table[: len(fixture)], fixture)
    for allowed, said in (
        ((), "is of another model: model.qk_norm is true there and false here, model.tied_head is true"),
        (missing, "has no place for "),
        (unused, "needs head.table, not there"),
        (
            (*missing, "--checkpoint.allow_missing", "embedding.*", *unused),
            "'embedding.*' allows nothing, for embedding",
        ),
        (
            (*missing, *unused, "--checkpoint.allow_unused", "foot"),
            "checkpoint.allow_unused 'foot' allows nothing, for",
        ),
    ):
        with pytest.raises(UserError) as error:
            begun(*allowed)
        assert said in str(error.value) and "\n" not in str(error.value), error
    # what is in both must be as large
    with pytest.raises(UserError, match="of shape|has shape"):
        begun(*missing, *unused, "--model.mlp_size", "48")


def test_a_plan_is_of_the_model_that_the_run_would_begin_with(tmp_path: Path):
    words = ["--checkpoint.initialize_from", weights(tmp_path / "dense")]
    planned = run_main(planning.main, [*words, "--print_config"])
    assert planned.code == 0 and "hidden_size: 32\n" in planned.out and "base: 500.0\n" in planned.out, planned
    ended = run_main(planning.main, [*words, "--layout", "--model.hidden_size", 64])
    assert ended.code == 2 and "model.hidden_size is 32 there and 64 here" in ended.err, ended


def test_what_cannot_begin_a_run(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    hub = weights(tmp_path / "hub")
    for path in hub.glob("*.safetensors"):
        path.write_bytes(b"")
    # only flags, so that the model is the default's
    for name, said in (
        ("nowhere", "is no directory"),
        ("empty", "has neither config.yaml nor config.json"),
        ("hub", "no whole"),
    ):
        run = tmp_path / f"run_{name}"
        ended = train(tmp_path, "--checkpoint.initialize_from", tmp_path / name, "--run.directory", run)
        assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1, ended
        assert not run.exists()


@pytest.mark.slow
def test_trainings_that_begin_with_weights_and_with_a_run(tmp_path: Path):
    source, first, second = weights(tmp_path / "dense"), tmp_path / "first", tmp_path / "second"
    flags = ["--checkpoint.initialize_from", source, "--run.directory", first, "--mesh.tensor", 2]
    ended = train(tmp_path, *flags)
    assert (ended.code, ended.err) == (0, "") and f"of {source}" in ended.out, ended
    (entry,) = (json.loads(line) for line in (first / "history.jsonl").read_text().splitlines())
    assert entry["initialized_from"] == {"weights": str(source)} and entry["step"] == 0
    # the run has a checkpoint now, so that it needs the weights no more, nor flags of the model
    source.rename(tmp_path / "moved")
    (tmp_path / "moved" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    more = ["--train.steps", 3, "--data.tokenizer", tmp_path / "tokenizer.json"]
    again = run_main(training.main, [first / "config.yaml", *more])
    assert again.code == 0 and "checkpoint of step 2 found: continuing" in again.out, again
    # another run begins with its model, with a head alone that is trained
    then = ["--checkpoint.initialize_from", first, "--run.directory", second, "--train.trainable", "head.*"]
    ended = train(tmp_path, *then, "--mesh.fsdp", 4)
    assert ended.code == 0 and f"the model is that of step 3 of {first}" in ended.out, ended
    (entry,) = (json.loads(line) for line in (second / "history.jsonl").read_text().splitlines())
    assert entry["initialized_from"] == {"run": str(first), "step": 3}
    losses = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"] for run in (first, second)]
    assert losses[1] < losses[0] + 0.05
