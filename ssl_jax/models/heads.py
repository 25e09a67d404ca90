"""Projection heads between an encoder and a loss."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.models.norm import BatchNorm


class SimCLRProjector(nn.Module):
  """Linear layers without bias, each followed by batch norm; ReLU between; the last norm has no offset.

  `projection_head` in model_util.py of google-research/simclr. The paper's text has no batch norm after the last
  layer; the code, followed here, has. The hidden width is the input's unless `hidden` is given.
  """

  layers: int = 2
  hidden: int | None = None
  features: int = 128
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps float [b, d] to float [b, features]."""
    hidden = self.hidden or x.shape[-1]
    for i in range(self.layers):
      last = i == self.layers - 1
      init = nn.initializers.normal(0.01)
      x = nn.Dense(
        self.features if last else hidden,
        use_bias=False,
        kernel_init=init,
        dtype=self.dtype,
        name=f"linear{i + 1}",
      )(x)
      norm = BatchNorm(self.axis_name, use_bias=not last, dtype=self.dtype, name=f"bn{i + 1}")
      x = norm(x, train)
      x = x if last else nn.relu(x)
    return x
