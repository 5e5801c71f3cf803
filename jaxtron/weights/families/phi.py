"""Phi 1, 1.5 and 2: attention and MLP side by side on one norm, and a head with a bias."""

from jaxtron.weights.families.llama import PLAIN, common_keys, norm_rows, projection
from jaxtron.weights.families.rotary import rotary
from jaxtron.weights.family import HubFamily, Key
from jaxtron.weights.table import Tensor, TensorTable

PHI = HubFamily(
    architecture="PhiForCausalLM",
    keys=(
        *common_keys(vocab=51200, hidden=2048, mlp=8192, layers=24, heads=32, kv_heads=None),
        Key("layer_norm_eps", "norm_epsilon", 1e-5),
        Key("hidden_act", "activation", "gelu_new", PLAIN),
    ),
    tensors=TensorTable(
        outer=(
            Tensor("embedding.table", "V E", "model.embed_tokens.weight", "V E"),
            *norm_rows("final_norm", "model.final_layernorm"),
            Tensor("head.table", "V E", "lm_head.weight", "V E"),
            Tensor("head_bias", "V", "lm_head.bias", "V"),
        ),
        branches={
            "*": (
                *norm_rows("norm", "input_layernorm"),
                *projection("query", "q_proj", "H"),
                *projection("key", "k_proj", "K"),
                *projection("value", "v_proj", "K"),
                Tensor("attention.output.kernel", "H D E", "self_attn.dense.weight", "E HD"),
                Tensor("attention.output.bias", "E", "self_attn.dense.bias", "E"),
            ),
            "-": (
                Tensor("mlp.up.kernel", "E F", "mlp.fc1.weight", "F E"),
                Tensor("mlp.up.bias", "F", "mlp.fc1.bias", "F"),
                Tensor("mlp.down.kernel", "F E", "mlp.fc2.weight", "E F"),
                Tensor("mlp.down.bias", "E", "mlp.fc2.bias", "E"),
            ),
        },
        layer="model.layers.{}.",
        ignored=("rotary_emb.inv_freq",),
    ),
    constants={"norm": "layer_norm", "bias": True, "pattern": "(*-)", "head_bias": True},
    only={"qk_layernorm": False},
    further=(rotary(fraction=0.5),),
    without_effect="embd_pdrop resid_pdrop",
)
