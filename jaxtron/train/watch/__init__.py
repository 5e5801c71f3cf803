"""A training watched from beside: steps that do not come, and hosts that hold the others up."""
