"""StarCoder2: LayerNorms, an MLP without a gate, and perhaps a window."""

from dataclasses import replace

from jaxtron.weights.families.llama import ATTENTION, PLAIN, TENSORS, common_keys, norm_rows, read_window, write_window
from jaxtron.weights.family import HubFamily, Key, Rule
from jaxtron.weights.rotary import rotary
from jaxtron.weights.table import Tensor

MLP = (
    *norm_rows("norm", "post_attention_layernorm"),
    Tensor("mlp.up.kernel", "E F", "mlp.c_fc.weight", "F E"),
    Tensor("mlp.up.bias", "F", "mlp.c_fc.bias", "F"),
    Tensor("mlp.down.kernel", "F E", "mlp.c_proj.weight", "E F"),
    Tensor("mlp.down.bias", "E", "mlp.c_proj.bias", "E"),
)
STARCODER2 = HubFamily(
    architecture="Starcoder2ForCausalLM",
    keys=(
        *common_keys(
            vocab=49152,
            hidden=3072,
            mlp=12288,
            layers=30,
            heads=24,
            kv_heads=2,
            is_tied=True,
            initial_std=0.018042,
        ),
        Key("norm_epsilon", "norm_epsilon", 1e-5),
        Key("hidden_act", "activation", "gelu_pytorch_tanh", PLAIN),
        Key("use_bias", "bias", True),
    ),
    tensors=replace(TENSORS, branches={"*": ATTENTION, "W": ATTENTION, "-": MLP}),
    constants={"norm": "layer_norm", "norm_bias": True},
    further=(Rule(lambda file: read_window(file, None), write_window), rotary(positions=4096)),
    without_effect="embedding_dropout residual_dropout",
)
