"""BERT, and Megatron-LM's with its norms before branches."""

from jaxtron.weights.families.llama import PLAIN, linear_rows
from jaxtron.weights.family import HubFamily, Key
from jaxtron.weights.table import StackTable, Tensor

LAYERS = "encoder.layers"
KEYS = (
    Key("vocab_size", "vocab_size", 30522),
    Key("hidden_size", "hidden_size", 768),
    Key("intermediate_size", "mlp_size", 3072),
    Key("num_hidden_layers", "num_layers", 12),
    Key("num_attention_heads", "num_heads", 12),
    Key("max_position_embeddings", "max_positions", 512),
    Key("type_vocab_size", "token_types", 2),
    Key("layer_norm_eps", "norm_epsilon", 1e-12),
    Key("initializer_range", "initial_std", 0.02),
    Key("hidden_dropout_prob", "dropout", 0.1),
    Key("attention_probs_dropout_prob", "attention_dropout", 0.1),
    Key("hidden_act", "activation", "gelu", PLAIN),
)


def _norm(ours: str, theirs: str, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    scale, bias = names
    return Tensor(f"{ours}.scale", "E", f"{theirs}.{scale}", "E"), Tensor(f"{ours}.bias", "E", f"{theirs}.{bias}", "E")


def _table(norms: dict[str, str], names: tuple[str, str] = ("weight", "bias")) -> StackTable:
    """All tensors, with the names of norms by ours, and of what these have."""
    in_layers = [rows for name in ("attention_norm", "mlp_norm") for rows in _norm(name, norms[name], names)]
    others = [name for name in norms if name not in ("attention_norm", "mlp_norm")]
    return StackTable(
        outer=(
            Tensor("embedding.tokens.table", "V E", "bert.embeddings.word_embeddings.weight", "V E"),
            Tensor("embedding.tokens.positions", "P E", "bert.embeddings.position_embeddings.weight", "P E"),
            Tensor("embedding.types", "T E", "bert.embeddings.token_type_embeddings.weight", "T E"),
            *(row for name in others for row in _norm(name, norms[name], names)),
            *linear_rows("masked.transform", "cls.predictions.transform.dense", ("E", "I")),
            *_norm("masked.norm", "cls.predictions.transform.LayerNorm", names),
            Tensor("masked.bias", "V", "cls.predictions.bias", "V"),
            *linear_rows("pooler.dense", "bert.pooler.dense", ("E", "I")),
            *linear_rows("pairs.dense", "cls.seq_relationship", ("E", "C")),
        ),
        branches={
            LAYERS: (
                *linear_rows("attention.query", "attention.self.query", ("E", "HD")),
                *linear_rows("attention.key", "attention.self.key", ("E", "HD")),
                *linear_rows("attention.value", "attention.self.value", ("E", "HD")),
                *linear_rows("attention.output", "attention.output.dense", ("HD", "E")),
                *linear_rows("mlp.up", "intermediate.dense", ("E", "F")),
                *linear_rows("mlp.down", "output.dense", ("F", "E")),
                *in_layers,
            )
        },
        layer="",
        layers={LAYERS: "bert.encoder.layer.{}."},
        base="bert.",
        head="cls.predictions.decoder.weight",
        embedding="embedding.tokens.table",
        # the heads of a whole model where only masked tokens are predicted, and copies of what is there already
        ignored=(
            "embeddings.position_ids",
            "cls.predictions.decoder.bias",
            *(
                f"{head}.{name}"
                for head in ("bert.pooler.dense", "cls.seq_relationship")
                for name in ("weight", "bias")
            ),
        ),
    )


POST = {
    "embedding.norm": "bert.embeddings.LayerNorm",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_norm": "output.LayerNorm",
}
PRE = {"final_norm": "bert.encoder.ln", "attention_norm": "attention.ln", "mlp_norm": "ln"}
ONLY = {"position_embedding_type": "absolute", "tie_word_embeddings": True}
BERT = HubFamily(
    architecture="BertForPreTraining",
    keys=KEYS,
    tensors=_table(POST),
    # as the first released files name them
    others={"LayerNorm.gamma": _table(POST, ("gamma", "beta"))},
    family="bert",
    constants={"norm": "layer_norm", "norm_placement": "post"},
    classes={"BertForPreTraining": {"pairs": "next"}, "BertForMaskedLM": {"pairs": "none"}},
    only=ONLY,
    without_effect="classifier_dropout gradient_checkpointing",
    # a key of a setting
    positions=None,
)
MEGATRON_BERT = HubFamily(
    architecture="MegatronBertForPreTraining",
    keys=KEYS,
    tensors=_table(PRE),
    family="bert",
    constants={"norm": "layer_norm", "norm_placement": "pre"},
    classes={"MegatronBertForPreTraining": {"pairs": "next"}, "MegatronBertForMaskedLM": {"pairs": "none"}},
    only=ONLY,
    without_effect="classifier_dropout gradient_checkpointing",
    positions=None,
)
