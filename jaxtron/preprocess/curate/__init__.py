"""`python -m jaxtron.preprocess curate`: duplicates, evaluation tasks and poor text taken out of a corpus."""
