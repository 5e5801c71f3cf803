"""A kind of layer is one entry of each table by symbol: a toy kind that only this file knows is trained and planned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxtron.config import UserError
from jaxtron.gpus import gpu_named
from jaxtron.layers.inputs import LayerInputs
from jaxtron.layers.linear import Linear
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.cost import hardware_flops_per_token, model_flops_per_token, num_parameters
from jaxtron.models.decoder.kinds import KINDS, LayerKind, check_multiple
from jaxtron.models.decoder.layers import BUILDERS
from jaxtron.models.decoder.model import Decoder
from jaxtron.models.decoder.pattern import parse
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.plan.formula.layer_work import LAYER_WORK, LayerWork
from jaxtron.plan.formula.memory_model import Estimator
from jaxtron.plan.formula.pieces import period
from jaxtron.plan.formula.prediction import predict
from jaxtron.plan.formula.workload import linear, shapes_of
from jaxtron.plan.hint import first_change
from jaxtron.plan.machine import machine_named
from jaxtron.plan.profile import PROFILES
from jaxtron.plan.search.candidates import layouts
from jaxtron.run.configuration import Configuration
from jaxtron.sharding.blueprint import blueprint
from jaxtron.sharding.folding import FLAGS
from jaxtron.sharding.rules import constrain, use
from jaxtron.typing import Array, Float
from tests.support.equivalence import ONE_DEVICE, assert_equal, changed, loss_and_gradients

ONE = dict.fromkeys(FLAGS, 1)


class Wave(nnx.Module):
    """`down(sin(up(x)))`, one and a half times as wide as the stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        width = width_of(config)
        self.up = Linear({"embed": config.hidden_size}, {"mlp": width}, bias=False, std=config.initial_std, rngs=rngs)
        self.down = Linear({"mlp": width}, {"embed": config.hidden_size}, bias=False, std=config.output_std, rngs=rngs)

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        waves = jnp.sin(self.up(constrain(x, "batch", "full_seq", "embed"), "batch", "full_seq", "mlp"))
        return self.down(waves, "batch", "seq", "embed")


def width_of(config) -> int:
    return config.hidden_size * 3 // 2


WAVE = LayerKind(
    symbol="S",
    name="wave",
    module="wave",
    parameters=lambda settings, tensor: 2 * settings.hidden_size * width_of(settings) // tensor,
    flops=lambda settings, length: {"wave": 4 * settings.hidden_size * width_of(settings)},
    # the MLP reads it too: refused where neither is
    fields=("mlp_size",),
    check=lambda settings, sizes, context: check_multiple("the wave's width", width_of(settings), sizes["tensor"]),
)


def wave_work(shapes):
    hidden, width = shapes.model.hidden_size, width_of(shapes.model) / shapes.tensor
    bare = dataclasses.replace(shapes, model=shapes.model.model_copy(update={"bias": False}))
    return {"wave": linear(bare, hidden, width) + linear(bare, width, hidden)}


@pytest.fixture
def wave(monkeypatch):
    monkeypatch.setitem(KINDS, "S", WAVE)
    monkeypatch.setitem(BUILDERS, "S", lambda config, kind, backends, rngs: Wave(config, rngs))
    monkeypatch.setitem(LAYER_WORK, "S", LayerWork(wave_work))
    yield
    parse.cache_clear()


def model(**changes) -> ModelConfig:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 60, "vocab_multiple": 64}
    positions = {} if "position" in changes else {"max_positions": 16}
    return ModelConfig(**sizes | positions | changes)


def configuration(**changes) -> Configuration:
    """Of a model with these changes, and eight sequences of 16 tokens a step."""
    sections = {"data": {"sequence_length": 16}, "train": {"global_batch": 8, "microbatches": 1}}
    return Configuration.model_validate({"model": model(**changes), **sections})


def test_all_tables_have_the_same_kinds():
    assert list(KINDS) == list(BUILDERS) == list(LAYER_WORK)
    assert all(len(symbol) == 1 and kind.symbol == symbol for symbol, kind in KINDS.items())
    assert all(set(kind.selective) <= set(kind.parts) for kind in KINDS.values())


@pytest.mark.parametrize("symbol", KINDS)
def test_tables_agree_on_regions_and_products(symbol):
    """What a forward's slots run is what the papers' formulas count, region by region."""
    kind, extra = KINDS[symbol], {"attention": {"window": 4}} if KINDS[symbol].attends == "window" else {}
    config = configuration(pattern=symbol, position="none", **extra)
    for profile in PROFILES.values():
        shapes = shapes_of(config, ONE, profile, gpu_named("h100").device_kind)
        work = LAYER_WORK[symbol].slots(shapes)
        counted = kind.flops(config.model, shapes.length)
        assert set(work) == set(counted) == set(kind.regions)
        for region, flops in counted.items():
            # scores in memory are computed for the whole square, also where a window masks most
            is_whole = kind.attends == "window" and region in kind.parts and shapes.profile.attention != "fused"
            found = work[region].forward.flops
            assert found > shapes.tokens * flops if is_whole else found == pytest.approx(shapes.tokens * flops)


def test_a_third_kind_is_built_as_itself(wave, rules_for):
    config = model(pattern="(*S)-")
    with use(rules_for()):
        plan = blueprint(lambda rngs: Decoder(config, rngs=rngs))
    assert num_parameters(config, 16) == plan.num_parameters
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(plan.parameters)}
    assert any("['wave']['up']" in name for name in names) and any("['attention']" in name for name in names)


@functools.cache
def one_device(pattern: str):
    return loss_and_gradients(model(pattern=pattern), ONE_DEVICE, "none", 1, rows=8)


@pytest.mark.parametrize(
    ("pattern", "mesh", "microbatches"),
    [
        ("*S", {"pipe": 2, "data": 2, "tensor": 2}, 2),
        pytest.param("(*S)", {"fsdp": 2, "context": 2, "tensor": 2}, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_third_kind_trains_on_a_mesh(wave, pattern, mesh, microbatches):
    config = changed(model(pattern=pattern), recompute="full")
    result = loss_and_gradients(config, mesh, "optimizer", microbatches, PipelineConfig(), rows=8)
    assert result.loss == pytest.approx(one_device(pattern).loss, rel=1e-5)
    assert_equal(result.gradients, one_device(pattern).gradients)


def test_a_third_kind_is_planned(wave):
    config, sizes = configuration(pattern="*S"), ONE | {"tensor": 2, "data": 2}
    machine = machine_named("h100")
    bare = configuration(pattern="*")
    found, without = (predict(one, sizes, machine) for one in (config, bare))
    # on a device, two layers of 2 x 2 h f forward and twice that backward, for half of the rows and of the width
    more = 3 * 2 * (4 * 32 * 48) * 16 * 8 / 4
    assert found.model_flops - without.model_flops == pytest.approx(more) and found.hfu == pytest.approx(found.mfu)
    assert found.step_seconds > without.step_seconds
    full = configuration(pattern="*S", recompute="full")
    again = predict(full, sizes, machine).hardware_flops - found.hardware_flops
    counted = hardware_flops_per_token(full.model, 16) - model_flops_per_token(full.model, 16)
    assert again == pytest.approx(counted * 16 * 8 / 4)
    assert period(shapes_of(config, sizes, PROFILES["jaxtron"], "H100")).weight.products
    used, unused = (Estimator(one).memory(one, sizes, machine.datasheet) for one in (config, bare))
    # its two matrices, split in two by tensor and, at rest, by data; with two moments; and a norm of two vectors
    assert used.master_weights - unused.master_weights == 4 * 2 * (2 * 32 * 48 // 4 + 2 * 32)
    assert used.activations > unused.activations
    assert first_change(config, sizes, used)
    assert any(layout.tensor == 4 for layout in layouts(config, 8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "*X"}, r"unknown symbol 'X' \(known: .*- MLP, S wave, "),
        ({"pattern": "(SS)"}, "'S' twice in the group"),
        ({"pattern": "*", "mlp_size": 64}, r"model.mlp_size 64 has no effect .* add MLP \(-\) or wave \(S\)"),
        ({"pattern": "S", "position": "none", "recompute": "selective"}, "it has no attention_core"),
        ({"pattern": "S", "position": "rotary"}, "it has no attention"),
        (
            {"pattern": "S", "position": "none", "qk_norm": True},
            r"add attention \(\*\) or atten",
        ),
    ],
    ids=str,
)
def test_a_third_kind_in_refusals(wave, changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)


def test_a_third_kind_checks_the_mesh_itself(wave):
    assert model(pattern="*S", mlp_size=64).mlp_width == 64
    # heads, MLP and vocabulary split in four; 75 channels do not, and matter only where the kind is
    for pattern in ("*-", "*S"):
        config = configuration(pattern=pattern, hidden_size=50, head_dim=8)
        if pattern == "*-":
            config.check_mesh(ONE | {"tensor": 4})
        else:
            with pytest.raises(UserError, match="the wave's width 75 is not a multiple of mesh.tensor 4"):
                config.check_mesh(ONE | {"tensor": 4})


def test_a_decoder_without_attention_has_a_depth(wave):
    config = configuration(pattern="S", position="none", initial_std=0.02)
    assert config.model.output_std == pytest.approx(0.02 / 2**0.5)
    assert predict(config, ONE, machine_named("h100")).mfu > 0
