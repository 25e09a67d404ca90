"""Projection and prediction heads between an encoder and a loss."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.models.norm import BatchNorm


class Projector(nn.Module):
  """Linear layers, each but the last followed by batch norm and ReLU.

  Attributes:
    layers: number of linear layers.
    hidden: width of all but the last; None: the input's.
    features: width of the last.
    hidden_bias: whether all but the last have a bias; the last never has.
    last_norm: after the last layer: None, "scale" (batch norm without offset) or "plain" (without gain and offset).
    kernel_init: of the linear layers.
    axis_name: mapped axis over which the batch statistics are averaged.
    dtype: of the computation.
  """

  layers: int = 2
  hidden: int | None = None
  features: int = 128
  hidden_bias: bool = False
  last_norm: str | None = None
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps float [b, d] to float [b, features]."""
    hidden = self.hidden or x.shape[-1]
    for i in range(1, self.layers):
      x = self.linear(hidden, self.hidden_bias, f"linear{i}")(x)
      x = nn.relu(BatchNorm(self.axis_name, dtype=self.dtype, name=f"bn{i}")(x, train))
    x = self.linear(self.features, False, f"linear{self.layers}")(x)
    if self.last_norm is None:
      return x
    scale = self.last_norm == "scale"
    norm = BatchNorm(self.axis_name, use_bias=False, use_scale=scale, dtype=self.dtype, name=f"bn{self.layers}")
    return norm(x, train)

  def linear(self, features, bias, name):
    return nn.Dense(features, use_bias=bias, kernel_init=self.kernel_init, dtype=self.dtype, name=name)


# The official SimCLR's (`projection_head` in model_util.py): the paper's text has no norm after the last layer.
SimCLRProjector = functools.partial(Projector, last_norm="scale", kernel_init=nn.initializers.normal(0.01))
