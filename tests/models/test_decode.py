"""A decoder that goes on from what its layers remember: on every mesh the logits of whole sequences, row by row."""

from typing import Any

import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.sharding.rules import use
from tests.conformance.subjects import OPTIONS, settings_of
from tests.support.equivalence import LENGTH, MODELS, changed, make_params, make_trainer, rules_for
from tests.support.logits import decoded, grown, logits

MAMBA = {"num_heads": 4, "head_dim": 8, "state_size": 8, "num_groups": 2}
DELTA = {
    **{"linear_num_key_heads": 4, "linear_key_head_dim": 6, "linear_num_value_heads": 4, "linear_value_head_dim": 4},
}
# in which rounding is not scaled up
STATE_SPACE = changed(
    MODELS["llama"], pattern="MGm(*-)", num_layers=2, norm_epsilon=0.1, mamba=MAMBA, delta=DELTA, num_kv_heads=4
)
EXPERTS = {"num_experts": 4, "top_k": 2, "scores": "softmax"}
FORMS: dict[str, ModelConfig] = {
    # learned positions and biases
    "gpt": MODELS["gpt"],
    # fewer key/value heads than parts of tensor
    "llama": MODELS["llama"],
    # one layer of two branches, slopes, norms of queries and keys
    "palm": MODELS["palm"],
    # windows, which few places are for, capped scores and sinks
    "gemma": changed(MODELS["gemma"], num_layers=2),
    "state_space": STATE_SPACE,
    # layers of several kinds in no order, so that stages differ
    "mixed": changed(STATE_SPACE, pattern="M-G*-Mm", num_layers=1),
    "latent": ModelConfig(**settings_of("L", "-") | {"position": "rotary"}),
    "options gemma": ModelConfig(**OPTIONS["gemma"] | {"num_layers": 2}),
    "options neox": ModelConfig(**OPTIONS["neox"] | {"num_layers": 2}),
    "options olmo": ModelConfig(**OPTIONS["olmo"] | {"num_layers": 2}),
    "experts": changed(MODELS["llama"], pattern="*E", num_layers=3, moe={**EXPERTS, "leading_dense": 1}),
}
MESHES: dict[str, dict[str, Any]] = {
    "one": {},
    "tensor 4": {"tensor": 4},
    "pipe 2": {"pipe": 2},
    "pipe 2, tensor 2, data 2": {"pipe": 2, "tensor": 2, "data": 2},
    "data 2, fsdp 2": {"data": 2, "fsdp": 2},
}
ROWS, STEPS = 8, 6
# of the prompts: unequal, one shorter than what convolutions see, one that a window has forgotten the beginning of
PROMPTS = np.asarray([9, 1, 4, 2, 7, 10, 3, 5], np.int32)
# each kind of layer, each kind of mesh
QUICK = {
    ("state_space", "one"),
    ("gemma", "tensor 4"),
    ("options neox", "tensor 4"),
    ("experts", "data 2, fsdp 2"),
}


@pytest.mark.parametrize(
    ("form", "mesh"),
    [
        pytest.param(form, mesh, marks=[] if (form, mesh) in QUICK else pytest.mark.slow)
        for form in FORMS
        for mesh in MESHES
    ],
)
def test_logits_after_unequal_prompts_are_those_of_whole_sequences(form: str, mesh: str) -> None:
    model = FORMS[form]
    tokens = np.random.default_rng(0).integers(0, 60, (ROWS, LENGTH), dtype=np.int32)
    with use(rules_for({})):
        trainer = make_trainer(model)
        expected = logits(trainer, make_params(trainer), tokens)
    places = PROMPTS[:, None] - 1 + np.arange(STEPS + 1)
    expected = np.take_along_axis(expected, places[..., None], 1)
    with use(rules_for(MESHES[mesh], "parameters")):
        trainer = make_trainer(model, pipeline=PipelineConfig())
        found = grown(trainer, make_params(trainer), tokens, PROMPTS, STEPS)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_what_is_padding_changes_nothing() -> None:
    """Whatever its tokens, and however much of it there is."""
    with use(rules_for({})):
        trainer = make_trainer(STATE_SPACE)
        params = make_params(trainer)
        tokens = np.random.default_rng(0).integers(0, 60, (2, LENGTH), dtype=np.int32)
        others = tokens.copy()
        others[0, 4:] = 0
        counts = np.asarray([4, LENGTH], np.int32)
        first, other = (grown(trainer, params, given, counts, 0) for given in (tokens, others))
    np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("flag", ["context", "chunks"])
def test_what_would_split_a_position_is_refused(flag: str) -> None:
    mesh = {"context": 2} if flag == "context" else {"pipe": 2}
    pipeline = PipelineConfig() if flag == "context" else PipelineConfig(schedule="interleaved", chunks=2)
    tokens = np.zeros((4, 8), np.int32)
    with use(rules_for(mesh)), pytest.raises(UserError, match=r"needs --(mesh.context|pipeline.chunks) 1"):
        trainer = make_trainer(changed(MODELS["llama"], num_layers=4), pipeline=pipeline)
        decoded(trainer, make_params(trainer), tokens, (8,))
