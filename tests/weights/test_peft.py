"""Adapters in peft's files: both ways, with the weights that they make of the model's."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtron.config import UserError
from jaxtron.layers.config import LoraConfig
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.weights.hub import FAMILIES
from jaxtron.weights.peft import SETTINGS, TENSORS, read_adapters, write_adapters

LORA = LoraConfig(rank=3, alpha=6)
E, H, K, D, F, LAYERS = 8, 4, 2, 3, 10, 2
LLAMA = ModelConfig(
    num_layers=LAYERS, hidden_size=E, num_heads=H, num_kv_heads=K, head_dim=D, mlp_size=F, activation="swiglu",
    norm="rms_norm", bias=False, position="rotary", tied_head=False,
)  # fmt: skip
GPT2 = ModelConfig(num_layers=LAYERS, hidden_size=12, num_heads=H, mlp_size=F, max_positions=16)


def shapes(gpt2: bool) -> dict[str, tuple[int, ...]]:
    width, heads, gate = (12, H, ()) if gpt2 else (E, K, (2,))
    sizes = {
        "0.attention.query": ((width,), (), (H, D)),
        "0.attention.key": ((width,), (), (heads, D)),
        "0.attention.value": ((width,), (), (heads, D)),
        "0.attention.output": ((H, D), (), (width,)),
        "1.mlp.up": ((width,), gate, (F,)),
        "1.mlp.down": ((F,), (), (width,)),
    }
    found = {}
    for name, (inputs, beside, outputs) in sizes.items():
        layer = f"stack.periods.layers.{name}.lora"
        found[f"{layer}.a"] = (LAYERS, *inputs, *beside, LORA.rank)
        found[f"{layer}.b"] = (LAYERS, *beside, LORA.rank, *outputs)
    return found


def random(gpt2: bool) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes(gpt2).items()}


def table(gpt2: bool):
    return FAMILIES["gpt2" if gpt2 else "llama"].tensors


@pytest.mark.parametrize("gpt2", [False, True], ids=["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_written_is_read_again(gpt2: bool, rslora: bool, tmp_path: Path):
    model, arrays, lora = (
        GPT2 if gpt2 else LLAMA,
        random(gpt2),
        LORA.model_copy(update={"rslora": rslora, "dropout": 0.1}),
    )
    write_adapters(tmp_path, arrays, table(gpt2), model, lora, "base")
    found = read_adapters(tmp_path, shapes(gpt2), table(gpt2), model, lora)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    # with another scale here, B makes up for it
    twice = read_adapters(tmp_path, shapes(gpt2), table(gpt2), model, lora.model_copy(update={"alpha": 3.0}))
    name = "stack.periods.layers.1.mlp.down.lora.b"
    np.testing.assert_allclose(twice[name], 2 * arrays[name], rtol=1e-6)


def difference(folder: Path, module: str) -> np.ndarray:
    """What peft adds to a weight, [outputs, inputs]."""
    tensors, settings = load_file(folder / TENSORS), json.loads((folder / SETTINGS).read_text())
    a, b = (tensors[f"base_model.model.{module}.lora_{one}.weight"] for one in "AB")
    end = ".".join(module.split(".")[-2:])
    rank = settings["rank_pattern"].get(end, settings["r"])
    assert a.shape[0] == b.shape[1] == rank
    return settings["alpha_pattern"].get(end, settings["lora_alpha"]) / rank * b @ a


def test_differences_of_weights_are_those_of_the_tables(tmp_path: Path):
    """Rows and columns as weights have them: heads outermost, gate and up apart, GPT-2's three in one."""
    arrays = random(False)
    write_adapters(tmp_path / "llama", arrays, table(False), LLAMA, LORA, "base")
    own = {name.removesuffix(".a"): array for name, array in arrays.items() if name.endswith(".a")}

    def product(layer: str, number: int, letters: str) -> np.ndarray:
        name = f"stack.periods.layers.{layer}.lora"
        return 2 * np.einsum(letters, own[name][number], arrays[f"{name}.b"][number])

    found = difference(tmp_path / "llama", "model.layers.1.self_attn.k_proj")
    np.testing.assert_allclose(found, product("0.attention.key", 1, "er,rkd->kde").reshape(-1, E), atol=1e-5)
    found = difference(tmp_path / "llama", "model.layers.0.self_attn.o_proj")
    np.testing.assert_allclose(found, product("0.attention.output", 0, "hdr,re->ehd").reshape(E, -1), atol=1e-5)
    for gate, module in enumerate(("gate_proj", "up_proj")):
        found = difference(tmp_path / "llama", f"model.layers.1.mlp.{module}")
        np.testing.assert_allclose(found, product("1.mlp.up", 1, "egr,grf->gfe")[gate], atol=1e-5)
    settings = json.loads((tmp_path / "llama" / SETTINGS).read_text())
    assert (
        not settings["fan_in_fan_out"]
        and settings["rank_pattern"] == {}
        and "mlp.gate_proj" in settings["target_modules"]
    )

    arrays = random(True)
    own = {name.removesuffix(".a"): array for name, array in arrays.items() if name.endswith(".a")}
    write_adapters(tmp_path / "gpt2", arrays, table(True), GPT2, LORA, "base")
    found = difference(tmp_path / "gpt2", "transformer.h.1.attn.c_attn")
    wanted = [product(f"0.attention.{one}", 1, "er,rkd->kde").reshape(-1, 12) for one in ("query", "key", "value")]
    np.testing.assert_allclose(found, np.concatenate(wanted), atol=1e-5)
    settings = json.loads((tmp_path / "gpt2" / SETTINGS).read_text())
    assert settings["fan_in_fan_out"] and settings["rank_pattern"] == {"attn.c_attn": 9}


def test_one_pair_of_three_in_one_is_of_each(tmp_path: Path):
    """As peft trains GPT-2: A of c_attn is that of queries, keys and values."""
    arrays = random(True)
    write_adapters(tmp_path, arrays, table(True), GPT2, LORA, "base")
    settings, tensors = json.loads((tmp_path / SETTINGS).read_text()), load_file(tmp_path / TENSORS)
    generator = np.random.default_rng(1)
    for name in tensors:
        if "c_attn" in name:
            size = (3, 12) if "lora_A" in name else (36, 3)
            tensors[name] = generator.standard_normal(size, np.float32)
    save_file(tensors, tmp_path / TENSORS)
    (tmp_path / SETTINGS).write_text(json.dumps(settings | {"rank_pattern": {}, "alpha_pattern": {}}))
    found = read_adapters(tmp_path, shapes(True), table(True), GPT2, LORA)
    a = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"]
    b = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    for place, one in enumerate(("query", "key", "value")):
        name = f"stack.periods.layers.0.attention.{one}.lora"
        np.testing.assert_array_equal(found[f"{name}.a"][0], a.T)
        np.testing.assert_array_equal(found[f"{name}.b"][0].reshape(3, 12), b.T[:, place * 12 : (place + 1) * 12])


@pytest.mark.parametrize(
    ("settings", "drop", "said"),
    [
        ({"peft_type": "LOHA"}, "", "has peft_type 'LOHA': only LORA is known"),
        ({"use_dora": True}, "", "has use_dora true, which is not known here"),
        ({"bias": "all"}, "", "has bias 'all', which is not known here"),
        ({"lora_alpha": float("nan")}, "", "lora_alpha is nan, which is no number above 0"),
        ({"lora_alpha": True}, "", "lora_alpha is true, which is no number above 0"),
        ({"alpha_pattern": ["x"]}, "", "alpha_pattern is [x], which is no object"),
        ({}, "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", "lacks base_model.model.model.layers.0.mlp"),
    ],
)
def test_what_is_not_understood_is_refused(settings: dict, drop: str, said: str, tmp_path: Path):
    write_adapters(tmp_path, random(False), table(False), LLAMA, LORA, "base")
    path = tmp_path / SETTINGS
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    tensors = load_file(tmp_path / TENSORS)
    tensors.pop(drop, None)
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(UserError) as error:
        read_adapters(tmp_path, shapes(False), table(False), LLAMA, LORA)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (
            np.float32([[np.nan, 0]]),
            "has numbers in base_model.model.model.layers.0.mlp.up_proj.lora_A.weight that are not",
        ),
        (np.array(1, np.float32), "of shape [] in float32, which is no matrix of an adapter"),
        (np.zeros((0, 8), np.float32), "of shape [0, 8] in float32, which is no"),
        (np.ones((3, 8), np.int8), "of shape [3, 8] in int8, which is no"),
        (None, "has no adapter_model.safetensors, only adapter_model.bin, a pickle"),
    ],
    ids=["nan", "scalar", "empty", "int8", "pickle"],
)
def test_tensors_that_are_no_adapters(array: np.ndarray | None, said: str, tmp_path: Path):
    write_adapters(tmp_path, random(False), table(False), LLAMA, LORA, "base")
    if array is None:
        (tmp_path / TENSORS).rename(tmp_path / "adapter_model.bin")
    else:
        tensors = load_file(tmp_path / TENSORS)
        tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = array
        save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(UserError) as error:
        read_adapters(tmp_path, shapes(False), table(False), LLAMA, LORA)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_another_rank_is_refused(tmp_path: Path):
    write_adapters(tmp_path, random(False), table(False), LLAMA, LORA, "base")
    wider = {name: (*shape[:-1], 4) if name.endswith(".a") else shape for name, shape in shapes(False).items()}
    wider = {
        name: tuple(
            4
            if size == 3 and place == len(shape) - 1 - (2 if "attention" in name and "output" not in name else 1)
            else size
            for place, size in enumerate(shape)
        )
        if name.endswith(".b")
        else shape
        for name, shape in wider.items()
    }
    with pytest.raises(UserError, match="with rank 3, and train.lora.rank is 4: give --train.lora.rank 3"):
        read_adapters(tmp_path, wider, table(False), LLAMA, LoraConfig(rank=4))


def test_projections_whose_rows_lie_otherwise_are_refused(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"adapters of model.layers.0.self_attn.qkv_proj.weight, .* leave attention\.query"
    ):
        write_adapters(tmp_path, random(False), FAMILIES["phi3"].tensors, LLAMA, LORA, "base")
