"""Batch normalisation with running statistics as in PyTorch, over a mapped axis."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ssl_jax.errors import UserError


class BatchNorm(nn.Module):
  """Normalises each channel by the mean and variance of the whole (global) batch, or of groups of a fixed size.

  The biased variance normalises; the running variance keeps n / (n - 1) times it, as PyTorch does, with n counted
  over the mapped axis. Statistics are float32 (float64 for float64 inputs) whatever `dtype` is.

  Attributes:
    axis_name: mapped axis over which the batch is split; None: the batch that is passed.
    group_size: number of consecutive examples that are normalised together, on one device: a property of the recipe,
      not of the number of devices (MoCo v1 and v2). The running statistics average the groups'. None: all examples.
    momentum: weight of the old running statistics (PyTorch's `momentum` is one minus this).
    use_bias, use_scale: whether the offset and the gain are learned.
    scale_init: zeros make a residual block start as the identity.
  """

  axis_name: str | None = None
  group_size: int | None = None
  momentum: float = 0.9
  epsilon: float = 1e-5
  use_bias: bool = True
  use_scale: bool = True
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """x: float [..., channels]; `train` uses the batch's statistics instead of the running ones."""
    shape = (x.shape[-1],)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
    running_var = self.variable("batch_stats", "var", jnp.ones, shape)
    groups = 1
    if train and self.group_size is not None and not self.is_initializing():
      groups = x.shape[0] // self.group_size
      if groups * self.group_size != x.shape[0]:
        raise UserError(f"bn_group_size={self.group_size} does not divide the {x.shape[0]} examples of a device.")
    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    # A single group gets no axis: with a leading axis of size 1, XLA's CPU kernels sum products 40 times as slowly.
    wide = wide.reshape(*([groups] if groups > 1 else []), -1, *shape)

    if train:
      moments = jnp.mean(wide, axis=-2), jnp.mean(jnp.square(wide), axis=-2)  # [groups, channels] or [channels]
      n = wide.shape[-2]
      # During initialisation there is no mapped axis, and no statistics are kept.
      if self.axis_name is not None and self.group_size is None and not self.is_initializing():
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
      gain = gain * jnp.broadcast_to(self.param("scale", self.scale_init, shape), gain.shape)
    offset = -mean * gain
    if self.use_bias:
      offset = offset + jnp.broadcast_to(self.param("bias", nn.initializers.zeros, shape), gain.shape)
    return (wide * gain[..., None, :] + offset[..., None, :]).astype(self.dtype).reshape(x.shape)


def _blend(old, new, momentum):
  mean = jnp.mean(new.reshape(-1, *old.shape), axis=0)  # of the groups
  return momentum * old + (1 - momentum) * lax.stop_gradient(mean).astype(old.dtype)
