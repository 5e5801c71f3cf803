"""The losses of runs as a PNG."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxtron.command import write_whole
from jaxtron.runs.folder import RunFolder


def write_picture(runs: Sequence[RunFolder], names: Sequence[str], by: str, path: Path) -> None:
    """Training losses as lines and validation losses as dots of the same colour, each run's name with its last loss."""
    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = colormaps["tab10" if len(runs) <= 10 else "tab20"]
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        color = colors(number % colors.N)
        # as it is: a dollar sign in a name is no formula
        label = name.replace("$", r"\$")
        for kind, marker in (("loss", None), ("validation", "o")):
            points = run.losses.points(kind, by)
            if points:
                places, values = zip(*points, strict=True)
                text = f"{label} ({values[-1]:.4f})" if kind == "loss" else f"{label}, validation ({values[-1]:.4f})"
                lone = "o" if len(points) == 1 else None
                style = "-" if kind == "loss" else ":"
                axes.plot(
                    places, values, style, color=color, marker=marker or lone, markersize=4, linewidth=1.2, label=text
                )
    title = names[0].replace("$", r"\$") if len(names) == 1 else f"{len(names)} runs"
    axes.set(title=title, xlabel=by, ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_whole(path, image.getvalue(), advice="choose another --png")
