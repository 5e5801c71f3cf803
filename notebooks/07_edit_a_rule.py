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
# # Edit a rule
#
# Which flag of the mesh splits which logical axis is said in two tables, one for parameters and one for activations, and
# nowhere else. Here two entries are changed, and memory, traffic and loss are compared with what they were. The loss has
# to stay: a table says where arrays lie, never what is computed.

# %%
# On Colab, or wherever Jaxtron is not: install it. No GPU is needed here.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxtron") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "jaxtron[plan]"], check=True)

# %%
import jaxtron as jx

jx.simulate(4)

# %%
config = jx.load(
    model={"num_layers": 2, "hidden_size": 64, "num_heads": 4, "activation": "swiglu"},
    data={"sequence_length": 128},
    train={"global_batch": 8, "steps": 100},
    mesh={"data": 2, "tensor": 2},
)
session = jx.Session(config)
session.rules.parameters

# %% [markdown]
# An entry is a logical axis and the flags that split it where it is used; `()` is none. What `fsdp` and ZeRO share of a weight
# at rest is not in the tables: those flags cut whatever dimension is free, and gather it again before it is used.

# %%
session.rules.activations

# %% [markdown]
# ## MLPs that tensor does not split
#
# `"mlp": ()` keeps the width of MLPs whole, that of the weights in one table and that of the activations in the other. Each
# device along `tensor` then has the whole weight where it had half.

# %%
edit = {"parameters": {"mlp": ()}, "activations": {"mlp": ()}}
edited = jx.Session(config, **edit)
print(session.layout("mlp/up"))
print(edited.layout("mlp/up"))
assert edited.layout("mlp/up").bytes == 2 * session.layout("mlp/up").bytes

# %%
session.draw("mlp/up/kernel")

# %%
edited.draw("mlp/up/kernel")

# %% [markdown]
# ## Memory and traffic
#
# Before, the two devices of a group had half of the width each: `up` needs no communication, and what `down` makes of the halves
# is summed by a reduce-scatter. Now both multiply by everything: there is nothing to sum, and twice as much is multiplied,
# kept for the backward, and held as weights. That is what the entry `tensor` in the table saves.
#
# The real step is compiled for four H100s that need not be there, once with each pair of tables.

# %%
before = jx.rehearse(config, gpu="h100", gpus=4)
after = jx.rehearse(config, gpu="h100", gpus=4, **edit)


# %%
def sent(plan):
    """Bytes that a GPU sends in a step, by collective and axes of the mesh."""
    found = {}
    for row in plan.collectives:
        name = f"{row.key.kind} over {', '.join(row.key.axes)}"
        found[name] = found.get(name, 0) + row.sent
    return found


both = {"as it is": before, "mlp whole": after}
for name, plan in both.items():
    print(name)
    for collective, size in sorted(sent(plan).items()):
        print(f"  {collective:32} {size / 2**10:8.1f} KiB")
    print(f"  {'weights':32} {plan.memory.weights / 2**10:8.1f} KiB")
    print(f"  {'activations in flight':32} {plan.memory.activations / 2**10:8.1f} KiB")
assert after.memory.activations > before.memory.activations
assert after.memory.weights > before.memory.weights
assert sent(after)["reduce_scatter over tensor"] < sent(before)["reduce_scatter over tensor"]

# %% [markdown]
# The predicted times of an edited plan are still those of the tables as they are; memory, collectives and the bound are of
# the program that was compiled.
#
# ## The loss stays

# %%
losses = []
for one in (session, edited):
    state, metrics = one.step(one.initial_state(), one.batch("a rule says where, never what. "))
    losses.append(float(metrics["loss"]))
losses

# %%
assert max(losses) - min(losses) < 0.01

# %% [markdown]
# In bfloat16 they differ by rounding: sums are added in another order. Gradients and what is learned are the same, so
# that a run may go on from its checkpoint with other tables.
#
# An edit that would change more is refused in a line. The vocabulary is one: embedding and loss look tokens up in parts of the
# table by code of their own, which knows how it is cut.

# %%
for parameters in ({"vocab": ()}, {"mpl": ()}, {"heads": ("fsdp",)}):
    try:
        jx.Session(config, parameters=parameters)
    except jx.UserError as error:
        print(error)
