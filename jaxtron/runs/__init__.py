"""`python -m jaxtron.runs`: what the runs of a directory are, what one did, and how several differ."""
