"""The benchmarks of mixtures: the dense model beside one, and what a picture of their losses shows."""

from pathlib import Path

import pytest

from benchmarks import expert_speed, upcycling
from jaxtron.config import load
from jaxtron.models.decoder.cost import model_flops_per_token
from jaxtron.run.configuration import Configuration

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("name", ["moe_tiny", "mixtral_8x22b", "qwen2_57b_a14b"])
def test_the_dense_model_beside_a_mixture_has_its_flops(name: str):
    config = load(Configuration, CONFIGS / f"{name}.yaml").resolved()
    model, length = config.model, config.data.sequence_length
    dense = expert_speed.dense_model(model)
    assert "E" not in dense.pattern and dense.num_layers == model.num_layers
    # all but the choice: a product with the router, and with a shared gate
    choice = 6 * model.hidden_size * (model.moe.num_experts + model.moe.shared_gate) * model.num_layers
    more = model_flops_per_token(model, length) - model_flops_per_token(dense, length)
    assert more == pytest.approx(choice)


def test_a_picture_of_losses_by_tokens():
    run = {"validation_losses": {50: 2.0, 100: 1.5}}
    result = {"tokens_per_step": 1536, "first": run, "runs": {"dense": run, "E8G1T2": run}}
    assert upcycling.drawn(result).startswith(b"\x89PNG")
