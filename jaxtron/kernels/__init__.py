"""Kernels: each a folder with its public function, a reference in plain mathematics, and fast implementations."""
