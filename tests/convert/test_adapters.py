"""Adapters of a run in peft's files, and a run that begins with them."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtron.config import load
from jaxtron.convert import __main__ as convert
from jaxtron.run.configuration import Configuration
from jaxtron.run.restored import restore_model
from jaxtron.run.session import make_session
from jaxtron.train.initial import begin
from tests.convert.test_upcycle_weights import weights
from tests.support.commands import run_main
from tests.support.equivalence import by_name
from tests.train.test_initial import configuration, train


@pytest.mark.slow
def test_a_run_with_adapters_goes_on_elsewhere_and_its_adapters_go_to_peft_and_back(tmp_path: Path):
    source, run, peft = weights(tmp_path / "dense"), tmp_path / "run", tmp_path / "peft"
    lora = ["--train.lora.rank", 4, "--train.lora.alpha", 8, "--optimizer.learning_rate", 0.01]
    begun = ["--checkpoint.initialize_from", source, "--run.directory", run]
    ended = train(tmp_path, *begun, *lora, "--mesh.tensor", 2)
    assert (ended.code, ended.err) == (0, ""), ended
    # two more steps on another mesh, where the weights are not needed
    ended = train(tmp_path, *begun, *lora, "--mesh.pipe", 2, "--train.microbatches", 2, "--train.steps", 4)
    assert ended.code == 0 and "checkpoint of step 2 found: continuing" in ended.out, ended
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    ended = run_main(convert.main, ["adapters", run, "--base", source, "--output", peft])
    assert (ended.code, ended.err) == (0, "") and "6 kinds of layers of step 4" in ended.out, ended
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
