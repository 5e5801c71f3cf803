"""Speed and memory of real steps, as JSON: `python -m benchmarks.train`, `benchmarks.gpu`, `benchmarks.table`."""
