"""The least time of a scan's compiled kernels, which plans are held to and the benchmark computes again."""

# Milliseconds forward, and forward and backward, by GPU and groups: `python -m benchmarks.ssd bound`, of 8 rows of
# 4,096 tokens, 80 heads of 64 and a state of 128, compiled with JAX 0.11.2
BOUNDS = [("h100", 1, 0.42, 1.78), ("h200", 1, 0.34, 1.30), ("h100", 8, 0.46, 2.18)]
