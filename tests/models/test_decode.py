"""A decoder that goes on from what its layers remember, with rows and weights shared out over devices."""

import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.sharding.rules import use
from tests.support.equivalence import MODELS, changed, make_params, make_trainer, rules_for
from tests.support.logits import decoded

ROWS, PARTS = 4, (5, 1)


def model() -> ModelConfig:
    """A layer of each kind that remembers."""
    mamba = {"num_heads": 4, "head_dim": 8, "state_size": 8, "num_groups": 2}
    keys = {"linear_num_key_heads": 2, "linear_key_head_dim": 6}
    delta = {**keys, "linear_num_value_heads": 4, "linear_value_head_dim": 4}
    changes = {"pattern": "MGm(*-)", "num_layers": 1, "norm_epsilon": 0.1}
    return changed(MODELS["llama"], **changes, mamba=mamba, delta=delta)


def found(model: ModelConfig, mesh: dict[str, int], zero: str) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 60, (ROWS, sum(PARTS)), dtype=np.int32)
    with use(rules_for(mesh, zero)):
        trainer = make_trainer(model)
        return decoded(trainer, make_params(trainer), tokens, PARTS)


def test_logits_on_devices_along_data_and_fsdp_are_those_of_one():
    expected = found(model(), {}, "none")
    assert expected.shape == (ROWS, len(PARTS), 64) and np.abs(expected).max() > 0.1
    made = found(model(), {"data": 2, "fsdp": 2}, "parameters")
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("flag", ["pipe", "context", "tensor"])
def test_devices_that_would_split_a_token_are_refused(flag: str):
    with pytest.raises(UserError, match="needs --mesh.pipe 1 --mesh.context 1 --mesh.tensor 1"):
        found(MODELS["llama"], {flag: 2}, "none")
