"""Supervisors, one a host, that start a training's processes and start them again when hosts come and go."""
