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
# # Experts, folded
#
# A **mixture of experts** has many MLPs in the place of one, and a router that sends each token to a few of them. The
# parameters grow with the number of experts, the work of a token does not. The experts of a layer are shared out over
# devices (*expert parallelism*), and so a token has to travel to its experts and back: an all-to-all, twice a layer.
#
# Attention and experts want different layouts. Attention's matrices are large and are split by `tensor`; a single expert is
# small and better kept whole. Jaxtron therefore looks at the devices of a stage in **two views** at once
# ([2504.14960](https://arxiv.org/abs/2504.14960)): as `data x fsdp x context x tensor` for everything but the experts, and as
# `expert_data x expert x expert_tensor` for these. One view is folded onto the other; neither costs devices.

# %%
# On Colab, or wherever Jaxtron is not: install it. No GPU is needed here.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxtron") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "jaxtron[plan]"], check=True)

# %%
import numpy as np

import jaxtron as jx
from jaxtron import pictures

jx.simulate(8)

# %% [markdown]
# ## One mesh, two views
#
# A small mixture with 8 experts of which a token takes 2, on 8 devices that are `data 4 x tensor 2` for attention. With
# `mesh.expert 4` the same devices are 2 copies of 4 parts for the experts.

# %%
config = jx.load(
    model=dict(
        pattern="*E", num_layers=2, hidden_size=64, num_heads=4, vocab_size=257, mlp_size=128, position="rotary",
        bias=False, moe={"num_experts": 8, "top_k": 2},
    ),
    data={"sequence_length": 32},
    mesh={"data": 4, "tensor": 2, "expert": 4},
    train={"global_batch": 8, "precision": "fp32"},
)  # fmt: skip
session = jx.Session(config)
print(session)
print("as the layers see it: ", {flag: size for flag, size in session.sizes.items() if size > 1})
print(
    "as the experts see it:", {flag: session.rules.parts(flag) for flag in ("expert_data", "expert", "expert_tensor")}
)
print("JAX's mesh:           ", {axis: size for axis, size in session.mesh.shape.items() if size > 1})

# %% [markdown]
# `data 4` was cut in two, `data_0` and `data_1`, because a part of the experts is made of two neighbours along `data` and the
# two of `tensor`. A flag of either view is some of these axes:

# %%
for flag in ("data", "tensor", "expert_data", "expert"):
    print(f"{flag:12} = {' x '.join(session.rules.axes(flag))}")

# %% [markdown]
# Here is a matrix of attention, which `tensor` splits, and below it the experts, of which each device has two. The experts' array
# has a layer dimension, the experts, and then a matrix for each; parts of the first dimensions are drawn as planes.

# %%
session.draw("query", title="query")

# %%
session.layout("moe")

# %%
session.draw("moe/down", title="the experts' down")

# %% [markdown]
# (At rest ZeRO shares the copies out too, along the last dimensions: `expert_data` is in the spec. When the layer runs, they are
# gathered.)
#
# ## The same numbers on every folding
#
# Where experts lie must change nothing but bytes and seconds. Three foldings of the same devices: copies of all experts
# everywhere, four parts, and four parts whose experts are cut in two by their width. The loss of the same text:

# %%
text = "Each token goes to two of eight experts, wherever they are. " * 20
foldings = {
    "experts on all devices": {"expert": 1},
    "expert 4": {"expert": 4},
    "expert 4, expert_tensor 2": {"expert": 4, "expert_tensor": 2},
}
for name, folding in foldings.items():
    here = jx.Session(jx.load(config, mesh={"data": 4, "tensor": 2, "expert": 1, **folding}))
    loss = here.loss(here.initial_state(), here.batch(text))
    held = sum(one.bytes for one in here.layout("moe"))
    print(f"{name:27} loss {loss:.5f}   {held / 1024:6.1f} KiB of experts on a device, at rest")

# %% [markdown]
# (At rest the bytes are the same everywhere, because ZeRO shares the copies out as well; what a device has *while a layer
# runs* is all of the experts, a quarter, or an eighth.)
#
# ## Load
#
# A router that is not trained yet sends tokens where chance has it. A step's metrics say how many tokens each expert of
# each layer got; here as a multiple of the even share:

# %%
state, metrics = session.step(session.initial_state(), session.batch(text))
load = np.asarray(next(value for name, value in metrics.items() if name.endswith("moe/load"))).reshape(-1, 8)
picture = pictures.Picture(6, 2.2)
axes = picture.subplots()
for layer, own in enumerate(load / load.mean(-1, keepdims=True)):
    axes.bar(np.arange(8) + 0.4 * layer, own, width=0.38, color=pictures.COLORS[layer], label=f"layer {layer}")
axes.axhline(1.0, color="black", linewidth=0.8)
axes.set(xlabel="expert", ylabel="times even", title="tokens of each expert")
axes.legend(frameon=False, fontsize=8)
picture

# %% [markdown]
# A device with a popular expert keeps the others waiting, so training adds a loss that evens the load out
# (`model.moe.balance`), and a step has *rounds*: what finds no room in the first goes in the next, and nothing is dropped
# ([docs/experts.md](../docs/experts.md)).
#
# ## What it costs on GPUs
#
# Now 16 experts of a more serious size on two nodes of eight H100s. With `expert 8` a device has two experts, each node has
# all of them, and the exchange stays in a node. With `expert 16` a device has one, and the exchange crosses the network.

# %%
serious = jx.load(
    model=dict(
        pattern="*E", num_layers=8, hidden_size=1024, num_heads=16, vocab_size=32000, mlp_size=2816, activation="swiglu",
        norm="rms_norm", position="rotary", bias=False, moe={"num_experts": 16, "top_k": 2},
    ),
    data={"sequence_length": 2048},
    mesh={"data": 8, "tensor": 2},
    train={"global_batch": 32, "precision": "bf16"},
)  # fmt: skip
plans = {f"expert {size}": jx.rehearse(jx.load(serious, **{"mesh.expert": size}), gpus=16) for size in (8, 16)}
for name, plan in plans.items():
    exchange = [row for row in plan.collectives if row.key.kind == "all_to_all"]
    sent = sum(row.sent for row in exchange) / 2**20
    seconds = sum(row.seconds for row in exchange)
    links = ", ".join(sorted({row.link for row in exchange}))
    print(
        f"{name:10} a step {plan.times['step'] * 1e3:5.1f} ms; all-to-all: {sent:6.1f} MiB a GPU, {seconds * 1e3:5.1f} ms, {links}"
    )

# %%
pictures.memory(
    {name: plan.memory.classes for name, plan in plans.items()}, plans["expert 8"].memory.capacity, title="a GPU"
)

# %% [markdown]
# The exchange takes four times as long over the network, and yet the step does not: with `expert 8` there are two copies
# of every expert, one a node, and their gradients have to be added up over the network once a step. With `expert 16` there
# is nothing to add up. Which of the two weighs more depends on the model and the batch.
#
# Who talks to whom in a step shows both. In the first matrix all within a node talk to all (blue), and the copies'
# gradients are the orange diagonals; in the second everybody talks to everybody:

# %%
plans["expert 8"].draw("traffic")

# %%
plans["expert 16"].draw("traffic")

# %% [markdown]
# ## What to take with you
#
# - `mesh.expert` and `mesh.expert_tensor` see the same devices as the other flags; experts need no devices of their own, and
#   attention keeps the layout that is good for attention.
# - A smaller `mesh.expert` keeps the exchange in a node and has more copies of experts, whose gradients travel; a larger one
#   has fewer copies and a longer way for tokens. There is no rule that is always right:
# - `jx.search` tries every folding on every mesh. Notebook 04 with this model does.
