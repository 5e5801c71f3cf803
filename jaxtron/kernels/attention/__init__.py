"""Attention in several implementations of one meaning: `mask.py` says who attends to whom, `choose.py` who computes."""

from jaxtron.kernels.attention.attention import attention, with_sinks
from jaxtron.kernels.attention.choose import Choice, Implementation, Shapes, choose
from jaxtron.kernels.attention.mask import Mask, allowed

__all__ = ["Choice", "Implementation", "Mask", "Shapes", "allowed", "attention", "choose", "with_sinks"]
