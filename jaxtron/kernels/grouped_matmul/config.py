"""Grouped products for who imports no JAX: names of their implementations, and rows in tiles."""

from typing import Literal

Implementation = Literal["auto", "mosaic", "xla", "reference"]
TILE = 128
"""Rows of a tile."""


def tiled_rows(num_rows: int, num_experts: int) -> int:
    """Rows that are enough however so many are shared out over the experts, each expert's rounded up to tiles."""
    tiles = (num_rows + num_experts * (TILE - 1)) // TILE
    return TILE * max(1, min(tiles, num_rows))
