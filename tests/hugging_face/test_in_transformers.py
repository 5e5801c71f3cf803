"""What is exported is a model of transformers': every name in place, its logits, and the same greedy text; and adapters
of a training are peft's.

It needs PyTorch, transformers and peft, `pip install -e ".[test,transformers]"`, or another Python that has them, whose
path the variable JAXTRON_TRANSFORMERS has. The rest of the suite needs none of them.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from jaxtron.convert import __main__ as convert
from jaxtron.evaluate import __main__ as evaluate
from jaxtron.sharding.rules import Rules, use
from tests.convert.test_transfer import NAMES, moved, source
from tests.convert.test_upcycle_weights import weights
from tests.hugging_face import fixtures
from tests.hugging_face.test_parity import WIDER, of_fixture
from tests.support.commands import run_main
from tests.support.logits import logits
from tests.train.test_initial import train

SCRIPT = Path(__file__).with_name("in_transformers.py")
PACKAGES = ("torch", "transformers", "peft")
COUNT = 8
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Answer:
    """What transformers found in a directory."""

    wrong: dict[str, list[str]]
    logits: np.ndarray
    text: np.ndarray


def python() -> str:
    """One that has the packages."""
    if given := os.environ.get("JAXTRON_TRANSFORMERS"):
        return given
    if not all(importlib.util.find_spec(name) for name in PACKAGES):
        pytest.skip('torch, transformers and peft are not here: pip install -e ".[test,transformers]"')
    return sys.executable


def answers(directories: dict[str, Path]) -> dict[str, Answer]:
    """Of directories with their rows of ids beside them, in one process: its imports take longest."""
    found = {}
    # no user's site: packages of another Python
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python(), str(SCRIPT), str(COUNT), *map(str, directories.values())]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    for name, directory in directories.items():
        with np.load(f"{directory}.npz") as file:
            found[name] = Answer(json.loads(str(file["wrong"])), file["logits"], file["text"])
    return found


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """Of every family: weights that became a run, and became weights again."""
    python()
    folder, written = tmp_path_factory.mktemp("exports"), {}
    for name in NAMES:
        hub, run, back = (folder / kind / name for kind in ("hub", "runs", "back"))
        source(hub, name)
        moved("--from", hub, "--to", run, "--data.sequence_length", 16)
        moved("--from", run, "--to", back)
        np.save(f"{back}.npy", fixtures.load(name).tokens)
        written[name] = back
    return answers(written)


@pytest.mark.parametrize("name", NAMES)
def test_an_export_is_that_model_and_says_the_same(
    name: str, there: dict[str, Answer], rules_for: Callable[..., Rules], tmp_path: Path
):
    fixture, found = fixtures.load(name), there[name]
    assert not found.wrong
    np.testing.assert_allclose(found.logits, fixture.logits, rtol=0, atol=WIDER.get(name, 2e-5))
    # ours, of the tokens before and those that it chose: each is the likeliest after those before it
    tokens = np.concatenate([fixture.tokens, found.text], 1)
    with use(rules_for(data=1)):
        trainer, params = of_fixture(replace(fixture, tokens=tokens), tmp_path / "weights")
        ours = logits(trainer, params, tokens)[:, -COUNT - 1 : -1, : fixture.logits.shape[-1]]
    np.testing.assert_array_equal(ours.argmax(-1), found.text)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_of_a_training_are_adapters_of_peft(name: str, tmp_path: Path):
    python()
    base, run = weights(tmp_path / "base", name), tmp_path / "run"
    lora = ["--train.lora.rank", 3, "--train.lora.alpha", 6, "--optimizer.learning_rate", 0.01]
    begun = ["--checkpoint.initialize_from", base, "--run.directory", run]
    ended = train(tmp_path, *begun, *lora, "--mesh.tensor", 2, "--train.precision", "fp32")
    assert (ended.code, ended.err) == (0, ""), ended
    ended = run_main(convert.main, ["adapters", run, "--base", base, "--output", f"{base}.peft"])
    assert (ended.code, ended.err) == (0, ""), ended
    tokens, said = fixtures.load(name).tokens, []
    (tmp_path / "rows.json").write_text(json.dumps(tokens.tolist()))
    for model in (base, run):
        said.append(tmp_path / f"{model.name}.npy")
        rows = ["--token_ids", tmp_path / "rows.json", "--logits", said[-1]]
        ended = run_main(evaluate.main, [model, *rows, "--train.precision", "fp32"])
        assert (ended.code, ended.err) == (0, ""), ended
    before, trained = map(np.load, said)
    np.save(f"{base}.npy", tokens)
    found = answers({name: base})[name]
    assert not found.wrong
    assert np.abs(trained - before).max() > 1e-2
    np.testing.assert_allclose(found.logits, trained[..., : found.logits.shape[-1]], rtol=0, atol=1e-4)
