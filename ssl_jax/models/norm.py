"""Batch normalisation with PyTorch's bookkeeping, over a mapped axis."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class BatchNorm(nn.Module):
  """Normalises each channel by the mean and variance of the whole (global) batch.

  The biased variance normalises; the running variance keeps n / (n - 1) times it, as PyTorch does, with n counted
  over the mapped axis. Statistics are float32 (float64 for float64 inputs) whatever `dtype` is.

  Attributes:
    axis_name: mapped axis over which the batch is split; None: the batch that is passed.
    momentum: weight of the old running statistics (PyTorch's `momentum` is one minus this).
    use_bias, use_scale: whether the offset and the gain are learned.
    scale_init: zeros make a residual block start as the identity.
  """

  axis_name: str | None = None
  momentum: float = 0.9
  epsilon: float = 1e-5
  use_bias: bool = True
  use_scale: bool = True
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """x: float [..., channels]; `train` picks the batch's statistics over the running ones."""
    shape = (x.shape[-1],)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
    running_var = self.variable("batch_stats", "var", jnp.ones, shape)
    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)

    if train:
      axes = tuple(range(x.ndim - 1))
      moments = jnp.mean(wide, axes), jnp.mean(jnp.square(wide), axes)
      n = x.size // x.shape[-1]
      # While parameters are created there is no mapped axis, and no statistic to keep.
      if self.axis_name is not None and not self.is_initializing():
        moments = lax.pmean(moments, self.axis_name)
        n *= lax.axis_size(self.axis_name)
      mean = moments[0]
      var = jnp.maximum(moments[1] - jnp.square(mean), 0.0)
      if not self.is_initializing():
        running_mean.value = _blend(running_mean.value, mean, self.momentum)
        running_var.value = _blend(running_var.value, var * (n / max(n - 1, 1)), self.momentum)
    else:
      mean, var = running_mean.value, running_var.value

    gain = lax.rsqrt(var + self.epsilon)
    if self.use_scale:
      gain = gain * self.param("scale", self.scale_init, shape)
    offset = -mean * gain
    if self.use_bias:
      offset = offset + self.param("bias", nn.initializers.zeros, shape)
    return (wide * gain.reshape(_like(x)) + offset.reshape(_like(x))).astype(self.dtype)


def _blend(old, new, momentum):
  return momentum * old + (1 - momentum) * lax.stop_gradient(new).astype(old.dtype)


def _like(x):
  return (1,) * (x.ndim - 1) + (-1,)
