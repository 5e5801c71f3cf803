"""loss.png and load.png."""

import matplotlib.image
import numpy as np
import pytest

from jaxtron.run.metrics import MetricsWriter, read_metrics
from jaxtron.train.plots import LAST_STEPS, expert_load, plot_load, plot_losses


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


def write_arrays(path, loads):
    """One step after the other whose experts have these tokens by [period, layer of it, expert]."""
    writer = MetricsWriter(path)
    for step, load in enumerate(loads, 1):
        arrays = {"stack/periods/moe/load": np.asarray(load), "stack/periods/moe/entropy": np.ones((2, 1))}
        writer.write(step, {"loss": 1.0}, arrays)
    writer.close()


def test_the_load_is_that_of_the_last_steps_by_layer(tmp_path):
    early, late = np.ones((2, 2, 3)), np.asarray([[[6, 0, 0], [2, 2, 2]], [[1, 2, 3], [0, 3, 3]]])
    write_arrays(tmp_path / "metrics.jsonl", [early] * 5 + [late] * (LAST_STEPS - 1) + [2 * late])
    found = expert_load(read_metrics(tmp_path / "arrays.jsonl"))
    assert found.steps == (6, 5 + LAST_STEPS)
    np.testing.assert_allclose(found.by_layer, [[3, 0, 0], [1, 1, 1], [0.5, 1, 1.5], [0, 1.5, 1.5]])


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 4), (58, 1, 256)], ids=str)
def test_plot_shows_the_load_of_every_layer(tmp_path, shape):
    load = np.zeros(shape)
    load[..., 0] = 5
    write_arrays(tmp_path / "metrics.jsonl", [load])
    plot_load(tmp_path / "arrays.jsonl", tmp_path / "load.png", "moe_tiny")
    image = matplotlib.image.imread(tmp_path / "load.png")
    assert image.shape[:2] == (600, 960)
    # the ends of the scale of colours, and the bars
    assert is_drawn(image, "#fde725") and is_drawn(image, "#1f77b4")
    assert is_drawn(image, "#440154")


def test_a_model_without_experts_has_no_picture_of_load(tmp_path):
    write(tmp_path / "metrics.jsonl", {1: 3.0}, {})
    plot_load(tmp_path / "arrays.jsonl", tmp_path / "load.png", "gpt_tiny")
    assert not (tmp_path / "load.png").exists()
