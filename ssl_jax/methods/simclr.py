"""SimCLR: tell the other view of an image apart from all other images of the batch (Chen et al., 2020, algorithm 1).

Official code: google-research/simclr, which is followed where it differs from arXiv:2002.05709: the optimised loss is
the sum of both directions' means, twice eq. 1 (which matters for the parameters that LARS does not adapt), and the
projector ends in a batch norm without offset. Both views go through one forward pass, so that batch norm normalises
them together. Augmentations here are torchvision's; the official ones are TensorFlow's.
"""

import functools
import math
from typing import Any

import chex
import flax.linen as nn
from einops import rearrange

from ssl_jax.losses import nt_xent
from ssl_jax.methods.base import (
  Aux,
  Context,
  Method,
  Monitored,
  check_two_images,
  check_two_views,
  in_chunks,
  one_network,
)
from ssl_jax.models.heads import Network, SimCLRProjector, train_pass
from ssl_jax.settings import optional, size, temperature, text, whole

# model_util.py and resnet.py of the official code: truncated normal of variance 1 / fan_in.
conv_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def simclr(
  encoder: nn.Module,
  projector: nn.Module,
  *,
  temperature: float = 0.1,
  axis_name: str | None = None,
  microbatch: int | None = None,
) -> Method:
  """Builds SimCLR.

  Args:
    encoder, projector: modules called as `module(x, train=...)`; their batch norms take the same `axis_name`.
    temperature: of `nt_xent`.
    axis_name: mapped axis over which the batch is split.
    microbatch: see `in_chunks`; batch norm then normalises over both views of a chunk's images.
  """
  network = Network(encoder, projector)

  def forward(params, batch_stats, views):
    """[2, b, h, w, c] -> projections [2, b, d] and the new running statistics."""
    chex.assert_shape(views, (2, None, None, None, None))
    z, batch_stats = train_pass(network, params, batch_stats, rearrange(views, "v b h w c -> (v b) h w c"))
    return rearrange(z, "(v b) d -> v b d", v=2), batch_stats

  def init(key, views):
    return network.init(key, views[0][0], train=True)

  def loss(params, batch_stats, views, step):
    del step  # no schedule
    encode = functools.partial(forward, params, batch_stats)
    z, batch_stats = in_chunks(encode, views[0], microbatch, axis_name)
    value = nt_xent(z[0], z[1], temperature=temperature, axis_name=axis_name)
    monitored = Monitored(rearrange(z, "v b d -> b v d"))
    return 2 * value, Aux({"loss": value}, averages=batch_stats, monitored=monitored)

  def chance(batch_size):
    return math.log(2 * batch_size - 1)

  return one_network(init, loss, separable=False, chance=chance)


SETTINGS = dict(
  name=text(required=True),
  temperature=temperature(required=True),
  projector=dict(layers=whole(1, 1000), hidden=optional(size()), features=size(), bn_group_size=optional(whole())),
)


def from_config(settings: Any, context: Context) -> Method:
  """Builds SimCLR as a recipe's `method` section describes it."""
  check_two_views("simclr", context.views)
  check_two_images("simclr", context.batch_size)
  axis_name = context.axis_name
  return simclr(
    make_encoder(settings, context),
    SimCLRProjector(**settings.projector, axis_name=axis_name, dtype=context.dtype),
    temperature=settings.temperature,
    axis_name=axis_name,
    microbatch=context.microbatch,
  )


def make_encoder(settings: Any, context: Context) -> nn.Module:
  """The recipe's encoder with the official initialisation and shortcuts, for training and for evaluation."""
  del settings
  resnet = dict(conv_init=conv_init, last_scale_init=nn.initializers.zeros, project_first=True)
  return context.encoder(resnet=resnet, vit={})
