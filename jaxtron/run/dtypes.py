"""The type of products and activations for each `train.precision`."""

import jax.numpy as jnp

DTYPES = {"bf16": jnp.dtype(jnp.bfloat16), "fp16": jnp.dtype(jnp.float16), "fp32": jnp.dtype(jnp.float32)}
