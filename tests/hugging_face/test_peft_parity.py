"""A model with adapters that peft made has the logits that it has there."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxtron.config import load
from jaxtron.models.adapters import merge_adapters
from jaxtron.run.beginning import beginning_settings
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import make_session
from jaxtron.train.initial import begin
from tests.hugging_face import fixtures
from tests.support.logits import logits


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_logits_are_those_of_peft(name: str, tmp_path: Path):
    fixture = fixtures.load(name)
    base = fixtures.write(tmp_path / "base", fixture.config, fixture.weights)
    (tmp_path / "peft").mkdir()
    with np.load(fixtures.FOLDER / "adapters" / f"{name}.npz") as file:
        settings, expected = str(file["settings"]), file["logits"]
        tensors = {key.removeprefix("tensors/"): file[key] for key in file.files if key.startswith("tensors/")}
    (tmp_path / "peft" / "adapter_config.json").write_text(settings)
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    said = json.loads(settings)
    words = {
        "checkpoint.initialize_from": base,
        "checkpoint.initialize_adapters": tmp_path / "peft",
        "train.lora.rank": said["r"],
        "train.lora.alpha": said["lora_alpha"],
        "train.lora.rslora": str(said["use_rslora"]).lower(),
        "train.precision": "fp32",
        "data.sequence_length": 16,
    }
    flags = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    session = make_session(load(Configuration, None, flags, under=beginning_settings(base)), jax.devices()[:1])
    state, _ = begin(session, "")
    with session.use():
        found = logits(session.trainer, state.model, fixture.tokens)[..., : expected.shape[-1]]
        np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
        # merged, the weights alone compute it
        whole = make_session(
            load(Configuration, None, _without(flags), under=beginning_settings(base)), jax.devices()[:1]
        )
        merged = merge_adapters(session.blueprint, state.model)
    with whole.use():
        found = logits(whole.trainer, merged, fixture.tokens)[..., : expected.shape[-1]]
        np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def _without(flags: list[str]) -> list[str]:
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [word for pair in pairs if "lora" not in pair[0] and "adapters" not in pair[0] for word in pair]
