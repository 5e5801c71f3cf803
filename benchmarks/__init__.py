"""Speed and memory of real steps, as JSON: `python -m benchmarks.train`, `benchmarks.gpu`, `benchmarks.table`."""

from jaxtron.quiet import import_jax

# before any module here imports it loudly, on a machine with its CUDA plugin and without a GPU
import_jax()
