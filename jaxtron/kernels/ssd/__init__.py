"""State-space duality (Mamba-2) in several implementations; `backend.py` selects by what."""
