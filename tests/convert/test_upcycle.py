"""`python -m jaxtron.convert upcycle`: the mixture computes what the dense model did, and is trained on."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.config import dump, load
from jaxtron.convert import __main__ as convert
from jaxtron.convert.request import UpcycleRequest, parse, read_configuration
from jaxtron.convert.upcycle import expert_inputs, expert_outputs, output_factor, router_rows, scales
from jaxtron.evaluate import __main__ as evaluating
from jaxtron.layers.config import GATED, Activation
from jaxtron.layers.mlp import FUNCTIONS, gated
from jaxtron.run.configuration import Configuration
from jaxtron.train import __main__ as training
from tests.support.commands import Ended, run_main
from tests.support.evaluate_runs import SMALL, figures

EMBED, WIDTH, TOKENS = 16, 32, 50


def mlps(x: jax.Array, up: jax.Array, down: jax.Array, activation: Activation) -> jax.Array:
    """Of MLPs with first matrices [N, E, G, F], what each makes of each token [T, N, E]."""
    hidden = jnp.einsum("te,negf->tngf", x, up)
    first = hidden[:, :, 0]
    inner = gated(activation, first, hidden[:, :, 1]) if activation in GATED else FUNCTIONS[activation](first)
    return jnp.einsum("tnf,nfe->tne", inner, down)


def mixture(x: jax.Array, request: UpcycleRequest, activation: Activation, arrays: tuple) -> jax.Array:
    """A plain mixture: every expert of every token, then those that the router takes."""
    router, up, down = arrays
    logits = x @ router
    chosen = np.argsort(-np.asarray(logits), axis=-1, kind="stable")[:, : request.chosen]
    taken = jnp.take_along_axis(logits, chosen, -1)
    scores = jnp.take_along_axis(jax.nn.softmax(logits, -1), chosen, -1)
    weights = jax.nn.softmax(taken, -1) if request.scores == "topk_softmax" else scores
    every = mlps(x, up, down, activation)
    return jnp.einsum("tk,tke->te", weights, jnp.take_along_axis(every, chosen[..., None], 1))


@pytest.mark.parametrize("scores", ["softmax", "topk_softmax"])
@pytest.mark.parametrize(
    ("activation", "experts", "granularity", "top_k"),
    [
        *((name, 3, 4, 4) for name in ("gelu", "relu", "swiglu", "clamped_swiglu")),
        ("squared_relu", 8, 1, 2),
        ("squared_relu", 8, 8, 16),
        ("swiglu", 8, 1, 2),
    ],
)
def test_a_mixture_computes_what_the_mlp_did(
    activation: Activation, experts: int, granularity: int, top_k: int, scores: str
):
    request = UpcycleRequest(
        Path("run"), Path("new"), experts=experts, granularity=granularity, top_k=top_k, scores=scores
    )
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        is_gated = activation in GATED
        up = jnp.asarray(random.normal(size=(EMBED, 2, WIDTH) if is_gated else (EMBED, WIDTH)))
        down, x = jnp.asarray(random.normal(size=(WIDTH, EMBED))), jnp.asarray(random.normal(size=(TOKENS, EMBED)))
        # softmax over all is exact where logits are 0; ties go to the first, as in the router
        std = 1e-9 if scores == "softmax" else 1.0
        drawn = jnp.asarray(random.normal(size=(EMBED, request.num_experts))) * std
        factors = scales(activation, output_factor(request))
        of_all = {"copies": experts, "shards": granularity}
        arrays = (
            router_rows(drawn, **of_all),
            expert_inputs(up, **of_all, gated=is_gated, factor=factors[0]),
            expert_outputs(down, **of_all, factor=factors[1]),
        )
        expected = mlps(x, (up if is_gated else up[:, None])[None], down[None], activation)[:, 0]
        found = mixture(x, request, activation, arrays)
        assert float(jnp.abs(found - expected).max() / jnp.abs(expected).max()) < 1e-6


def test_factors_of_the_paper():
    paper = UpcycleRequest(Path("run"), Path("new"), experts=8, granularity=8, top_k=8)
    # equation 2 of 2410.07524 for squared ReLU: (E G^2 / T)^(1/3) on both matrices
    assert scales("squared_relu", output_factor(paper)) == pytest.approx((4.0, 4.0))
    assert output_factor(UpcycleRequest(Path("run"), Path("new"), scores="topk_softmax")) == 1


def test_experts_lie_in_the_order_of_the_paper():
    up = jnp.arange(6.0).reshape(1, 6)
    found = expert_inputs(up, copies=2, shards=3, gated=False, factor=1.0)[:, 0, 0]
    assert found.tolist() == [[0, 1], [2, 3], [4, 5]] * 2
    assert router_rows(jnp.arange(6.0)[None], copies=2, shards=3).tolist() == [[0, 0, 0, 1, 1, 1]]


def test_rows_of_several_layers_are_each_their_own():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2, 6)), jnp.float32)
    of_all = {"copies": 2, "shards": 3, "gated": True, "factor": 2.0}
    each = jnp.stack([expert_inputs(layer, **of_all) for layer in kernel])
    assert (expert_inputs(kernel, **of_all) == each).all()
    down = kernel[:, :, 0].swapaxes(1, 2)
    each = jnp.stack([expert_outputs(layer, copies=2, shards=3, factor=2.0) for layer in down])
    assert (expert_outputs(down, copies=2, shards=3, factor=2.0) == each).all()


DENSE = (
    "--model.bias",
    "false",
    "--model.activation",
    "swiglu",
    "--model.mlp_size",
    "64",
    "--optimizer.clip_norm",
    "1",
)


def upcycle(*words: object) -> Ended:
    return run_main(convert.main, ("upcycle", *words))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of four steps on eight devices."""
    folder = tmp_path_factory.mktemp("dense")
    (folder / "text.txt").write_text("the cat sat on a mat and ran off to see what made such noise\n" * 60)
    places = {"run.directory": "run", "data.path": "text.txt", "data.cache_directory": "tokens"}
    flags = [word for name, place in places.items() for word in (f"--{name}", folder / place)]
    ended = run_main(training.main, [*SMALL, *DENSE, *flags])
    assert ended.code == 0, ended
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "mesh"),
    [
        (("--granularity", 4, "--scores", "topk_softmax"), {"data": 4, "tensor": 2, "expert": 4}),
        (("--experts", 4, "--router_std", 1e-7), {"data": 2, "pipe": 2, "fsdp": 2}),
    ],
)
def test_a_mixture_scores_as_its_dense_model_and_is_trained(dense: Path, flags: tuple, mesh: dict, tmp_path: Path):
    layout = [word for name, size in mesh.items() for word in (f"--mesh.{name}", size)]
    if "pipe" in mesh:
        layout += ["--train.microbatches", 2]
    made = upcycle(dense, "--output", tmp_path / "mixture", *flags, *layout)
    assert (made.code, made.err) == (0, ""), made
    text = dense.parent / "text.txt"
    before, after = (figures(tmp_path, run, "--text", text) for run in (dense, tmp_path / "mixture"))
    assert (before["step"], after["step"]) == (4, 0)
    assert after["nll_per_token"] == pytest.approx(before["nll_per_token"], rel=1e-6)
    history = [json.loads(line) for line in (tmp_path / "mixture" / "history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history] == [0]
    told = history[0]["upcycled"]
    assert (told["run"], told["step"], told["top_k"]) == (str(dense), 4, 4 if "--granularity" in flags else 2)
    assert history[0]["changes"]["model.pattern"] == ["*-", "*E"] and "run.directory" not in history[0]["changes"]
    ended = run_main(training.main, [tmp_path / "mixture" / "config.yaml"])
    assert ended.code == 0 and "checkpoint of step 0 found: continuing" in ended.out, ended
    lines = [json.loads(line) for line in (tmp_path / "mixture" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4 and lines[-1]["loss"] < before["nll_per_token"]
    # training adds its own line and keeps that
    later = [json.loads(line) for line in (tmp_path / "mixture" / "history.jsonl").read_text().splitlines()]
    assert later[0] == history[0] and len(later) == 2 and "upcycled" not in later[1]


# what a process runs that is killed where the checkpoint is whole and nothing tells yet of what it is
KILLED = """
import os, signal, sys
from jaxtron.convert import __main__ as convert, upcycle
upcycle.write_record = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
convert.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_kill_before_the_end_leaves_what_no_command_takes_for_a_run(dense: Path, tmp_path: Path):
    output = tmp_path / "mixture"
    words = ["upcycle", str(dense), "--output", str(output), "--devices", "1", "--mesh.data", "1"]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done
    assert [path.name for path in output.glob("checkpoints/*")] == ["step_00000000"]
    assert not (output / "config.yaml").exists() and not (output / "history.jsonl").exists()
    again = upcycle(*words[1:])
    assert again.code == 2 and f"{output} has checkpoints and no config.yaml" in again.err, again
    assert again.err.count("\n") == 1 and "remove it" in again.err
    # neither training nor scoring begins with what is there
    for main in (training.main, evaluating.main):
        ended = run_main(main, [output / "config.yaml"] if main is training.main else [output, "--text", __file__])
        assert ended.code == 2 and "config.yaml" in ended.err and ended.err.count("\n") == 1, ended


def a_config(folder: Path, *flags: str) -> Path:
    """A directory as a run leaves it, without checkpoints."""
    folder.mkdir()
    config = load(Configuration, None, ["--data.path", str(folder / "text.txt"), *flags])
    (folder / "config.yaml").write_text(dump(config.resolved()))
    return folder


@pytest.mark.parametrize(
    ("model", "flags", "said"),
    [
        ((), "", "has model.bias true, and its biases cannot become those of experts: train with --model.bias false"),
        (("--model.bias=false",), "--granularity 7", "--granularity 7: model.mlp_size "),
        (("--model.bias=false",), "--granularity 4 --top_k 6", "--top_k 6 is not a multiple of --granularity 4"),
        (("--model.bias=false",), "--experts 2 --top_k 4", "--top_k 4 is more than the 2 experts of --experts 2"),
        (("--model.bias=false",), "--model.hidden_size 64", "--model.hidden_size is not for this command: leave it"),
        (("--model.bias=false",), "--model.moe.top_k 2", "--model.moe.top_k is not for this command: give --top_k"),
        (("--model.bias=false",), "--run.directory x", "--run.directory is not for this command: give --output"),
        (("--model.bias=false",), "--router_std 0", "--router_std: '0' must be a number above 0"),
        (("--model.bias=false", "--model.pattern=*E"), "", "only a model with MLPs (-) and no experts (E)"),
        (("--model.bias=false", "--train.trainable=head.*"), "", "only a run that trains all"),
        (("--model.bias=false",), "", "no checkpoint in "),
    ],
)
def test_what_cannot_be_is_told_in_a_line(model: tuple, flags: str, said: str, tmp_path: Path):
    run = a_config(tmp_path / "run", *model)
    (tmp_path / "run" / "text.txt").write_text("the cat sat on a mat\n" * 200)
    ended = upcycle(run, "--output", tmp_path / "new", *flags.split())
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1, ended
    assert not (tmp_path / "new").exists()


def test_a_path_that_is_no_run_and_an_output_that_is_there(tmp_path: Path):
    (tmp_path / "model.safetensors").write_text("weights")
    ended = upcycle(tmp_path, "--output", tmp_path / "new")
    assert f"{tmp_path} has no config.yaml; give the --run.directory of a training" in ended.err
    run = a_config(tmp_path / "run", "--model.bias=false")
    ended = upcycle(run, "--output", tmp_path)
    assert f"--output {tmp_path} is not empty; give a new directory" in ended.err
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    ended = upcycle(run, "--output", tmp_path / "half")
    assert ended.code == 2 and "has checkpoints and no config.yaml" in ended.err and ended.err.count("\n") == 1


def test_what_the_dense_run_began_with_is_not_the_mixtures(tmp_path: Path):
    run = a_config(tmp_path / "run", "--model.bias=false", "--checkpoint.initialize_from", str(tmp_path / "weights"))
    dense, mixture = read_configuration(parse([str(run), "--output", str(tmp_path / "new")]))
    assert dense.checkpoint.initialize_from and mixture.checkpoint.initialize_from is None


def test_experts_of_a_token_where_nothing_is_said():
    assert parse(["run", "--output", "new"]).chosen == 2
    assert parse(["run", "--output", "new", "--granularity", "4"]).chosen == 4
    assert parse(["run", "--output", "new", "--experts", "1"]).chosen == 1
