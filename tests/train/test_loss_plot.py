"""loss.png."""

import matplotlib.image
import numpy as np
import pytest

from jaxtron.run.metrics import MetricsWriter
from jaxtron.train.loss_plot import plot_losses


def write(path, losses, validation):
    writer = MetricsWriter(path)
    for step, loss in losses.items():
        extra = {"validation_loss": validation[step]} if step in validation else {}
        writer.write(step, {"loss": loss, **extra})
    writer.close()


def is_drawn(image, color):
    """Whether the plot has pixels of a colour given as `#rrggbb`."""
    wanted = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return (np.abs(image[..., :3] - wanted).max(-1) < 0.02).sum() > 20


@pytest.mark.parametrize(
    ("losses", "validation", "drawn"),
    [
        ({step: 4 / step for step in range(1, 50)}, {25: 0.5, 49: 0.4}, (True, True)),
        ({1: 3.0, 2: float("nan"), 3: 2.0}, {}, (True, False)),
        ({7: 3.0}, {}, (True, False)),
        ({1: float("nan")}, {}, (False, False)),
        ({}, {}, (False, False)),
    ],
)
def test_plot_shows_the_losses_there_are(tmp_path, losses, validation, drawn):
    write(tmp_path / "metrics.jsonl", losses, validation)
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "gpt_tiny")
    image = matplotlib.image.imread(tmp_path / "loss.png")
    assert image.shape[:2] == (600, 960)
    assert (is_drawn(image, "#1f77b4"), is_drawn(image, "#d62728")) == drawn
    left = ["loss.png", "metrics.jsonl"] if losses else ["loss.png"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == left
