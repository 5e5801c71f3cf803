"""Attention in several implementations of one meaning: `spec.py` says what to compute, `backend.py` selects by what."""
