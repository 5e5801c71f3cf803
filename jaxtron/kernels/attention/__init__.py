"""Attention in several implementations of one meaning: `mask.py` says who attends to whom, `choose.py` who computes."""
