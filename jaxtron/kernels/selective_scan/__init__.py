"""Selective scan (Mamba) in several implementations; `backend.py` selects by what."""
