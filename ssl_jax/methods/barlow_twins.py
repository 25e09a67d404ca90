"""Barlow Twins: bring the correlation of two views' features to the identity (Zbontar et al., 2021, algorithm 1).

arXiv:2103.03230; official code: facebookresearch/barlowtwins. No negatives, no second network, no predictor. Each view
has its own forward pass, so that batch norm normalises each view separately. The official code's last batch norm,
without gain and offset, is part of the loss here and has no running statistics, which nothing used.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ssl_jax.losses import barlow_twins_loss
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
from ssl_jax.models.heads import Network, Projector, torch_uniform, view_by_view
from ssl_jax.settings import number, size, text, weight


def barlow_twins(
  encoder: nn.Module,
  projector: nn.Module,
  *,
  off_diagonal: float = 0.0051,
  loss_scale: float = 1.0,
  axis_name: str | None = None,
  microbatch: int | None = None,
) -> Method:
  """Builds Barlow Twins.

  Args:
    encoder, projector: modules called as `module(x, train=...)`; their batch norms take the same `axis_name`.
    off_diagonal: lambda of `barlow_twins_loss`.
    loss_scale: what the optimised loss is multiplied by; the reported one is not. Under LARS it matters to what is not
      adapted, biases and the parameters of norms, like a learning rate of their own.
    axis_name: mapped axis over which the batch is split.
    microbatch: see `in_chunks`; batch norm then normalises within a chunk.
  """
  network = Network(encoder, projector)

  def init(key, views):
    return network.init(key, views[0][0], train=True)

  def loss(params, batch_stats, views, step):
    del step  # no schedule
    encode = functools.partial(view_by_view, network, params, batch_stats)
    z, batch_stats = in_chunks(encode, views[0], microbatch, axis_name)  # [2, b, h, w, c] -> [2, b, d]
    value = barlow_twins_loss(z[0], z[1], off_diagonal=off_diagonal, axis_name=axis_name)
    monitored = Monitored(jnp.stack(list(z), axis=1))
    return loss_scale * value, Aux({"loss": value}, averages=batch_stats, monitored=monitored)

  return one_network(init, loss, separable=False)


SETTINGS = dict(
  name=text(required=True),
  hidden=size(required=True),
  features=size(required=True),
  off_diagonal=weight(required=True),
  loss_scale=number(0, 1e6, ends="(]"),
)


def from_config(settings: Any, context: Context) -> Method:
  """Builds Barlow Twins as a recipe's `method` section describes it."""
  check_two_views("barlow_twins", context.views)
  check_two_images("barlow_twins", context.batch_size)
  mlp = dict(hidden=settings.hidden, features=settings.features, kernel_init=torch_uniform)
  return barlow_twins(
    make_encoder(settings, context),
    Projector(layers=3, **mlp, axis_name=context.axis_name, dtype=context.dtype),
    off_diagonal=settings.off_diagonal,
    loss_scale=settings.get("loss_scale", 1.0),
    axis_name=context.axis_name,
    microbatch=context.microbatch,
  )


def make_encoder(settings: Any, context: Context) -> nn.Module:
  """The recipe's encoder with the official initialisation, for training and for evaluation."""
  del settings
  return context.encoder(resnet=dict(last_scale_init=nn.initializers.zeros))
