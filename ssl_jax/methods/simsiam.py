"""SimSiam: predict the same network's projection of the other view (Chen and He, 2021, algorithm 1).

arXiv:2011.10566; official code: facebookresearch/simsiam. No negatives and no second network: the projection that is
predicted takes no gradient. Each view has its own forward pass, so that batch norm normalises each view separately.
The official projector's last layer has a bias that is never trained, before a batch norm that removes it; here it has
none.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ssl_jax.losses import simsiam_loss
from ssl_jax.methods.base import Aux, Context, Method, Monitored, check_two_images, check_two_views, one_network
from ssl_jax.models.heads import PredictorNetwork, Projector, torch_bias, torch_uniform, view_by_view
from ssl_jax.settings import size, text


def simsiam(encoder: nn.Module, projector: nn.Module, predictor: nn.Module) -> Method:
  """Builds SimSiam.

  Args:
    encoder, projector, predictor: modules called as `module(x, train=...)`.
  """
  network = PredictorNetwork(encoder, projector, predictor)

  def init(key, views):
    return network.init(key, views[0][0], train=True)

  def loss(params, batch_stats, views, step):
    del step  # no schedule
    (z, p), batch_stats = view_by_view(network, params, batch_stats, views[0])  # [2, b, h, w, c] -> [2, b, d]
    value = (simsiam_loss(p[0], z[1]) + simsiam_loss(p[1], z[0])) / 2
    return value, Aux({"loss": value}, averages=batch_stats, monitored=Monitored(jnp.stack(list(z), axis=1)))

  def chance(batch_size):
    del batch_size
    return 0.0  # the cosine of orthogonal vectors

  return one_network(init, loss, separable=True, chance=chance)


SETTINGS = dict(name=text(required=True), features=size(required=True), hidden=size(required=True))


def from_config(settings: Any, context: Context) -> Method:
  """Builds SimSiam as a recipe's `method` section describes it; `hidden` is the predictor's, its bottleneck."""
  check_two_views("simsiam", context.views)
  check_two_images("simsiam", context.batch_size)
  mlp = dict(features=settings.features, kernel_init=torch_uniform, axis_name=context.axis_name, dtype=context.dtype)
  return simsiam(
    make_encoder(settings, context),
    Projector(layers=3, last_norm="plain", **mlp),  # as wide as the encoder's features
    Projector(hidden=settings.hidden, last_bias=torch_bias(settings.hidden), **mlp),
  )


def make_encoder(settings: Any, context: Context) -> nn.Module:
  """The recipe's encoder with the official initialisation, for training and for evaluation."""
  del settings
  return context.encoder(resnet=dict(last_scale_init=nn.initializers.zeros))
