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
# # Long context
#
# A sequence of 131,072 tokens does not fit one GPU: its activations alone are hundreds of gigabytes. **Context parallelism**
# (`mesh.context`) gives each device a part of every sequence. Norms, MLPs and projections never notice, since they work
# on one token at a time. Only attention has to see the rest, so keys and values travel.
#
# This page shows which part each device has and why it has *two*, how attention sees the others, that the loss stays the
# same, and what it does to memory and network.

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
# ## Who has what
#
# The obvious cut is bad. Attention is causal: a token looks at those before it, so the work of a row of the score matrix
# grows with its position. With four contiguous parts the device with the last quarter has seven times the work of the
# one with the first, and all wait for it. So the sequence is cut into twice as many pieces as there are devices, and
# device $g$ gets the $g$-th *and* the $g$-th last. That is called zigzag.

# %%
devices = 4


def pieces(device, is_zigzag):
    """Which of the 8 pieces a device has."""
    return [device, 2 * devices - 1 - device] if is_zigzag else [2 * device, 2 * device + 1]


picture = pictures.Picture(9, 3.4)
plain, zigzag = picture.subplots(1, 2)
for axes, is_zigzag in ((plain, False), (zigzag, True)):
    owner = np.full(2 * devices, -1)
    for device in range(devices):
        owner[pieces(device, is_zigzag)] = device
    for query in range(2 * devices):
        # all keys before this piece, and on the diagonal a half of its own
        band = [(0, query), (query, query), (query + 1, query + 1), (0, query + 1)]
        axes.fill(*zip(*band, strict=True), color=pictures.COLORS[owner[query]], linewidth=0)
    work = [sum(place + 0.5 for place in pieces(device, is_zigzag)) for device in range(devices)]
    shares = ", ".join(f"{share / sum(work):.0%}" for share in work)
    axes.set(
        title=f"{'zigzag' if is_zigzag else 'contiguous'}: {shares}", xlabel="keys, by piece", ylabel="queries, by piece",
        xlim=(0, 8), ylim=(8, 0), aspect="equal",
    )  # fmt: skip
handles = [plain.plot([], [], "s", color=pictures.COLORS[device])[0] for device in range(devices)]
picture.legend(handles, [f"device {device}" for device in range(devices)], loc="outside right", frameon=False)
picture

# %% [markdown]
# The triangle is the work of causal attention, coloured by the device that does it. On the right each device has the
# same share.
#
# ## How attention sees the others
#
# | `context.method` | what travels | good where |
# |---|---|---|
# | `ring` | keys and values go round the devices, a part a step, while the part before is being multiplied | sequences are long: the travel hides behind the work |
# | `all_gather` | keys and values of all are gathered, gradients scattered | key/value heads are few, links are fast |
# | `all_to_all` | heads are split instead of the sequence, there and back (Ulysses, [2309.14509](https://arxiv.org/abs/2309.14509)) | there are at least as many heads as devices, in a node |
# | `hierarchical` | all-to-all among neighbours, a ring across | several nodes |
#
# All of them compute the same. The loss of a small model on 8 simulated devices, with the sequence whole and in four parts:

# %%
model = dict(num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=4, vocab_size=257, position="rotary", bias=False)
small = jx.load(
    model=model, data={"sequence_length": 128}, train={"global_batch": 8, "precision": "fp32"}, mesh={"data": 2}
)
text = "A token looks at all that came before it, wherever it lies. " * 40
runs = {
    "whole": {},
    "ring": {"mesh": {"data": 2, "context": 4}},
    "all_to_all": {"mesh": {"data": 2, "context": 4}, "context": {"method": "all_to_all"}},
}
for name, settings in runs.items():
    session = jx.Session(jx.load(small, **settings))
    loss = session.loss(session.initial_state(), session.batch(text))
    print(f"{name:11} loss {loss:.6f}")

# %% [markdown]
# ## What it does to memory
#
# Four layers of a model like Llama's 8B, with sequences of 65,536 tokens on eight H100s (the whole model has eight times as
# many layers; the compiled program is the same loop). In both plans the weights' state is split over the eight
# devices; what differs is the sequence: with `fsdp 8` each device has whole ones, with `context 8` each has an eighth of all.

# %%
large = jx.load(
    model=dict(
        num_layers=4, hidden_size=4096, num_heads=32, num_kv_heads=8, mlp_size=14336, vocab_size=32000, activation="swiglu",
        norm="rms_norm", position="rotary", bias=False, tied_head=False, recompute="selective",
    ),
    data={"sequence_length": 65536},
    train={"global_batch": 8, "microbatches": 1, "precision": "bf16"},
)  # fmt: skip
layouts = {
    "fsdp 8": {"mesh": {"data": 1, "fsdp": 8}},
    "context 8, ring": {"mesh": {"data": 1, "context": 8}, "train": {"microbatches": 8}},
}
plans = {name: jx.rehearse(jx.load(large, **settings), gpus=8) for name, settings in layouts.items()}
pictures.memory(
    {name: plan.memory.classes for name, plan in plans.items()},
    plans["fsdp 8"].memory.capacity,
    title="4 layers, 65,536 tokens",
)

# %% [markdown]
# With `fsdp` a device has one whole sequence of 65,536 tokens at a time; with `context` an eighth of it, and eight microbatches
# one after the other instead. Master weights and optimizer state are as large: what splits sequences shares them too (ZeRO
# over `data` and `context`). The steps take about as long. Make the sequences eight times longer, and only one of the two
# still fits.

# %%
for name, plan in plans.items():
    print(
        f"{name:18} {plan.memory.activations / 2**30:6.2f} GiB of activations, {plan.times['step']:.2f} s a step, MFU {plan.plan.prediction.mfu:.0%}"
    )

# %% [markdown]
# ## What travels
#
# The ring's keys and values, by kind of communication. `hidden` is the part of the time that runs beside attention's
# products, as the compiler scheduled it.

# %%
ring = plans["context 8, ring"]
for row in ring.collectives:
    hidden = f"{row.hidden / row.seconds:.0%}" if row.seconds else "-"
    print(
        f"{row.key.kind:20} over {', '.join(row.key.axes):8} {row.sent / 2**30:7.2f} GiB sent, {row.seconds * 1e3:7.2f} ms, hidden {hidden}"
    )

# %%
ring.draw("traffic")

# %% [markdown]
# With grouped queries (8 key/value heads for 32 heads) what goes round is a quarter of what the queries are, and each part
# that arrives is good for an eighth of the attention. The longer the sequence, the better the travel hides: work grows
# with the square of the length, what travels only with the length.
#
# ## What to take with you
#
# - `mesh.context` splits sequences; only attention knows. Zigzag pieces keep causal work even.
# - It is the one flag that makes the *activations of a single sequence* smaller without splitting layers; `mesh.tensor` does
#   both, and has to stay in a node.
# - `configs/llama3_8b_128k.yaml` is Llama 3.1 8B at 131,072 tokens on 64 GPUs, with `mesh.order` such that weights are gathered
#   inside nodes and keys and values travel between them. `python -m jaxtron.plan configs/llama3_8b_128k.yaml --gpu h100` weighs it.
