"""Products of rows grouped by expert, in several implementations; `backend.py` selects by what."""
