"""Speed and memory of real steps, as JSON: `python -m benchmarks.train`, `benchmarks.gpu`, `benchmarks.table`."""

# before any module here imports JAX, which jaxtron keeps quiet on a machine without a GPU
import jaxtron  # noqa: F401
