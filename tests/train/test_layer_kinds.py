"""A kind of layer is one entry of each table by symbol: one that only the tests know is built, refused and planned.

That it computes the same on every mesh is `tests/conformance`.
"""

from collections.abc import Iterator

import jax
import pytest

from jaxtron.config import UserError
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.cost import hardware_flops_per_token, model_flops_per_token, num_parameters
from jaxtron.models.decoder.kinds import KINDS
from jaxtron.models.decoder.layers import BUILDERS
from jaxtron.models.decoder.model import Decoder
from jaxtron.models.decoder.work import LAYER_WORK, decoder_work
from jaxtron.models.work.profile import PROFILES
from jaxtron.plan.formula.memory_model import Estimator
from jaxtron.plan.formula.prediction import predict
from jaxtron.plan.formula.workload import shapes_of
from jaxtron.plan.hint import first_change
from jaxtron.plan.machine import machine_named
from jaxtron.plan.search.candidates import layouts
from jaxtron.run.configuration import Configuration
from jaxtron.sharding.blueprint import blueprint
from jaxtron.sharding.folding import FLAGS
from jaxtron.sharding.rules import use
from tests.support.toy_kind import wave_known

ONE = dict.fromkeys(FLAGS, 1)


@pytest.fixture
def wave() -> Iterator[None]:
    with wave_known():
        yield


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


def test_a_third_kind_is_built_as_itself(wave, rules_for):
    config = model(pattern="(*S)-")
    with use(rules_for()):
        plan = blueprint(lambda rngs: Decoder(config, rngs=rngs))
    assert num_parameters(config, 16) == plan.num_parameters
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(plan.parameters)}
    assert any("['wave']['up']" in name for name in names) and any("['attention']" in name for name in names)


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
    shapes = shapes_of(config, sizes, PROFILES["jaxtron"], "H100")
    assert decoder_work(config.model, shapes).stacks[0].layer.weight.products
    used, unused = (Estimator(one).memory(one, sizes, machine.datasheet) for one in (config, bare))
    # its two matrices, split in two by tensor and, at rest, by data; with two moments; and a norm of two vectors
    assert used.master_weights - unused.master_weights == 4 * 2 * (2 * 32 * 48 // 4 + 2 * 32)
    assert used.activations > unused.activations
    assert first_change(config, sizes, used)
    assert any(layout.tensor == 4 for layout in layouts(config, 8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "*X"}, r"unknown symbol 'X' \(known: .*- MLP, .*S wave, "),
        ({"pattern": "(SS)"}, "'S' twice in the group"),
        ({"pattern": "*", "mlp_size": 64}, r"model.mlp_size 64 has no effect .* add MLP \(-\) or .*wave \(S\)"),
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
