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
# # Follow a token through a layer
#
# Under **tensor parallelism** (`mesh.tensor`) the devices of a group share every layer: each has some of the heads and a part
# of the MLP's width. Under **sequence parallelism**, which comes with it, they also share what lies *between* the layers:
# each has some of the positions. So a token lives on one device between layers, is on all of them inside a layer, and its
# result is put together on the way out.
#
# This page follows one token along that way: first by hand with twenty lines of JAX on eight simulated devices, then in
# the program that the compiler makes for eight H100s, where every collective of the layer is found again by its name.

# %%
# On Colab, or wherever Jaxtron is not: install it. No GPU is needed here.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxtron") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "jaxtron[plan]"], check=True)

# %%
import jaxtron as jx

jx.simulate(8)

# %% [markdown]
# A small decoder on a mesh of 2 x 4: two groups with a half of the batch each (`data`), four devices in a group (`tensor`).

# %%
config = jx.load(
    model=dict(num_layers=2, hidden_size=512, num_heads=8, vocab_size=512, position="rotary", bias=False),
    data={"sequence_length": 256},
    mesh={"data": 2, "tensor": 4},
    train={"global_batch": 8, "precision": "bf16"},
)
session = jx.Session(config)
session

# %% [markdown]
# ## Where the weights are
#
# The table shows the parameters of a layer. `stack` has the layers, one behind the other in one array, which is the first
# dimension. Two kinds of matrices alternate:
#
# - **column parallel**: `up`, `query`, `key`, `value` are split by what they *produce* (`mlp`, `heads`);
# - **row parallel**: `down` and `output` are split by what they *consume*, the same `mlp` and `heads`.
#
# So what a column-parallel product leaves on a device is just what the row-parallel one after it needs there, and nothing
# has to travel between the two.

# %%
session.layout("stack")

# %%
session.draw("mlp/up/kernel", title="mlp.up")

# %%
session.draw("mlp/down/kernel", title="mlp.down")

# %% [markdown]
# (`data` splits them too: that is ZeRO, which shares the *master* weights and the optimizer's state of copies. It gathers
# them once a step and is of no concern inside a layer.)
#
# ## Where the token is
#
# The residual stream is an array `[batch, seq, embed]`. Between the layers its positions are split over `tensor`, its
# rows over `data`: each token is on exactly one device. Inside a layer the same array has its whole sequence on every
# device of the group. Which one is meant, a model says by a *name*: `seq` between the layers, `full_seq` inside.

# %%
rules = session.rules
between = rules.activation_spec("batch", "seq", "embed")
inside = rules.activation_spec("batch", "full_seq", "embed")
between, inside

# %%
session.draw(("batch", "seq", "embed"), title="between layers")

# %%
session.draw(("batch", "full_seq", "embed"), title="inside a layer")

# %% [markdown]
# The array has three dimensions, so each part of the batch is a plane. Between the layers each of the eight devices has
# a colour of its own; inside, the four devices of a group have one colour, for they are copies of each other.
#
# ## By hand
#
# An MLP without its activation, as three lines of JAX. The mesh's axes are *explicit*: the type of every array says how it
# is split, `float32[8@data,256@tensor,64]`, and a product whose split dimension is summed over has to say where the sum shall be.
# We follow the token at position 70 of row 0.

# %%
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

key = jax.random.key(0)
x, w_up, w_down = (
    jax.random.normal(jax.random.fold_in(key, number), size, "float32")
    for number, size in enumerate([(8, 256, 64), (64, 256), (256, 64)])
)


def place(array, *spec):
    return jax.device_put(array, NamedSharding(session.mesh, PartitionSpec(*spec)))


x, w_up, w_down = place(x, "data", "tensor"), place(w_up, None, "tensor"), place(w_down, "tensor", None)
with session.use():
    whole = jax.sharding.reshard(x, PartitionSpec("data"))  # 1. all-gather along the sequence
    hidden = jax.numpy.einsum("bse,ef->bsf", whole, w_up)  # 2. column parallel: nothing travels
    out = jax.numpy.einsum(  # 3. row parallel: a sum over devices, scattered along the sequence
        "bsf,fe->bse", hidden, w_down, out_sharding=PartitionSpec("data", "tensor")
    )
for name, array in {"x": x, "whole": whole, "hidden": hidden, "out": out}.items():
    print(f"{name:7}", jax.typeof(array))

# %% [markdown]
# Which devices have something of the token at each of these places?


# %%
def holders(array, row, position):
    """Devices that hold numbers of a token, and how many."""
    found = {}
    for shard in array.addressable_shards:
        rows, positions, *_ = (part.indices(size)[:2] for part, size in zip(shard.index, array.shape, strict=True))
        if rows[0] <= row < rows[1] and positions[0] <= position < positions[1]:
            found[shard.device.id] = shard.data.shape[-1]
    return found


for name, array in {"x": x, "whole": whole, "hidden": hidden, "out": out}.items():
    found = holders(array, 0, 70)
    print(f"{name:7} on devices {list(found)}, {next(iter(found.values()))} numbers each")

# %% [markdown]
# It begins on one device (positions 64 to 127 are on device 1), is copied to the four of its group by the **all-gather**,
# has a quarter of its hidden numbers on each of them, and ends where it began. The last step is the interesting one. Each
# device multiplies its quarter by its rows of `w_down` and has a *partial sum* of all 64 results; only the sum of the four is
# right. A **reduce-scatter** adds them up and leaves each token on its own device. Here are the four summands of the token:

# %%
quarters = {
    shard.device.id: np.asarray(shard.data)[0, 70] for shard in hidden.addressable_shards if shard.device.id < 4
}
rows = {shard.device.id: np.asarray(shard.data) for shard in w_down.addressable_shards}
partial = {device: quarter @ rows[device] for device, quarter in quarters.items()}
for device, numbers in partial.items():
    print(f"device {device}: first of its partial sums {numbers[0]:9.3f}")
print(f"their sum {sum(numbers[0] for numbers in partial.values()):28.3f}")
print(f"out[0, 70, 0] {np.asarray(out)[0, 70, 0]:24.3f}")

# %% [markdown]
# Why not keep the whole sequence everywhere and add up with an all-reduce, as tensor parallelism did at first? An
# all-reduce *is* a reduce-scatter and an all-gather, so the bytes on the wires are the same
# ([2205.05198](https://arxiv.org/abs/2205.05198)). But what lies between the two, norms, residual sums and dropout, is then
# a quarter of the work on each device, and a quarter of the memory.
#
# ## In the compiled step
#
# Now the real model. `rehearse` compiles its training step for eight H100s that need not be there, and reads the
# communication out of the program. This takes half a minute.

# %%
plan = jx.rehearse(config, gpu="h100", gpus=8)

# %% [markdown]
# Of all that travels we look at what is inside the loop over layers (`loops`), in the order of the program. Each line is
# a collective of *one layer*, the arrays that it moves, and the line of Jaxtron that asked for it.


# %%
def where(entry):
    return "jaxtron/" + entry.location.rpartition("jaxtron/")[2]


for direction, backward in (("forward", False), ("backward", True)):
    print(direction)
    for entry in plan.rehearsal.collectives:
        if entry.loops and entry.backward == backward:
            arrays = " + ".join(str(list(array)) for array in entry.shapes)
            print(f"  {entry.kind:15} over {', '.join(entry.axes)}: {arrays:47} {where(entry)}")

# %% [markdown]
# The forward of a layer is what we did by hand, twice: gather, attention, scatter; gather, MLP, scatter. Each array is
# `[4, 256, 512]`: half of the batch, all positions, all of `embed`. The gathers are asked for where a norm ends (`norm.py`),
# the scatters where a row-parallel product does (`linear.py`).
#
# The backward has the same four, mirrored: the transpose of a gather is a scatter, and the other way round. What it has
# besides is gathered *again*: the backward needs the inputs of the column-parallel products for the gradients of their
# weights, and to keep them whole would take four times the memory, so they were thrown away. XLA has put these
# gathers together with the mirrored ones, into one that moves several arrays.
#
# Nobody in the model named a mesh axis for any of this. A layer says `constrain(x, "batch", "full_seq", "embed")` before a
# column-parallel product and `("batch", "seq", "embed")` after a row-parallel one; the two tables say what these names are on
# this mesh, and XLA derives the collectives.
#
# ## What it costs
#
# Everything that a GPU sends in a step, by kind and axes. Inside a node `tensor` runs over NVLink, which is why one keeps it
# there.

# %%
for row in plan.collectives:
    loops = " in each layer" if row.key.loops else ""
    print(
        f"{row.key.kind:15} over {', '.join(row.key.axes):13} {row.executions:3} times a step, "
        f"{row.sent / 2**20:7.2f} MiB sent, {row.link}{loops}"
    )

# %%
plan.draw("traffic")

# %% [markdown]
# The two blocks are the two groups of `tensor`; the cells outside of them are ZeRO's traffic between the groups, along
# `data`. (Within a collective the matrix assumes a ring in the order of the mesh; how much each device sends is the
# program's.)
#
# The formula behind the layer's lines is worth remembering. A gather or scatter of an activation of $b \times s \times e$
# numbers in 16 bits over $t$ devices sends $2bse\,(t-1)/t$ bytes from each device:

# %%
b, s, e, t = 4, 256, 512, 4
one = 2 * b * s * e * (t - 1) / t
in_layers = sum(row.sent for row in plan.collectives if row.key.loops and row.key.axes == ("tensor",))
print(
    f"one gather: {one / 2**20:.2f} MiB; in the layers a GPU sends {in_layers / one / 2:.0f} times as much for each of 2 layers"
)

# %% [markdown]
# Four in the forward, four mirrored in the backward, and two for what is gathered again; with `model.recompute` it would be
# more. Every one of them can travel beside a product. What is hidden and what is not is in the plan: `print(plan)`.
#
# **Next**: notebook 07 edits the two tables and watches these lines change; notebook 03 cuts the model the other way, by
# depth.
