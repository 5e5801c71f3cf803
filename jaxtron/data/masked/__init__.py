"""Samples of masked objectives: BERT, T5 and UL2, the first two with Megatron's samples in Megatron's order."""
