"""Text to token ids to batches: `dataset.open_data` reads, `loader.py` serves rows."""
