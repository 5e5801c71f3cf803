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
# # Choose a layout for your cluster
#
# A model of 8 billion parameters and two nodes of eight H100s: how should it lie on them? There are thousands of ways.
# Each is a mesh (how many devices for `data`, `fsdp`, `tensor`, `pipe`, `context`), a number of microbatches, a schedule, what
# is computed again, and how far the optimizer's state is shared. What decides is *memory*, which has to suffice, and *time*,
# and both can be known before anything runs:
#
# - `jx.search` weighs every layout by formula, in seconds;
# - `jx.rehearse` compiles the real step of one of them for GPUs that need not be there, and reads memory and communication
#   out of the program.
#
# Nothing here needs a GPU. Times are predictions; how good they are is measured in
# [docs/prediction.md](../docs/prediction.md).

# %%
# On Colab, or wherever Jaxtron is not: install it. No GPU is needed here.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxtron") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "jaxtron[plan]"], check=True)

# %%
import jaxtron as jx
from jaxtron import pictures

jx.simulate(16)

# %% [markdown]
# ## The model
#
# Llama 3's 8B with sequences of 8,192 tokens, and 16 of them in a batch. `configs/llama_3_8b.yaml` has the same model.

# %%
config = jx.load(
    model=dict(
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_size=14336,
        vocab_size=128256,
        activation="swiglu",
        norm="rms_norm",
        position="rotary",
        bias=False,
        tied_head=False,
    ),
    data={"sequence_length": 8192},
    train={"global_batch": 16, "precision": "bf16"},
)

# %% [markdown]
# ## All layouts at once
#
# The search goes through all meshes of 16 GPUs, leaves out what does not fit, and ranks the others by predicted time.

# %%
found = jx.search(config, gpu="h100", nodes=2, top=0)
print(f"{found.result.num_layouts:,} layouts: {found.result.num_too_big:,} do not fit, {len(found):,} do")
found

# %% [markdown]
# Each of them as a dot: how much of a GPU it fills, and how long a step takes. What is left and low is good. Layouts in
# the upper right are worse in both; the ones on the lower left edge are those to choose from.

# %%
GIB = 2**30
picture = pictures.Picture(7.5, 4.2)
axes = picture.subplots()
kinds = {
    "tensor over 4 GPUs or more": lambda mesh: mesh["tensor"] >= 4,
    "a pipeline": lambda mesh: mesh["pipe"] > 1,
    "data and fsdp, perhaps tensor 2": lambda mesh: True,
}
colors = ("#d55e00", "#0072b2", "#009e73")
left = list(found.candidates)
for (name, belongs), color in zip(kinds.items(), colors, strict=True):
    own = [one for one in left if belongs(one.layout.sizes)]
    left = [one for one in left if not belongs(one.layout.sizes)]
    axes.scatter(
        [one.memory.total / GIB for one in own],
        [one.prediction.step_seconds for one in own],
        s=12, color=color, alpha=0.7, label=f"{name} ({len(own)})", linewidths=0,
    )  # fmt: skip
axes.axvline(found.candidates[0].memory.capacity / GIB, color="black", linewidth=1)
axes.set(yscale="log", xlabel="GiB of a GPU", ylabel="seconds a step, predicted", title="layouts of 8B on 16 H100s")
axes.legend(frameon=False, fontsize=8)
picture

# %% [markdown]
# ## Why the best is the best
#
# Where does the time go? The same step by what takes it, for the best layout of all, of those with `tensor 8` and of those
# with four stages.


# %%
def best_where(belongs):
    return next((one for one in found.candidates if belongs(one.layout.sizes)), None)


chosen = {
    "best": found.candidates[0],
    "tensor 8": best_where(lambda mesh: mesh["tensor"] == 8),
    "pipe 4": best_where(lambda mesh: mesh["pipe"] == 4 and mesh["tensor"] == 1),
}
chosen = {name: one for name, one in chosen.items() if one is not None}
for name, one in chosen.items():
    print(f"{name:10} {one.layout.text(config.train.global_batch)}")

# %%
from dataclasses import asdict

parts = {name: asdict(one.prediction.breakdown) for name, one in chosen.items()}
names = [part for part in next(iter(parts.values())) if any(own[part] > 0.005 for own in parts.values())]
picture = pictures.Picture(9, 2.8)
axes = picture.subplots()
for row, own in enumerate(parts.values()):
    begun = 0.0
    for place, name in enumerate(names):
        axes.barh(row, own[name], left=begun, color=pictures.COLORS[place % 8], label=None if row else name)
        begun += own[name]
axes.set_yticks(range(len(parts)), list(parts))
axes.invert_yaxis()
axes.set(xlabel="seconds a step, predicted", title="what a step is made of")
picture.legend(loc="outside right upper", frameon=False, fontsize=8)
picture

# %% [markdown]
# The products take about the same time everywhere, for all layouts share the same FLOPs out among 16 GPUs (a pipeline waits
# for its slowest stage, which has the head as well). They differ in what comes on top: `tensor` sends activations in every
# layer, `pipe` has a bubble, `fsdp` gathers weights, mostly beside the products, and where memory is short something is
# computed again.
#
# And the memory of the same, by what it is for:

# %%
pictures.memory(
    {name: one.memory.classes for name, one in chosen.items()}, found.candidates[0].memory.capacity, title="16 H100s"
)

# %% [markdown]
# ## The real program
#
# A formula is a formula. `rehearse` compiles the step of the best layout for 16 H100s, which takes a minute, and reads memory,
# communication and a bound out of the program: *this* is what would run.

# %%
plan = jx.rehearse(found.best, gpu="h100", nodes=2)
plan

# %%
plan.draw("memory")

# %% [markdown]
# ## Who talks to whom
#
# What a mesh's axis costs depends on where its devices are. Inside a node there is NVLink, with hundreds of gigabytes a
# second; between nodes a network with tens of them. Devices fill nodes in the mesh's order, the last axis first
# (`mesh.order` changes it):

# %%
plan.draw("mesh")

# %%
plan.draw("traffic")

# %% [markdown]
# ## Your own cluster
#
# Change the numbers at the top, or ask for a variant of a layout by hand:
#
# ```python
# variant = jx.load(found.best, **{"model.recompute": "full"})
# print(jx.rehearse(variant, gpu="h100", nodes=2).compare(plan))      # what changed
# found.config(3)                                                    # the fourth of the ranking
# jx.search(config, gpu="b200", nodes=16, top=3)                      # other GPUs; the best three compiled
# ```
#
# The flags of a layout for the command line are `one.layout.flags(config)`:

# %%
print("python -m jaxtron.train configs/llama_3_8b.yaml " + found.candidates[0].layout.flags(config))
