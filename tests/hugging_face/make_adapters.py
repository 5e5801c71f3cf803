"""Writes adapters that peft made, and the logits of models with them, beside this file.

pip install torch==2.14.1 transformers==5.24.0 peft==0.21.2 safetensors==0.8.0
python -m tests.hugging_face.make_adapters [NAME ...]
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from tests.hugging_face.fixtures import FOLDER, load, write

ADAPTERS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_rslora": True, "fan_in_fan_out": True},
}


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """In float32."""
    with torch.no_grad():
        return model(torch.tensor(tokens.astype(np.int64))).logits.float().numpy()


def make(name: str) -> None:
    """A fixture's model with random adapters."""
    fixture = load(name)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        base = write(Path(folder) / "base", fixture.config, fixture.weights)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **ADAPTERS[name])).eval()
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        logits = logits_of(model, fixture.tokens)
        assert np.abs(logits - fixture.logits).max() > 0.1
        model.save_pretrained(Path(folder) / "adapters")
        tensors = load_file(Path(folder) / "adapters" / "adapter_model.safetensors")
        settings = json.loads((Path(folder) / "adapters" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = name
    arrays = {f"tensors/{key}": value for key, value in tensors.items()}
    path = FOLDER / "adapters" / f"{name}.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, settings=json.dumps(settings), logits=logits.astype(np.float32), **arrays)
    print(f"{path}: {len(tensors)} tensors")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or ADAPTERS:
        make(chosen)
