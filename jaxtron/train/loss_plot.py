"""`loss.png`: training and validation loss against the step."""

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxtron.command import write_whole
from jaxtron.run.metrics import read_metrics

CURVES = (("loss", "training", "#1f77b4", None), ("validation_loss", "validation", "#d62728", "o"))


def plot_losses(metrics_path: Path, image_path: Path, title: str) -> None:
    """Draw the losses in `metrics_path` into `image_path`, replacing it whole; values not finite are left out."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
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
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_whole(image_path, image.getvalue(), advice="the rest of the run is there")
