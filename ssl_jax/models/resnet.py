"""ResNet v1.5 (He et al., 2016, arXiv:1512.03385; stride in the 3x3 convolution), padded and named as torchvision's."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.cpu import conv_general_dilated
from ssl_jax.models.norm import BatchNorm

kaiming_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut; `project` puts a 1x1 convolution into the shortcut."""

  channels: int
  stride: int
  project: bool
  conv: Callable
  norm: Callable
  last_scale_init: nn.initializers.Initializer
  expansion = 1

  @nn.compact
  def __call__(self, x):
    y = nn.relu(self.norm(name="bn1")(self.conv(self.channels, 3, self.stride, name="conv1")(x)))
    y = self.conv(self.channels, 3, 1, name="conv2")(y)
    y = self.norm(name="bn2", scale_init=self.last_scale_init)(y)
    return nn.relu(y + _shortcut(self, x))


class BottleneckBlock(nn.Module):
  """1x1, 3x3 (with the stride) and 1x1 convolutions, the last four times as wide, and a shortcut."""

  channels: int
  stride: int
  project: bool
  conv: Callable
  norm: Callable
  last_scale_init: nn.initializers.Initializer
  expansion = 4

  @nn.compact
  def __call__(self, x):
    y = nn.relu(self.norm(name="bn1")(self.conv(self.channels, 1, 1, name="conv1")(x)))
    y = nn.relu(self.norm(name="bn2")(self.conv(self.channels, 3, self.stride, name="conv2")(y)))
    y = self.conv(self.channels * self.expansion, 1, 1, name="conv3")(y)
    y = self.norm(name="bn3", scale_init=self.last_scale_init)(y)
    return nn.relu(y + _shortcut(self, x))


def _shortcut(block, x):
  if not block.project:
    return x
  x = block.conv(block.channels * block.expansion, 1, block.stride, name="downsample_conv")(x)
  return block.norm(name="downsample_bn")(x)


class ResNet(nn.Module):
  """A ResNet without its classifier.

  Attributes:
    stages: number of blocks in each stage; the channels double and the maps halve from stage to stage.
    bottleneck: bottleneck blocks (ResNet-50 and deeper) or basic ones.
    width: multiplies all channels; 1 is the paper's 64 in the first stage.
    stem: "imagenet" (7x7 stride 2, 3x3 max-pool stride 2), "small" (3x3 stride 1, no pool: 32x32 images) or "patch"
      (7x7 stride 4, no pool: maps of a quarter of the side, for a quick run on small images).
    features: "pooled" averages the last maps; "flat" flattens them, which keeps spatial positions apart.
    project_first: a projection shortcut in the first block of the first stage even where the shapes agree, as in the
      official SimCLR; torchvision has none there.
    conv_init, last_scale_init: initialisation of the convolutions, and of the gain of each block's last norm.
    axis_name: mapped axis over which the batch statistics are averaged.
    bn_group_size: examples that are normalised together, in place of all (see `BatchNorm`).
    dtype: of the computation; parameters and statistics stay float32.
  """

  stages: Sequence[int]
  bottleneck: bool = False
  width: float = 1
  stem: str = "imagenet"
  features: str = "pooled"
  project_first: bool = False
  conv_init: nn.initializers.Initializer = kaiming_normal_fan_out
  last_scale_init: nn.initializers.Initializer = nn.initializers.ones
  axis_name: str | None = None
  bn_group_size: int | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps float [b, H, W, C] to float [b, features]; `train` uses and updates the batch statistics."""
    for field, value, choices in (
      ("stem", self.stem, ("imagenet", "small", "patch")),
      ("features", self.features, ("pooled", "flat")),
    ):
      if value not in choices:
        raise UserError(f"encoder.{field} must be one of {', '.join(choices)}, got {value!r}.")
    conv = functools.partial(_conv, init=self.conv_init, dtype=self.dtype)
    norm = functools.partial(
      _norm, train=train, axis_name=self.axis_name, group_size=self.bn_group_size, dtype=self.dtype
    )
    block = BottleneckBlock if self.bottleneck else BasicBlock
    channels = round(64 * self.width)

    kernel, stride = {"imagenet": (7, 2), "small": (3, 1), "patch": (7, 4)}[self.stem]
    x = conv(channels, kernel, stride, name="conv1")(images.astype(self.dtype))
    x = nn.relu(norm(name="bn1")(x))
    if self.stem == "imagenet":
      x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for stage, blocks in enumerate(self.stages):
      for i in range(blocks):
        stride = 2 if stage > 0 and i == 0 else 1
        changes = stride != 1 or x.shape[-1] != channels * 2**stage * block.expansion
        project = i == 0 and (changes or (stage == 0 and self.project_first))
        x = block(channels * 2**stage, stride, project, conv, norm, self.last_scale_init, name=f"layer{stage + 1}_{i}")(
          x
        )
    x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    return jnp.mean(x, axis=(1, 2)) if self.features == "pooled" else x.reshape(x.shape[0], -1)


def _conv(channels, kernel, stride, *, init, dtype, name):
  pad = (kernel - 1) // 2  # Both sides, as PyTorch pads; "SAME" would pad strided convolutions at the end only.
  return nn.Conv(
    channels,
    (kernel, kernel),
    (stride, stride),
    ((pad, pad), (pad, pad)),
    use_bias=False,
    kernel_init=init,
    dtype=dtype,
    conv_general_dilated=conv_general_dilated,
    name=name,
  )


def _norm(*, train, name, **kwargs):
  return functools.partial(BatchNorm(name=name, **kwargs), train=train)


resnet = ResNet
resnet18 = functools.partial(ResNet, stages=(2, 2, 2, 2))
resnet34 = functools.partial(ResNet, stages=(3, 4, 6, 3))
resnet50 = functools.partial(ResNet, stages=(3, 4, 6, 3), bottleneck=True)
resnet101 = functools.partial(ResNet, stages=(3, 4, 23, 3), bottleneck=True)
resnet152 = functools.partial(ResNet, stages=(3, 8, 36, 3), bottleneck=True)
