"""The gated delta rule in several implementations; `backend.py` selects by what."""
