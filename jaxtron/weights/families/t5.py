"""T5: version 1.0, whose head is the embedding, and 1.1 with gated MLPs and a head of its own."""

from typing import Any

from jaxtron.layers.config import GATED
from jaxtron.models.t5.config import T5Config
from jaxtron.weights.config_json import ConfigFile
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.table import StackTable, Tensor

MLPS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    # the class's own reading: gated-gelu is not gelu gated
    "gated-gelu": "geglu_tanh",
    "gated-silu": "swiglu",
}


def _is_gated(model: T5Config) -> bool:
    return model.activation in GATED


def _is_plain(model: T5Config) -> bool:
    return not _is_gated(model)


def _attention(name: str, theirs: str) -> tuple[Tensor, ...]:
    """Projections to heads and back; keys and values of cross-attention are one parameter."""
    back = Tensor(f"{name}.output.kernel", "H D E", f"{theirs}.o.weight", "E HD")
    query = Tensor(f"{name}.query.kernel", "E H D", f"{theirs}.q.weight", "HD E")
    if name == "cross":
        pair = (f"{theirs}.k.weight", f"{theirs}.v.weight")
        return query, Tensor("cross.key_value.kernel", "E G H D", pair, "HD E"), back
    key = Tensor(f"{name}.key.kernel", "E H D", f"{theirs}.k.weight", "HD E")
    return query, key, Tensor(f"{name}.value.kernel", "E H D", f"{theirs}.v.weight", "HD E"), back


def _mlp(layer: int) -> tuple[Tensor, ...]:
    dense = f"layer.{layer}.DenseReluDense"
    gate = (f"{dense}.wi_0.weight", f"{dense}.wi_1.weight")
    return (
        Tensor("mlp_norm.scale", "E", f"layer.{layer}.layer_norm.weight", "E"),
        Tensor("mlp.up.kernel", "E F", f"{dense}.wi.weight", "F E", when=_is_plain),
        Tensor("mlp.up.kernel", "E G F", gate, "F E", when=_is_gated),
        Tensor("mlp.down.kernel", "F E", f"{dense}.wo.weight", "E F"),
    )


OWN = (
    Tensor("attention_norm.scale", "E", "layer.0.layer_norm.weight", "E"),
    *_attention("attention", "layer.0.SelfAttention"),
)
CROSS = (
    Tensor("cross_norm.scale", "E", "layer.1.layer_norm.weight", "E"),
    *_attention("cross", "layer.1.EncDecAttention"),
)
STACKS = ("encoder", "decoder")
TABLE = StackTable(
    outer=(
        Tensor("embedding.table", "V E", "shared.weight", "V E"),
        Tensor("head.table", "V E", "lm_head.weight", "V E"),
        *(Tensor(f"{stack}_norm.scale", "E", f"{stack}.final_layer_norm.weight", "E") for stack in STACKS),
        # all layers of a stack read those of the first
        *(
            Tensor(
                f"{stack}_distances.table",
                "B H",
                f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                "B H",
            )
            for stack in STACKS
        ),
    ),
    branches={"encoder.layers": (*OWN, *_mlp(1)), "decoder.layers": (*OWN, *CROSS, *_mlp(2))},
    layer="",
    layers={f"{stack}.layers": f"{stack}.block.{{}}." for stack in STACKS},
    base="",
    # copies of the embedding, and a table that nothing reads, in files of the first releases
    ignored=(
        *(f"{stack}.embed_tokens.weight" for stack in STACKS),
        "EncDecAttention.relative_attention_bias.weight",
    ),
)


def _read_head(file: ConfigFile) -> None:
    """The class of 5.x says of every model that it is tied, and keeps in another key whether it was."""
    key = "scale_decoder_outputs" if file.has("scale_decoder_outputs") else "tie_word_embeddings"
    is_tied = file.flag(key, True)
    file.get("tie_word_embeddings")
    file.set("tied_head", is_tied, key)


def _read_dropout(file: ConfigFile) -> None:
    rate = file.number("dropout_rate", 0.1)
    for name in ("dropout", "attention_dropout"):
        file.set(name, rate, "dropout_rate")


def _write_head(model: T5Config) -> dict[str, Any]:
    return {"tie_word_embeddings": model.tied_head, "scale_decoder_outputs": model.tied_head}


T5 = HubFamily(
    architecture="T5ForConditionalGeneration",
    keys=(
        Key("vocab_size", "vocab_size", 32128),
        Key("d_model", "hidden_size", 512),
        Key("num_heads", "num_heads", 8),
        Key("d_kv", "head_dim", 64),
        Key("d_ff", "mlp_size", 2048),
        Key("num_layers", "encoder_layers", 6),
        # of a file without it as many as the encoder's
        Key("relative_attention_num_buckets", "num_buckets", 32),
        Key("relative_attention_max_distance", "max_distance", 128),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-6),
        Key("initializer_factor", "initial_factor", 1.0),
        Key("feed_forward_proj", "activation", "relu", MLPS),
    ),
    tensors=TABLE,
    family="t5",
    only={"is_encoder_decoder": True},
    further=(
        Rule(
            lambda file: file.set(
                "decoder_layers", file.whole("num_decoder_layers", file.whole("num_layers", 6)), "num_decoder_layers"
            ),
            lambda model: {"num_decoder_layers": model.decoder_layers},
        ),
        Rule(_read_head, _write_head),
        Rule(_read_dropout, lambda model: {"dropout_rate": model.dropout}),
    ),
    # what follows from other keys, and lengths that training was of
    without_effect="classifier_dropout dense_act_fn gradient_checkpointing is_gated_act n_positions output_past",
    positions=None,
)
