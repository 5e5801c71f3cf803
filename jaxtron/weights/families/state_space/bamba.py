"""Bamba: Mamba-2, or in some layers attention of which half is rotated, each followed by an MLP."""

from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.families.llama import ATTENTION, BIASES, MOST_LAYERS, linear_rows, norm_rows, set_pattern
from jaxtron.weights.families.state_space.mixers import (
    heads,
    mamba2_rows,
    read_steps,
    write_first_steps,
    write_limit,
)
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.rotary import FRACTION, NEW, OLD, THETA, read_rotary, whole_rope, write_rotary
from jaxtron.weights.table import Tensor, TensorTable

PLACES, OLD_ROTATED, HALF = "attn_layer_indices", "attn_rotary_emb", 0.5
HEADS = heads(("mamba_n_heads", "mamba_d_head", "mamba_expand"), 4096, None)
# of layers with Mamba-2, and of those with attention
MIXER = (
    Key("mamba_d_state", "mamba.state_size", 256),
    Key("mamba_n_groups", "mamba.num_groups", 1),
    Key("mamba_d_conv", "mamba.conv_width", 4),
)
KV_HEADS = Key("num_key_value_heads", "num_kv_heads", 8)


def _read_layers(file: ConfigFile) -> None:
    count, attends = file.whole("num_hidden_layers", 32, MOST_LAYERS), file.get(PLACES)
    attends = [] if attends is None else attends
    if not isinstance(attends, list) or not all(type(one) is int and 0 <= one < count for one in attends):
        file.refuse(PLACES, f"it must be a list of numbers of layers, of which there are {count:,}")
    if count:
        set_pattern(file, ["*-" if number in attends else "M-" for number in range(count)], PLACES)
    if attends:
        KV_HEADS.read(file)
        _read_rotary(file)
    else:
        file.set("position", "none", PLACES)
    if len(set(attends)) < count:
        HEADS.read(file)
        read_steps(file)
        for key in MIXER:
            key.read(file)


def _read_rotary(file: ConfigFile) -> None:
    own = {THETA: 10000.0, FRACTION: HALF}
    read_rotary(file, own=own, positions=262144, names={}, original=None)
    rotated = file.get(OLD_ROTATED)
    half = file.whole("hidden_size", 4096) // max(file.whole("num_attention_heads", 32), 1) // 2
    if rotated not in (None, half):
        file.refuse(OLD_ROTATED, f"the class does not read it, and rotates half of a head: {half}")


def _write_layers(model: ModelConfig) -> dict[str, Any]:
    found = KV_HEADS.write(model) | HEADS.write(model) | write_first_steps(model) | write_limit(model)
    for key in MIXER:
        found |= key.write(model)
    found[PLACES] = [number for number, branch in enumerate(model.layout.layers[::2]) if branch == ("*",)]
    if model.rotary.fraction != HALF:
        # in transformers 4 it is always that
        return found | {NEW: whole_rope(model.rotary)}
    return found | write_rotary(model, partly=False, names={})


def mlp_rows(own: str = "feed_forward") -> tuple[Tensor, ...]:
    """A gated MLP, the gate first, and its norm."""
    gate, up = (tuple(f"{own}.{one}_proj.{what}" for one in ("gate", "up")) for what in ("weight", "bias"))
    return (
        *norm_rows("norm", "pre_ff_layernorm"),
        Tensor("mlp.up.kernel", "E G F", gate, "F E"),
        Tensor("mlp.up.bias", "G F", up, "F"),
        *linear_rows("mlp.down", f"{own}.down_proj", ("F", "E")),
    )


OUTER = (
    Tensor("embedding.table", "V E", "model.embed_tokens.weight", "V E"),
    *norm_rows("final_norm", "model.final_layernorm"),
    Tensor("head.table", "V E", "lm_head.weight", "V E"),
)
BAMBA = HubFamily(
    architecture="BambaForCausalLM",
    keys=(
        Key("vocab_size", "vocab_size", 128000),
        Key("hidden_size", "hidden_size", 4096),
        Key("intermediate_size", "mlp_size", 14336),
        Key("num_hidden_layers", "num_layers", 32),
        Key("num_attention_heads", "num_heads", 32),
        Key("rms_norm_eps", "norm_epsilon", 1e-5),
        Key("initializer_range", "initial_std", 0.02),
        Key("tie_word_embeddings", "tied_head", False),
    ),
    tensors=TensorTable(
        outer=OUTER,
        branches={
            "M": (*norm_rows("norm", "input_layernorm"), *mamba2_rows("mamba")),
            "*": ATTENTION,
            "-": mlp_rows(),
        },
        layer="model.layers.{}.",
    ),
    constants={"norm": "rms_norm", "activation": "swiglu"},
    only={"mamba_conv_bias": True, "mamba_proj_bias": False, "hidden_act": "silu", FRACTION: HALF},
    further=(BIASES, Rule(_read_layers, _write_layers)),
    # those of layers that the model has not are among them
    without_effect=" ".join(
        (
            *(key.theirs for key in (*MIXER, KV_HEADS)),
            *("mamba_n_heads", "mamba_d_head", "mamba_expand", "time_step_limit", "time_step_min", "time_step_max"),
            *("time_step_floor", THETA, OLD, NEW, OLD_ROTATED, "mamba_chunk_size", "num_logits_to_keep"),
            *("z_loss_coefficient", "use_mamba_kernels", "output_router_logits"),
        )
    ),
)
