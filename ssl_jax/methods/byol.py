"""BYOL: predict the target network's projection of the other view (Grill et al., 2020, algorithm 1).

Official code: deepmind-research/byol. Each view has its own forward pass, so that batch norm normalises each view
separately; the target, in training mode with batch statistics of its own, starts from another seed and follows the
online network after each optimizer step. The official target also averages a predictor and a classifier, which are
unused; here it has neither. Augmentations here are torchvision's; the official ones are TensorFlow's.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from ssl_jax.losses import byol_loss
from ssl_jax.methods.base import (
  Aux,
  Context,
  Method,
  Momentum,
  Monitored,
  check_two_images,
  check_two_views,
  cosine_momentum,
  of_encoder,
)
from ssl_jax.models.heads import PredictorNetwork, Projector, view_by_view, without_predictor
from ssl_jax.settings import number, optional, size, text, whole

# haiku's default, in the ResNet and the MLPs: normal of standard deviation 1 / sqrt(fan_in), truncated at two standard
# deviations without correcting the scale for it.
haiku_init = nn.initializers.variance_scaling(0.87962566103423978**2, "fan_in", "truncated_normal")


@struct.dataclass
class BYOLState:
  """The target network (encoder and projector), and both networks' running batch statistics; float32."""

  target_params: Any
  batch_stats: Any
  target_batch_stats: Any


def byol(encoder: nn.Module, projector: nn.Module, predictor: nn.Module, *, target_momentum: Momentum) -> Method:
  """Builds BYOL.

  Args:
    encoder, projector, predictor: modules called as `module(x, train=...)`.
    target_momentum: tau, the weight of the target network in its own average.
  """
  network = PredictorNetwork(encoder, projector, predictor)

  def online(params, state, views):
    """[2, b, h, w, c] -> ((projections, predictions) [2, b, d], the running statistics)."""
    return view_by_view(network, params, state.batch_stats, views)

  def target(state, views):
    """[2, b, h, w, c] -> (projections [2, b, d], the running statistics)."""
    return view_by_view(network, state.target_params, state.target_batch_stats, views, "project")

  def init(key, views):
    online_key, target_key = jax.random.split(key)  # The official target starts from a seed of its own.
    variables, slow = (network.init(k, views[0][0], train=True) for k in (online_key, target_key))
    stats = variables.get("batch_stats", {})
    return variables["params"], BYOLState(without_predictor(slow["params"]), stats, without_predictor(stats))

  def loss(params, state, views, keys, step):
    del keys, step  # No dropout, no schedule.
    (projection, prediction), batch_stats = online(params, state, views[0])
    target_projection, target_batch_stats = target(state, views[0])
    value = byol_loss(prediction[0], target_projection[1]) + byol_loss(prediction[1], target_projection[0])
    averages = {"batch_stats": batch_stats, "target_batch_stats": target_batch_stats}
    return value, Aux({"loss": value}, averages, monitored=Monitored(jnp.stack(list(projection), axis=1)))

  def update(params, state, aux, step):
    rate = target_momentum.rate(step)
    target_params = optax.incremental_update(without_predictor(params), state.target_params, rate)
    return state.replace(target_params=target_params, **aux.averages)

  def encoder_variables(params, state):
    return of_encoder(params, state.batch_stats)

  def chance(batch_size):
    del batch_size
    return 4.0  # 2 for orthogonal vectors, in each of two directions

  return Method(init, loss, update, encoder_variables, separable=True, chance=chance)


SETTINGS = dict(
  name=text(required=True),
  target_momentum=number(0, 1, required=True),
  mlp=dict(layers=whole(1, 1000), hidden=optional(size()), features=size(), bn_group_size=optional(whole())),
)


def from_config(settings: Any, context: Context) -> Method:
  """Builds BYOL as a recipe's `method` section describes it."""
  check_two_views("byol", context.views)
  check_two_images("byol", context.batch_size)
  mlp = dict(settings.mlp, hidden_bias=True, kernel_init=haiku_init, axis_name=context.axis_name, dtype=context.dtype)
  momentum = cosine_momentum(settings.target_momentum, context.steps)
  return byol(make_encoder(settings, context), Projector(**mlp), Projector(**mlp), target_momentum=momentum)


def make_encoder(settings: Any, context: Context) -> nn.Module:
  """The recipe's encoder with the official initialisation and shortcuts, for training and for evaluation."""
  del settings
  return context.encoder(resnet=dict(conv_init=haiku_init, project_first=True))
