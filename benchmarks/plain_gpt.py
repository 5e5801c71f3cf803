"""nanoGPT's model and step in plain PyTorch, for the CPU: a process that steps when it is told to.

    PYTHON benchmarks/plain_gpt.py SETTINGS.json WEIGHTS.npz

It imports PyTorch and NumPy alone, so that their Python need not be Jaxtron's. `benchmarks.nanogpt_torch` starts it and
writes both files: the second has the initial parameters, by the names of this module, and the batch as `.tokens` and
`.targets`. Of each line on its standard input, a number of steps, it answers with a JSON: seconds, processor seconds,
and the loss of the last step.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """A norm before attention, a norm before the MLP, no biases."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm_1 = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.norm_2 = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From the stream [row, position, width] to the next layer's."""
        rows, length, width = x.shape
        heads = self.qkv(self.norm_1(x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
        x = x + self.drop(self.output(mixed.transpose(1, 2).reshape(rows, length, width)))
        return x + self.drop(self.down(functional.gelu(self.up(self.norm_2(x)))))


class Gpt(nn.Module):
    """Learned positions, a head that is the table of tokens."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        super().__init__()
        width = recipe["width"]
        self.tokens = nn.Embedding(recipe["vocabulary"], width)
        self.positions = nn.Embedding(recipe["length"], width)
        self.drop = nn.Dropout(recipe["dropout"])
        blocks = (Block(width, recipe["heads"], recipe["dropout"]) for _ in range(recipe["layers"]))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss of tokens [row, position]."""
        x = self.drop(self.tokens(tokens) + self.positions.weight)
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_step(recipe: dict[str, Any], weights: dict[str, np.ndarray]) -> Any:
    """A function of no arguments that takes a step and returns its loss, as a tensor."""
    torch.manual_seed(0)
    model = Gpt(recipe)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items() if name[0] != "."})
    optimizer = torch.optim.AdamW(
        [
            {"params": [one for one in model.parameters() if one.ndim > 1], "weight_decay": recipe["weight_decay"]},
            {"params": [one for one in model.parameters() if one.ndim == 1], "weight_decay": 0.0},
        ],
        lr=recipe["learning_rate"],
        betas=(recipe["beta1"], recipe["beta2"]),
        eps=recipe["epsilon"],
        fused=True,
    )
    tokens, targets = (torch.from_numpy(weights[name]).long() for name in (".tokens", ".targets"))

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_norm"])
        optimizer.step()
        return loss.detach()

    return step


def main(settings: str, weights: str) -> None:
    """Answers until its input ends."""
    recipe = json.loads(Path(settings).read_text())
    torch.set_num_threads(recipe["threads"])
    step = make_step(recipe, dict(np.load(weights)))
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        loss = math.nan
        for _ in range(int(line)):
            loss = step()
        said = {
            "seconds": time.perf_counter() - wall,
            "processor": time.process_time() - processor,
            "loss": float(loss),
        }
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
