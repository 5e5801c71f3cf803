"""Memory by formula against the shapes of the real step, and against what was compiled."""

import dataclasses
import math
from pathlib import Path

import jax
import pytest

from jaxtron.config import UserError, load
from jaxtron.gpus import gpu_named
from jaxtron.pipeline.lowering import lower
from jaxtron.pipeline.schedules.named import SCHEDULES, make_schedule
from jaxtron.plan.compiled.deviceless import Memory
from jaxtron.plan.compiled.memory import memory_use
from jaxtron.plan.compiled.rehearsal import rehearse
from jaxtron.plan.formula.memory_model import Estimator, shortened
from jaxtron.plan.search.search import MARGIN
from jaxtron.run.batches import abstract_batch
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import make_session

A100 = gpu_named("a100")
CONFIGS = Path(__file__).parents[2] / "configs"
GIB = 2**30
SMALL = "--model.num_layers 6 --model.hidden_size 64 --model.num_heads 4 --model.vocab_size 512 --mesh.data -1 "
SMALL += "--train.global_batch 16 --data.sequence_length 32 "
DROPOUT = "--model.dropout 0.1 --model.attention_dropout 0.1 "
GATED = (
    "--model.activation swiglu --model.norm rms_norm --model.position rotary --model.num_kv_heads 2 --model.bias false "
)
GATED += "--model.tied_head false --model.mlp_size 128 "
# what shapes decide: all but temporaries, reserve and the communication's buffers
SHAPED = ("master_weights", "optimizer", "frozen", "weights", "gradients", "activations", "messages", "batch")


def configuration(flags: str, path: Path | None = None) -> Configuration:
    return load(Configuration, path, flags.split()).resolved()


@pytest.mark.parametrize(
    "flags",
    [
        "--mesh.tensor 4 --sharding.zero none",
        "--mesh.tensor 2 --sharding.zero optimizer --train.microbatches 2 " + DROPOUT,
        "--mesh.tensor 2 --sharding.zero parameters --model.recompute selective",
        "--mesh.fsdp 2 --mesh.tensor 2 --train.precision fp32 --model.recompute full",
        "--mesh.fsdp 4 --train.microbatches 2 --optimizer.name sgd " + GATED,
        "--mesh.context 2 --mesh.tensor 2 --train.microbatches 2",
        "--mesh.data 2 --mesh.fsdp 2 --mesh.context 2 --sharding.zero parameters --model.recompute full",
        "--mesh.context 4 --context.method all_to_all --model.dropout 0.1 --train.microbatches 2",
        "--mesh.tensor 4 --optimizer.name sgd --optimizer.momentum 0 " + GATED,
        # sizes that neither fsdp 2 x data 2 nor data 4 x context 2 divide: padding is counted
        "--mesh.fsdp 2 --mesh.tensor 2 --model.hidden_size 62 --model.head_dim 15 --model.mlp_size 90",
        "--mesh.context 2 --model.hidden_size 61 --model.head_dim 15 --model.mlp_size 90 --model.max_positions 33",
        "--mesh.pipe 2 --mesh.tensor 2 --train.microbatches 8 " + DROPOUT,
        "--mesh.pipe 2 --mesh.fsdp 2 --train.microbatches 4 --pipeline.schedule interleaved --pipeline.chunks 3",
        "--mesh.pipe 2 --train.microbatches 4 --pipeline.schedule zero_bubble --sharding.zero none " + DROPOUT,
        "--mesh.pipe 2 --train.microbatches 4 --pipeline.schedule zero_bubble_v --pipeline.chunks 2 " + GATED,
        "--mesh.fsdp 2 --mesh.tensor 2 --train.trainable *norm* *.bias",
        "--mesh.pipe 2 --mesh.fsdp 2 --train.microbatches 4 --sharding.zero parameters --train.trainable !*.mlp.*",
        "--mesh.fsdp 2 --mesh.tensor 2 --train.microbatches 2 --train.lora.rank 4 " + GATED,
    ],
)
def test_classes_are_those_of_the_real_step(flags: str):
    config = configuration(SMALL + flags)
    session = make_session(config, jax.devices()[:8])
    with session.use():
        trainer, batch = session.trainer, abstract_batch(session.config)
        arguments = 0
        for leaf in jax.tree.leaves((trainer.abstract_state(), batch)):
            shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
            arguments += math.prod(shape) * leaf.dtype.itemsize
        compiled = Memory(arguments=arguments, outputs=0, aliases=0, temporaries=0)
        real = memory_use(trainer, batch, compiled, A100, 1)
    found = Estimator(config).memory(config, session.sizes, A100)
    assert {name: getattr(found, name) for name in SHAPED} == {name: getattr(real, name) for name in SHAPED}
    # how many sets of GPUs communicate is not known before, but what there is beside JAX's pool is
    assert found.reserve + found.communication == real.reserve + real.communication
    assert found.capacity == real.capacity and found.temporaries > 0


def test_one_estimator_serves_all_layouts_of_a_model():
    first = configuration(SMALL + "--mesh.tensor 2")
    sizes = {"pipe": 1, "data": 4, "fsdp": 1, "context": 1, "tensor": 2}
    estimator = Estimator(first)
    for flags in ("--model.recompute full", "--sharding.zero none --train.microbatches 4"):
        config = configuration(SMALL + flags)
        assert estimator.memory(config, sizes, A100) == Estimator(config).memory(config, sizes, A100)


@pytest.mark.parametrize("name", SCHEDULES)
def test_short_schedules_need_as_many_slots_as_long_ones(name: str):
    base = configuration(SMALL)
    for stages, count, chunks in ((2, 9, 1), (2, 12, 2), (3, 11, 1), (3, 12, 2), (3, 11, 2), (4, 16, 3)):
        pipeline = base.pipeline.model_copy(update={"schedule": name, "chunks": chunks})
        train = base.train.model_copy(update={"microbatches": count})
        config = base.model_copy(update={"pipeline": pipeline, "train": train})
        try:
            whole = lower(make_schedule(name, stages, count, chunks))
        except UserError:
            continue
        less = shortened(config, stages).train.microbatches
        short = lower(make_schedule(name, stages, less, chunks))
        for buffer in ("num_residuals", "num_deferred", "num_inputs", "num_cotangents"):
            assert getattr(short, buffer) == getattr(whole, buffer), (stages, count, chunks)
        # a table of gpipe holds all microbatches, and one with a rest in interleaved groups is another
        assert less < count or name == "gpipe" or (name == "interleaved" and count % stages)


# GiB of temporaries in steps that were compiled with JAX 0.11.2 for A100s, H200s for gpt_1b (2026-11-27).
TENSOR_4 = "--mesh.tensor 4 --mesh.data 2"
COMPILED = [
    ("gpt_1b", "", 2.00),
    ("gpt_1b", "--train.microbatches 32", 0.78),
    ("gpt_22b", "", 1.17),
    ("gpt_22b", "--train.microbatches 4", 1.23),
    ("gpt_22b", "--model.recompute full", 1.14),
    ("gpt_22b", "--model.recompute none", 1.94),
    ("gpt_22b", f"{TENSOR_4} --sharding.zero none", 0.57),
    ("gpt_22b", f"{TENSOR_4} --sharding.zero optimizer", 0.58),
    ("gpt_22b", f"{TENSOR_4} --sharding.zero parameters", 5.52),
    ("gpt_22b", "--mesh.tensor 2 --mesh.fsdp 4", 6.46),
    ("gpt_22b", "--mesh.tensor 4 --mesh.pipe 2 --train.microbatches 4", 2.48),
    ("gpt_22b", "--mesh.tensor 4 --mesh.pipe 2 --train.microbatches 4 --pipeline.schedule zero_bubble", 3.57),
    ("gpt_22b", "--mesh.tensor 2 --mesh.pipe 2 --mesh.data 2 --train.microbatches 2 --sharding.zero optimizer", 13.85),
    ("gpt_175b", "", 5.35),
    ("gpt_175b", "--model.recompute full", 1.67),
    ("gpt_175b", "--pipeline.schedule 1f1b --pipeline.chunks 1", 4.34),
    ("gpt_175b", "--pipeline.schedule zero_bubble_v --pipeline.chunks 2", 0.53),
    ("gpt_530b", "", 1.42),
    ("gpt_1t", "", 1.77),
]


def own_sizes(config: Configuration) -> dict[str, int]:
    """Of the configuration's mesh, by flag."""
    return {axis: max(1, getattr(config.mesh, axis)) for axis in ("pipe", "data", "fsdp", "context", "tensor")}


@pytest.mark.parametrize("name", dict.fromkeys(name for name, *_ in COMPILED))
def test_temporaries_are_near_those_of_compiled_steps(name: str):
    path = CONFIGS / f"{name}.yaml"
    estimator = Estimator(configuration("", path))
    for flags, temporaries in ((flags, found) for recipe, flags, found in COMPILED if recipe == name):
        config = configuration(flags, path)
        sizes = own_sizes(config)
        found = estimator.memory(config, sizes, A100)
        # a search leaves what is so near the limit to the compiler
        assert abs(found.temporaries / GIB - temporaries) < MARGIN * A100.memory_bytes / GIB, flags


# GiB of temporaries where the largest weights that are gathered once a step are the most of them, there a second time
# while they are put in order (the formula is up to 2.4% above); compiled with JAX 0.11.2 for the configurations' H100s
# (2026-11-27).
ARRIVING = {"yi_34b": 4.088, "llama_2_70b": 2.188, "llama_2_13b": 2.598, "llama_2_7b": 2.626, "mamba_2.8b": 3.086}


@pytest.mark.parametrize("name", ARRIVING)
def test_weights_gathered_once_are_there_twice_at_a_step_s_beginning(name: str):
    config = configuration("", CONFIGS / f"{name}.yaml")
    sizes = own_sizes(config)
    found = Estimator(config).memory(config, sizes, gpu_named("h100"))
    assert found.temporaries / GIB == pytest.approx(ARRIVING[name], rel=0.03)


def test_the_batch_s_axes_share_any_size_and_tensor_does_not():
    config = configuration(SMALL + "--model.hidden_size 60 --sharding.zero optimizer")
    sizes = {"pipe": 1, "data": 7, "fsdp": 1, "context": 1, "tensor": 1}
    whole = Estimator(config).state(config, {**sizes, "data": 1})
    shared = Estimator(config).state(config, sizes)
    # 60 channels are padded to 63; biases and norms are whole everywhere
    assert whole.master / 7 < shared.master < 1.2 * whole.master / 7
    with pytest.raises(UserError, match="heads 4 .* mesh.tensor"):
        Estimator(config).state(config, {**sizes, "tensor": 8})


@pytest.mark.slow
def test_an_estimate_is_near_the_compiled_step():
    config = configuration("", CONFIGS / "gpt_22b.yaml")
    real = rehearse(config, gpu="a100", num_gpus=8).memory_use
    found = Estimator(config).memory(config, config.mesh.shape(8), A100)
    assert abs(found.total - real.total) < MARGIN * A100.memory_bytes
    exact = {field.name for field in dataclasses.fields(found)} - {"temporaries", "stages"}
    assert all(getattr(found, name) == getattr(real, name) for name in exact)
