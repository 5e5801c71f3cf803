"""Products of 8-bit numbers that are scaled by blocks of 128."""
