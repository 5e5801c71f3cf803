"""Mamba and Mamba-2: state-space layers alone."""

from jaxtron.weights.families.llama import norm_rows
from jaxtron.weights.families.state_space.mixers import (
    FIRST,
    UNBOUNDED,
    expansion,
    heads,
    mamba1_rows,
    mamba2_rows,
    rank,
    read_steps,
    set_steps,
    write_first_steps,
    write_limit,
)
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.table import Tensor, TensorTable

OUTER = (
    Tensor("embedding.table", "V E", "backbone.embeddings.weight", "V E"),
    *norm_rows("final_norm", "backbone.norm_f"),
    Tensor("head.table", "V E", "lm_head.weight", "V E"),
)
NORM = norm_rows("norm", "norm")
LAYER, BASE, MIXER = "backbone.layers.{}.", "backbone.", "mixer"
PLAIN = {"norm": "rms_norm", "bias": False, "position": "none"}
ONLY = {"use_bias": False, "use_conv_bias": True, "hidden_act": "silu"}
# how first values are drawn, in which type the stream is added up, and how it is run
WITHOUT_EFFECT = "rescale_prenorm_residual residual_in_fp32"


def _keys(*, vocab: int, hidden: int, state: int, layers: int, is_tied: bool) -> tuple[Key, ...]:
    """Those of both, with the sizes of the class."""
    return (
        Key("vocab_size", "vocab_size", vocab),
        Key("hidden_size", "hidden_size", hidden),
        Key("num_hidden_layers", "num_layers", layers),
        Key("state_size", "mamba.state_size", state),
        Key("conv_kernel", "mamba.conv_width", 4),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Key("initializer_range", "initial_std", 0.1),
        Key("tie_word_embeddings", "tied_head", is_tied),
    )


MAMBA = HubFamily(
    architecture="MambaForCausalLM",
    keys=_keys(vocab=50280, hidden=768, state=16, layers=32, is_tied=True),
    tensors=TensorTable(
        outer=OUTER, branches={"m": (*NORM, *mamba1_rows(MIXER))}, layer=LAYER, branches_in_one=1, base=BASE
    ),
    constants={**PLAIN, "pattern": "m"},
    only=ONLY,
    further=(
        expansion("expand"),
        rank("time_step_rank"),
        Rule(lambda file: set_steps(file, UNBOUNDED, FIRST), write_first_steps),
    ),
    # the others are of the files that these were made of
    without_effect=f"{WITHOUT_EFFECT} intermediate_size time_step_init_scheme time_step_scale use_associative_scan "
    "use_mambapy d_inner d_model fused_add_norm n_layer pad_vocab_size_multiple rms_norm ssm_cfg",
    positions=None,
)
MAMBA2 = HubFamily(
    architecture="Mamba2ForCausalLM",
    keys=(
        *_keys(vocab=32768, hidden=4096, state=128, layers=64, is_tied=False),
        Key("n_groups", "mamba.num_groups", 8),
    ),
    tensors=TensorTable(
        outer=OUTER, branches={"M": (*NORM, *mamba2_rows(MIXER))}, layer=LAYER, branches_in_one=1, base=BASE
    ),
    constants={**PLAIN, "pattern": "M"},
    only={**ONLY, "rms_norm": True},
    further=(
        heads(("num_heads", "head_dim", "expand"), 4096, 64),
        Rule(read_steps, lambda model: write_first_steps(model) | write_limit(model)),
    ),
    without_effect=f"{WITHOUT_EFFECT} chunk_size norm_before_gate time_step_rank",
    positions=None,
)
