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
# # Pipelines are tables
#
# A model that is too deep for one GPU is cut into **stages**: the first GPUs have the first layers, the next ones the
# next. A batch is cut as well, into **microbatches**, so that stages have something to do at the same time. What a
# stage does when is a *schedule*, and in Jaxtron a schedule is nothing but a table: a row a tick, a column a stage, and in
# each cell the forwards (`F`) and backwards (`B`) of that tick with the numbers of their microbatches. One program runs
# any table that is right.
#
# This page draws the known ones, measures what they cost, and ends with one of your own that trains.

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
from jaxtron.pipeline.schedules.figures import figures
from jaxtron.pipeline.schedules.named import make_schedule
from jaxtron.pipeline.schedules.schedule import Entry, Schedule, Work, check
from jaxtron.pipeline.schedules.table_file import write_csv
from jaxtron.plan.schedule import schedule_text

jx.simulate(4)

# %% [markdown]
# ## Everything forward, then everything back
#
# GPipe's schedule ([1811.06965](https://arxiv.org/abs/1811.06965)) for 4 stages and 8 microbatches, as text. `F3` is the
# forward of microbatch 3; it is one tick later on each next stage, for the activations have to travel there.

# %%
gpipe = make_schedule("gpipe", 4, 8)
print(schedule_text(gpipe, width=150))

# %% [markdown]
# On a clock it looks like this. A backward takes about twice as long as a forward, because it makes the gradients of the
# inputs *and* of the weights. Grey is idle: the **bubble**.

# %%
pictures.timeline(gpipe)

# %% [markdown]
# Two numbers decide whether a schedule is good:
#
# - **the bubble**, idle time over work. With $p$ stages and $m$ microbatches it is $(p - 1) / m$ here, and only more
#   microbatches make it smaller;
# - **microbatches in flight**, those whose forward is done and whose backward is not. Their activations fill memory, and
#   with GPipe all $m$ of them are in flight at once. More microbatches, the cure of the bubble, fill the memory.
#
# ## One forward, one backward
#
# 1F1B ([2104.04473](https://arxiv.org/abs/2104.04473)) begins backwards as early as it can. The bubble is the same, but stage
# $s$ never holds more than $p - s$ microbatches, however many there are.

# %%
one_f_one_b = make_schedule("1f1b", 4, 8)
pictures.timeline(one_f_one_b)

# %%
print("microbatches in flight by stage")
for schedule in (gpipe, one_f_one_b):
    print(f"  {schedule.name:6}", [stage.in_flight for stage in figures(schedule).stages])

# %% [markdown]
# ## A smaller bubble: more, shorter stages
#
# If each GPU has two chunks of layers instead of one, `0` and `4`, `1` and `5` and so on, the pipeline fills in half the
# time. This is *interleaving*; the price is that twice as many messages travel. Paler bars are the second chunk.

# %%
interleaved = make_schedule("interleaved", 4, 8, 2)
pictures.timeline(interleaved)

# %% [markdown]
# ## Almost none: backwards in two halves
#
# Only the gradient of the *input* is what the stage before waits for. The gradient of the weights can wait for a gap.
# Zero-bubble schedules ([2401.10241](https://arxiv.org/abs/2401.10241)) split the backward and put the green half where the
# grey was. The V-shaped one lays two chunks there and back, so that the first stage also has the last layers.

# %%
pictures.timeline(make_schedule("zero_bubble_v", 4, 8, 2))

# %% [markdown]
# ## All of them side by side
#
# Time is in forwards of a whole stage; 8 microbatches take at least 24 of them on each stage. "Held" are microbatches
# whose activations, or whose inputs of weight gradients, lie in memory, counted as whole stages.

# %%
chunks = {"interleaved": 2, "eager_interleaved": 2, "zero_bubble_v": 2, "dualpipe_v": 2}
print(f"{'schedule':18} {'time':>6} {'bubble':>7} {'most held':>10} {'messages':>9}")
for name in (
    "gpipe",
    "1f1b",
    "eager_1f1b",
    "interleaved",
    "eager_interleaved",
    "zero_bubble",
    "zero_bubble_v",
    "dualpipe_v",
):
    table = make_schedule(name, 4, 8, chunks.get(name, 1))
    found = figures(table)
    held = max(stage.held for stage in found.stages) / table.num_chunks
    print(f"{name:18} {found.makespan:6.1f} {found.bubble:7.1%} {held:10.1f} {found.num_messages:9}")

# %% [markdown]
# How the bubble falls with the number of microbatches, from the tables themselves. The dotted line is $(p-1)/m$.

# %%
picture = pictures.Picture(7, 3.6)
axes = picture.subplots()
counts = [4, 8, 16, 32, 64]
for name, mark, color in (("1f1b", "o", "#0072b2"), ("interleaved", "s", "#e69f00"), ("zero_bubble", "^", "#009e73")):
    bubbles = [figures(make_schedule(name, 4, count, chunks.get(name, 1))).bubble for count in counts]
    axes.plot(counts, bubbles, marker=mark, color=color, label=name)
axes.plot(counts, [3 / count for count in counts], ":", color="grey", label="(p - 1) / m")
axes.set(xscale="log", xlabel="microbatches", ylabel="bubble", xticks=counts, xticklabels=counts, title="4 stages")
axes.minorticks_off()
axes.legend(frameon=False)
picture

# %% [markdown]
# ## Seconds instead of forwards
#
# Real stages are not alike: the last one also has the head and the loss, the first one the embedding. Give the timeline
# the seconds of each slot by virtual stage and it shows who waits for whom. Below the last stage is a third slower, and the
# whole pipeline runs at its pace. (`jx.rehearse(...).plan.prediction.slot_seconds` has such seconds for a real model and
# GPU; notebook 04 makes plans.)

# %%
seconds = {"forward": [0.010, 0.010, 0.010, 0.0133], "backward": [0.020, 0.020, 0.020, 0.0266]}
pictures.timeline(one_f_one_b, seconds, after={"optimizer": 0.012}, title="a heavy head")

# %% [markdown]
# ## Your own schedule
#
# A table can be written by hand. This one is a compromise for 2 stages and 4 microbatches: two forwards first on the first
# stage, then backwards and forwards in turns, and each forward and backward of one microbatch on the last stage in one
# tick. `check` tells what is wrong with a table, by tick and stage: try it by exchanging two cells.


# %%
def cell(forward=None, backward=None):
    """One tick of one stage; numbers are microbatches, a dot in the table is nothing."""
    return Entry(*(None if number is None else Work(0, number) for number in (forward, backward)))


mine = Schedule(
    "mine",
    table=(
        (cell(0), cell()),
        (cell(1), cell(0, 0)),
        (cell(2, 0), cell(1, 1)),
        (cell(3, 1), cell(2, 2)),
        (cell(None, 2), cell(3, 3)),
        (cell(None, 3), cell()),
    ),
    num_microbatches=4,
)
check(mine)
pictures.timeline(mine)

# %%
wrong = Schedule("wrong", mine.table[::-1], 4)
try:
    check(wrong)
except jx.UserError as error:
    print(error)

# %% [markdown]
# A table is a file like any other (`F0.2` is the forward of chunk 0, microbatch 2), and a run takes it by name. The same
# model, the same batch, without a pipeline and with two different ones: the loss is the same number, for a schedule says
# *when* things are computed and never *what*.

# %%
from pathlib import Path

write_csv(mine, Path("mine.csv"))
print(Path("mine.csv").read_text())

# %%
model = dict(num_layers=2, hidden_size=32, num_heads=2, vocab_size=257, position="rotary")
small = jx.load(
    model=model, data={"sequence_length": 32}, train={"global_batch": 8, "microbatches": 4, "precision": "fp32"}
)
runs = {
    "no pipeline": {"mesh": {"data": 1}},
    "1f1b": {"mesh": {"data": 1, "pipe": 2}, "pipeline": {"schedule": "1f1b"}},
    "mine.csv": {"mesh": {"data": 1, "pipe": 2}, "pipeline": {"schedule": "mine.csv"}},
}
text = "A schedule says when things are computed, and never what. " * 8
for name, settings in runs.items():
    session = jx.Session(jx.load(small, **settings))
    state = session.initial_state()
    state, metrics = session.step(state, session.batch(text))
    print(f"{name:12} loss {float(metrics['loss']):.6f}, gradient norm {float(metrics['gradient_norm']):.6f}")

# %% [markdown]
# ## What to take with you
#
# - A pipeline costs a bubble and buys memory. The bubble falls with microbatches a stage; the memory of 1F1B does not
#   grow with them.
# - Interleaving trades messages for bubble, split backwards trade memory for bubble.
# - On the command line: `python -m jaxtron.plan --schedule CONFIG --mesh.pipe 4 --train.microbatches 8
#   --pipeline.schedule 1f1b --png schedule.png` draws any of them, `--csv FILE` writes the table to be edited, and
#   `--pipeline.schedule FILE.csv` trains on it.
# - Which one is best on your cluster is a question for the planner: notebook 04.
