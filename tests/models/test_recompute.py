"""Each choice of recompute does what it says: counted and weighed in the compiled program, not believed."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from jaxtron.data.config import DataConfig
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.run.batches import abstract_batch
from jaxtron.run.configuration import Configuration, TrainConfig
from jaxtron.run.session import make_trainer
from jaxtron.sharding.config import MeshConfig, ShardingConfig
from jaxtron.sharding.mesh import build_mesh
from jaxtron.sharding.rules import current, make_rules, use

LENGTH = 128
# the layers stay a loop: unrolled, the compiler may merge what is computed again with what was
CONFIG = ModelConfig(
    num_layers=3, hidden_size=32, num_heads=4, vocab_size=64, vocab_multiple=64, max_positions=LENGTH, unroll=1
)
# with and without gathers, which the layer makes again whatever is recomputed
MESHES = [{"data": 1}, {"fsdp": 2, "tensor": 2}]


class Cost(NamedTuple):
    """Matrix products in the program of loss and gradients, and its peak of temporary bytes on a device."""

    products: int
    memory: int


@functools.cache
def measure(recompute, attention="materialized", **mesh) -> Cost:
    core = CONFIG.attention.model_copy(update={"implementation": attention})
    config = CONFIG.model_copy(update={"recompute": recompute, "attention": core})
    devices = jax.devices()[: math.prod(mesh.values())]
    with use(make_rules(build_mesh(MeshConfig(**{"data": 1, **mesh}), devices), ShardingConfig())):
        train = TrainConfig(global_batch=2 * mesh.get("fsdp", 1), precision="fp32")
        run = Configuration(
            model=config, train=train, data=DataConfig(sequence_length=LENGTH), mesh=MeshConfig(**current().sizes)
        )
        trainer, batch = make_trainer(run), abstract_batch(run)
        scalars = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32))
        step = jax.jit(trainer.loss_and_gradients).lower(trainer.blueprint.abstract, batch, *scalars)
        program = step.compile()
    return Cost(program.as_text().count(" dot("), program.memory_analysis().temp_size_in_bytes)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_products_computed_again(mesh):
    none = measure("none", **mesh).products
    again = {"selective": 1, "full": 5}
    if mesh == {"data": 1}:
        # query, key and value are one product, the head's three are its forward and backward
        assert none == 3 * 6 + 3
        # all but the product back to the stream, which nothing inside needs
        again |= {("attention",): 3, ("mlp",): 1}
    assert {names: measure(names, **mesh).products - none for names in again} == again


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_memory_is_what_recompute_is_for(mesh):
    none, selective, full = (measure(recompute, **mesh).memory for recompute in ("none", "selective", "full"))
    # probabilities: rows x heads x length^2 in float32; of all three layers, or of the one that makes them again
    layer = 2 * 4 * LENGTH**2 * 4 // mesh.get("tensor", 1)
    # the compiler's own small arrays differ between the programs: by 1,216 bytes of 2 MB where it is most
    assert selective < none - 2 * layer + 4096
    assert full < selective


def test_what_keeps_no_scores_is_not_computed_again_for_them():
    none, selective, asked = (
        measure(recompute, "xla", data=1) for recompute in ("none", "selective", ("attention_core",))
    )
    assert selective == none and asked.products > none.products


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_core_that_keeps_no_scores_runs_once_where_it_is_spared(mesh):
    """The values it mixes are not mixed again; it costs its result and log-sum-exp of every layer."""
    none, spared, full = (measure(recompute, "xla", **mesh) for recompute in ("none", "all_but_cores", "full"))
    # of so short a sequence there is one tile, whose scores the compiler makes once for core and backward
    assert none.products < spared.products == full.products - 1
    kept = 3 * 2 * LENGTH * (32 + 4) * 4 // mesh.get("tensor", 1)
    assert full.memory < spared.memory < min(none.memory, full.memory + 2 * kept)


def test_a_core_that_keeps_scores_is_not_spared():
    assert measure("all_but_cores", data=1) == measure("full", data=1)


def test_what_attention_leaves_is_kept_once():
    """Its result is what its own backward reads, and the product behind it: there is no second one of each layer."""
    whole, chunked = (measure("none", attention, data=1).memory for attention in ("materialized", "xla"))
    probabilities, results = 3 * 2 * 4 * LENGTH**2 * 4, 3 * 2 * LENGTH * 32 * 4
    assert chunked < whole - probabilities + results
