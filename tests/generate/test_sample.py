"""Samples: the same text on every mesh and on any stages."""

import jax
import numpy as np
import pytest

from jaxtron.generate.sample import sample
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.families import program_of
from jaxtron.models.program import make_parts
from jaxtron.optim.config import OptimizerConfig
from jaxtron.pipeline.partition import Partition, StagePlan
from jaxtron.pipeline.schedules.schedule import one_stage
from jaxtron.run.configuration import TrainConfig
from jaxtron.run.step import Trainer
from jaxtron.sharding.config import MeshConfig, ShardingConfig
from jaxtron.sharding.mesh import build_mesh
from jaxtron.sharding.rules import make_rules, use

WINDOW, VOCAB = 16, 50
# large weights: text that depends on the prompt and the layers
MODEL = ModelConfig(
    num_layers=5,
    hidden_size=16,
    num_heads=2,
    vocab_size=VOCAB,
    vocab_multiple=32,
    max_positions=WINDOW,
    initial_std=0.6,
)


@pytest.fixture(scope="module")
def one_device_rules():
    return make_rules(build_mesh(MeshConfig(data=1), jax.devices()[:1]), ShardingConfig())


def text(rules, partition: Partition, prompt: np.ndarray) -> list[int]:
    with use(rules):
        stages = StagePlan((partition,))
        trainer = Trainer(
            program=program_of(MODEL),
            parts=make_parts(MODEL, "float32", stages),
            stages=stages,
            config=TrainConfig(precision="fp32"),
            optimizer=OptimizerConfig(),
            schedule=one_stage,
            seed=1,
        )
        params = trainer.blueprint.initialize(jax.random.key(1))
        return sample(trainer, params, prompt, num_tokens=12, window=WINDOW, vocab=VOCAB, temperature=0.5).tolist()


# longer than the window at the end of the sample
PROMPT = np.arange(10)


@pytest.fixture(scope="module")
def expected(one_device_rules) -> list[int]:
    """What one device says."""
    return text(one_device_rules, Partition((5,)), PROMPT)


@pytest.mark.parametrize(
    ("partition", "mesh"),
    [
        pytest.param(Partition((5,)), {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        (Partition((1, 2, 1, 1), num_stages=2), {"pipe": 2}),
        pytest.param(
            Partition((1, 2, 1, 1), num_stages=2, placement="v_shape"), {"pipe": 2, "data": 2}, marks=pytest.mark.slow
        ),
        (Partition((1, 1, 1, 2), num_stages=4), {"pipe": 4, "tensor": 2}),
    ],
    ids=["no stages", "chunks", "v_shape", "with tensor"],
)
def test_the_same_text_everywhere(rules_for, expected, partition, mesh):
    assert len(set(expected)) > 3 and all(0 <= token < VOCAB for token in expected)
    assert text(rules_for(**mesh), partition, PROMPT) == expected
