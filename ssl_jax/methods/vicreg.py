"""VICReg: similar views, varied and uncorrelated features (Bardes et al., 2022, algorithm 1).

arXiv:2105.04906; official code: facebookresearch/vicreg. No negatives, no second network, no predictor: the variance
term alone keeps the features from becoming one point. Each view has its own forward pass, so that batch norm normalises
each view separately. The official projector's hidden layers have biases, which the batch norms behind them remove; here
they have none.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ssl_jax.losses import vicreg_loss
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
from ssl_jax.settings import size, text, weight


def vicreg(
  encoder: nn.Module,
  projector: nn.Module,
  *,
  invariance: float = 25.0,
  variance: float = 25.0,
  covariance: float = 1.0,
  axis_name: str | None = None,
  microbatch: int | None = None,
) -> Method:
  """Builds VICReg.

  Args:
    encoder, projector: modules called as `module(x, train=...)`; their batch norms take the same `axis_name`.
    invariance, variance, covariance: the weights of `vicreg_loss`.
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
    weights = dict(invariance=invariance, variance=variance, covariance=covariance)
    value = vicreg_loss(z[0], z[1], **weights, axis_name=axis_name)
    return value, Aux({"loss": value}, averages=batch_stats, monitored=Monitored(jnp.stack(list(z), axis=1)))

  return one_network(init, loss, separable=False)


SETTINGS = dict(
  name=text(required=True),
  hidden=size(required=True),
  features=size(required=True),
  invariance=weight(),
  variance=weight(),
  covariance=weight(),
)


def from_config(settings: Any, context: Context) -> Method:
  """Builds VICReg as a recipe's `method` section describes it."""
  check_two_views("vicreg", context.views)
  check_two_images("vicreg", context.batch_size)
  mlp = dict(hidden=settings.hidden, features=settings.features, kernel_init=torch_uniform)
  return vicreg(
    make_encoder(settings, context),
    Projector(layers=3, **mlp, axis_name=context.axis_name, dtype=context.dtype),
    **{key: settings[key] for key in ("invariance", "variance", "covariance") if key in settings},
    axis_name=context.axis_name,
    microbatch=context.microbatch,
  )


def make_encoder(settings: Any, context: Context) -> nn.Module:
  """The recipe's encoder with the official initialisation, for training and for evaluation."""
  del settings
  return context.encoder(resnet=dict(last_scale_init=nn.initializers.zeros))
