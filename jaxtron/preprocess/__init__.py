"""Text to Megatron's token files: tokenize, merge, inspect and prove the order of samples."""
