"""Jaxtron: Megatron-LM's parallel training as a JAX program."""
