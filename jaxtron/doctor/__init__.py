"""Checks of a machine, and of several together, before a run."""
