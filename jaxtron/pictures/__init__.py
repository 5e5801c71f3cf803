"""Pictures of a run: where arrays lie, what fills a GPU, when stages work, what travels, which GPUs are neighbours.

Each takes plain data and gives a `Picture`, a matplotlib Figure that shows itself in a notebook and writes itself to a
file; none opens a window or touches pyplot.
"""

from jaxtron.pictures.memory import memory
from jaxtron.pictures.mesh import mesh
from jaxtron.pictures.picture import COLORS, Picture
from jaxtron.pictures.sharding import sharding
from jaxtron.pictures.timeline import timeline
from jaxtron.pictures.traffic import Flow, traffic

__all__ = ["COLORS", "Flow", "Picture", "memory", "mesh", "sharding", "timeline", "traffic"]
