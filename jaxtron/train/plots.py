"""Pictures at the end of a run: `loss.png`, losses against the step, and `load.png`, tokens by layer and expert."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxtron.command import write_whole
from jaxtron.layers.moe.router import LOAD
from jaxtron.run.metrics import ARRAYS_FILE, read_metrics
from jaxtron.train.hooks import RunEvent, RunHook, RunStart

CURVES = (("loss", "training", "#1f77b4", None), ("validation_loss", "validation", "#d62728", "o"))
LOSS_FILE, LOAD_FILE = "loss.png", "load.png"

# logged steps at the end of a run whose load is drawn
LAST_STEPS = 10


def plot_losses(metrics_path: Path, image_path: Path, title: str) -> None:
    """Draw the losses in `metrics_path` into `image_path`, replacing it whole; values not finite are left out."""
    figure = _figure()
    axes = figure.add_subplot()
    records = read_metrics(metrics_path)
    for name, label, color, marker in CURVES:
        points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if points:
            steps, losses = zip(*points, strict=True)
            # a lone point has no line to show it
            shown_marker = marker or ("o" if len(points) == 1 else None)
            axes.plot(
                steps, losses, color=color, marker=shown_marker, markersize=4, label=f"{label} ({losses[-1]:.4f})"
            )
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    _write(figure, image_path)


class Pictures(RunHook):
    """Draws both in the directory of a run that is complete, on process 0, where a command took steps."""

    def start(self, run: RunStart) -> None:
        """Remember the directory."""
        self._directory = run.directory

    def event(self, event: RunEvent) -> None:
        """Draw them, where it is the end."""
        if event.name == "complete":
            metrics, name = self._directory / "metrics.jsonl", self._directory.name
            plot_losses(metrics, self._directory / LOSS_FILE, name)
            plot_load(self._directory / ARRAYS_FILE, self._directory / LOAD_FILE, name)


class ExpertLoad(NamedTuple):
    """Tokens of each expert, times the even share, over the logged steps from the first to the last."""

    steps: tuple[int, int]
    by_layer: Float64[np.ndarray, "L N"]


def expert_load(records: Sequence[dict[str, Any]]) -> ExpertLoad | None:
    """That of the last steps in the records of an `arrays.jsonl`; None of a model without experts."""
    found: list[tuple[int, np.ndarray]] = []
    for record in records[-LAST_STEPS:]:
        loads = [np.asarray(value, np.float64) for name, value in record.items() if name.endswith(f"/{LOAD}")]
        if loads:
            found.append((record["step"], np.concatenate([load.reshape(-1, load.shape[-1]) for load in loads])))
    if not found:
        return None
    tokens = np.sum([load for _, load in found], axis=0)
    return ExpertLoad((found[0][0], found[-1][0]), tokens / tokens.mean(-1, keepdims=True))


def plot_load(arrays_path: Path, image_path: Path, title: str) -> None:
    """Draw each expert's tokens by layer, the largest of a layer beside them; nothing of a model without experts."""
    load = expert_load(read_metrics(arrays_path))
    if load is None:
        return
    figure = _figure()
    experts, largest = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    numbers = np.arange(1, len(load.by_layer) + 1)
    edges = (0.5, load.by_layer.shape[1] + 0.5, len(numbers) + 0.5, 0.5)
    image = experts.imshow(load.by_layer, aspect="auto", interpolation="nearest", extent=edges, vmin=0.0)
    first, last = load.steps
    experts.set(title=f"{title}, steps {first:,} to {last:,}", xlabel="expert", ylabel="layer with experts")
    figure.colorbar(image, ax=experts, location="bottom", label="tokens, times the even share")
    largest.barh(numbers, load.by_layer.max(-1), color="#1f77b4")
    largest.axvline(1.0, color="black", linewidth=1)
    largest.set(title=f"largest ({load.by_layer.max():.2f})", xlabel="times even")
    for axis in (experts.xaxis, experts.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _write(figure, image_path)


def _figure() -> Figure:
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Figure, image_path: Path) -> None:
    """The picture as a file, replaced whole."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_whole(image_path, image.getvalue(), advice="the rest of the run is there")
