# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Bring a Hugging Face model, tune it, export it
#
# A directory with `config.json` and safetensors becomes a session; low-rank adapters are trained on it; the result goes back
# into such a directory, for transformers and whatever else reads them. There is no network here, so a small model is
# trained and exported first; with a model of yours, begin at *Bring it in*.

# %%
# On Colab, or wherever Jaxtron is not: install it. No GPU is needed here.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxtron") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "jaxtron"], check=True)

# %%
import json
import tempfile
from pathlib import Path

import jaxtron as jx

jx.simulate(2)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A model to begin with
#
# A Llama of two layers that has read one sentence, with bytes for tokens. What makes it a Llama are settings: RMS norms, a gated
# MLP, rotary positions, no biases. `export` looks for a class of Hugging Face that can say all of them, and refuses in a line
# where there is none.

# %%
llama = jx.load(
    model={
        "num_layers": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "activation": "swiglu",
        "norm": "rms_norm",
        "position": "rotary",
        "bias": False,
    },
    data={"sequence_length": 64, "tokenizer": "bytes"},
    train={"global_batch": 4, "precision": "fp32", "steps": 120},
    optimizer={"learning_rate": 0.02},
)
first = jx.Session(llama)
state, sentence = first.initial_state(), first.batch("The cat sat on the mat, and the dog lay by the door. ")
for _ in range(120):
    state, metrics = first.step(state, sentence)
print(f"loss {float(metrics['loss']):.3f}")
weights = jx.export(first.save(state, folder / "base"), folder / "weights")
print(sorted(path.name for path in weights.iterdir()))
print(json.loads((weights / "config.json").read_text())["architectures"])

# %% [markdown]
# ## Bring it in
#
# `checkpoint.initialize_from` names the directory. All settings of the model are taken from its `config.json`; the data, the
# mesh and what is trained are yours. With `train.lora` the weights are frozen and adapters are trained. Here the model lies
# over two devices, each with half of the heads.

# %%
config = jx.load(
    checkpoint={"initialize_from": str(weights)},
    data={"sequence_length": 64, "tokenizer": "bytes"},
    train={"global_batch": 4, "precision": "fp32", "steps": 150, "lora": {"rank": 8, "alpha": 16.0}},
    optimizer={"learning_rate": 0.02},
    mesh={"data": 1, "tensor": 2},
)
session = jx.Session(config)
state = session.initial_state()
print(
    f"the loss that it had: {session.loss(state, session.batch('The cat sat on the mat, and the dog lay by the door. ')):.3f}"
)
session.layout("lora")

# %%
print(session.generate(state, "The cat ", temperature=0.0, max_new_tokens=20))

# %% [markdown]
# ## Tune it
#
# Adapters alone have gradients and moments: of the frozen weights a step keeps one copy, in the precision that it computes in.
# Another sentence is learned, and the text that follows a prompt changes with it.

# %%
other = session.batch("The cat ran to the sea, and the dog swam home again. ")
for _ in range(150):
    state, metrics = session.step(state, other)
print(f"loss {float(metrics['loss']):.3f}")
print(session.generate(state, "The cat ", temperature=0.0, max_new_tokens=20))

# %% [markdown]
# ## Export it
#
# `save` writes a run, which every command takes (`python -m jaxtron.serve` answers requests with it); `export` merges the
# adapters into their weights. Read back, the directory has the loss that was trained.

# %%
tuned = jx.export(session.save(state, folder / "tuned"), folder / "tuned_weights")
again = jx.Session(jx.load(config, checkpoint={"initialize_from": str(tuned)}, train={"lora": None}))
losses = (
    session.loss(state, other),
    again.loss(again.initial_state(), again.batch("The cat ran to the sea, and the dog swam home again. ")),
)
print(losses)
assert abs(losses[0] - losses[1]) < 1e-3

# %% [markdown]
# The commands do the same from a terminal: `python -m jaxtron.train --checkpoint.initialize_from DIRECTORY --train.lora.rank 8`,
# `python -m jaxtron.convert --from RUN --to DIRECTORY`; families and limits are in docs/weights.md and docs/finetuning.md.
