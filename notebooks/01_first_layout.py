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
# # A first layout
#
# A model that does not fit on one GPU is cut up. What is cut, along which dimension, and which devices hold copies of the
# same piece is a *layout*. This notebook lays one small model out in five ways, on eight devices that are simulated on
# whatever machine this is, and takes a step on each. The numbers do not change; where they lie does.

# %%
# On Colab, or wherever Jaxtron is not: install it. No GPU is needed here.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxtron") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "jaxtron"], check=True)

# %%
import jaxtron as jx

jx.simulate(8)

# %% [markdown]
# ## A small model
#
# Settings are sections. Two layers of width 64 are enough to look at.

# %%
small = jx.load(
    model={"num_layers": 2, "hidden_size": 64, "num_heads": 8, "vocab_size": 257},
    data={"sequence_length": 64},
    train={"global_batch": 16, "precision": "fp32", "steps": 100},
    optimizer={"learning_rate": 0.003},
)

# %% [markdown]
# ## One weight in five layouts
#
# The weight that makes queries has the dimensions layers x embed x heads x head_dim. `spec` says for each of them what
# splits it at rest, and `-` is nothing; `a device` is the shape of one device's part, `replicas` on how many devices
# the same part lies.

# %%
meshes = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8, "data": 1},
    "tensor": {"tensor": 8, "data": 1},
    "all three": {"data": 2, "fsdp": 2, "tensor": 2},
    "context": {"context": 4, "data": 2},
}
sessions = {name: jx.Session(jx.load(small, mesh=mesh)) for name, mesh in meshes.items()}
for name, session in sessions.items():
    print(name)
    print(session.layout("query"))
    print()

# %% [markdown]
# With `data` the weights of a step are whole on every device; at rest the devices share them all the same, because
# `sharding.zero` is `optimizer`: master weights and optimizer state are cut in eight, and gathered once a step. `fsdp` cuts
# along the same dimension and gathers a layer only when it is used. `tensor` cuts the heads, and multiplies with its
# part: nothing of the weight is gathered.
#
# In a notebook a layout is a table:

# %%
sessions["all three"].layout("mlp")

# %% [markdown]
# ## Which device has what
#
# The picture on the left is the weight, each block in a colour, with the numbers of the devices that hold it; on the right
# are the devices. What has one colour is the same block: those devices are replicas of each other.

# %%
sessions["all three"].draw("query.kernel")

# %%
sessions["data"].draw("query.kernel")

# %% [markdown]
# A norm is small, and whole everywhere:

# %%
sessions["all three"].draw("final_norm.scale")

# %% [markdown]
# ## An activation
#
# Between layers an activation has the dimensions batch x sequence x embed. Its rows go to the devices along `data` and `fsdp`;
# the sequence goes to those along `tensor` (sequence parallelism) and `context`; inside attention the heads do. `embed` stays
# whole.

# %%
sessions["all three"].draw(("batch", "seq", "embed"))

# %%
sessions["context"].draw(("batch", "seq", "embed"))

# %% [markdown]
# With `context` a device has two pieces of each sequence, the g-th and the g-th last, so that causal attention is the same work
# for all; the picture puts them side by side.
#
# A batch of token ids is an array like any other:

# %%
session = sessions["all three"]
batch = session.batch("The quick brown fox jumps over the lazy dog. ")
session.draw(batch.tokens, title="tokens")

# %% [markdown]
# ## Experts
#
# A mixture of experts sees the same eight devices in another view: `mesh.expert` says over how many of them the experts of
# a layer are spread.

# %%
experts = jx.load(
    small,
    model={"pattern": "*E", "moe": {"num_experts": 8, "top_k": 2}},
    mesh={"data": 8, "expert": 4},
)
mixture = jx.Session(experts)
mixture.layout("moe")

# %%
mixture.draw("*.moe.up")

# %% [markdown]
# ## The same numbers
#
# One step on each mesh, from the same seed and the same batch. The losses agree to the last digits that float32 keeps when
# sums are added in another order.

# %%
losses = {}
for name in ("data", "all three"):
    session = sessions[name]
    state, metrics = session.step(
        session.initial_state(), session.batch("The quick brown fox jumps over the lazy dog. ")
    )
    losses[name] = float(metrics["loss"])
    print(f"{name:10} loss {losses[name]:.6f}, gradient norm {float(metrics['gradient_norm']):.6f}")
assert max(losses.values()) - min(losses.values()) < 1e-4

# %% [markdown]
# What decides a layout is two tables of names, `session.rules.parameters` and `session.rules.activations`; notebook 07 edits
# them. How a token goes through a layer that `tensor` splits is notebook 02.
