"""BYOL: predict the target network's projection of the other view (Grill et al., 2020, algorithm 1).

Official code: deepmind-research/byol. Each view has its own forward pass, so that batch norm sees the views apart; the
target, in training mode with batch statistics of its own, starts from another seed and follows the online network after
each optimizer step. The official target also averages a predictor and a classifier that nothing uses; here it has none.
Views here are torchvision's; the official ones are TensorFlow's.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from ssl_jax import models
from ssl_jax.errors import UserError
from ssl_jax.losses import byol_loss
from ssl_jax.methods.base import AXIS, Aux, Method
from ssl_jax.models.heads import PredictorNetwork, Projector, view_by_view, without_predictor

# haiku's default, in the ResNet and the MLPs: normal of deviation 1 / sqrt(fan_in), cut at two of them, uncorrected.
haiku_init = nn.initializers.variance_scaling(0.87962566103423978**2, "fan_in", "truncated_normal")


@struct.dataclass
class BYOLState:
  """The target network (encoder and projector), and both networks' running batch statistics; float32."""

  target_params: Any
  batch_stats: Any
  target_batch_stats: Any


def byol(encoder: nn.Module, projector: nn.Module, predictor: nn.Module, *, target_rate: optax.Schedule) -> Method:
  """Builds BYOL.

  Args:
    encoder, projector, predictor: modules called as `module(x, train=...)`.
    target_rate: 1 - tau per step, the weight of the online network in the target's average.
  """
  network = PredictorNetwork(encoder, projector, predictor)

  def init(key, views):
    online_key, target_key = jax.random.split(key)  # The official target starts from a seed of its own.
    online, target = (network.init(k, views[0][0], train=True) for k in (online_key, target_key))
    stats = online.get("batch_stats", {})
    return online["params"], BYOLState(without_predictor(target["params"]), stats, without_predictor(stats))

  def loss(params, state, views, keys, step):
    del keys, step  # No dropout, no schedule.
    (projection, prediction), batch_stats = view_by_view(network, params, state.batch_stats, None, views[0])
    target, target_stats = view_by_view(network, state.target_params, state.target_batch_stats, "project", views[0])
    value = byol_loss(prediction[0], target[1]) + byol_loss(prediction[1], target[0])
    averages = {"batch_stats": batch_stats, "target_batch_stats": target_stats}
    embedding = jnp.stack(list(projection), axis=1)
    return value, Aux({"loss": value}, averages, {"embedding": embedding})

  def update(params, state, aux, step):
    target_params = optax.incremental_update(without_predictor(params), state.target_params, target_rate(step))
    return state.replace(target_params=target_params, **aux.averages)

  def encoder_variables(params, state):
    return {"params": params["encoder"], "batch_stats": state.batch_stats.get("encoder", {})}

  def chance(batch_size):
    del batch_size
    return 4.0  # two directions of orthogonal vectors

  return Method(init, loss, update, encoder_variables, separable=True, chance=chance)


def from_config(config: Any, steps: int, steps_per_epoch: int) -> Method:
  """Builds BYOL as a recipe describes it."""
  del steps_per_epoch
  sizes = [view["size"] for view in config.views]
  if len(sizes) != 2 or sizes[0] != sizes[1]:
    raise UserError(f"byol takes two views of one size, got sizes {sizes}.")
  mlp = dict(config.method.mlp, hidden_bias=True, kernel_init=haiku_init)
  mlp |= dict(axis_name=AXIS, dtype=jnp.dtype(config.dtype))
  # tau(t) = 1 - (1 - tau0) (cos(pi t / T) + 1) / 2
  rate = optax.cosine_decay_schedule(1 - config.method.target_momentum, steps)
  return byol(make_encoder(config), Projector(**mlp), Projector(**mlp), target_rate=rate)


def make_encoder(config: Any) -> nn.Module:
  """The recipe's encoder with the official initialisation and shortcuts, for training and for evaluation."""
  return models.make(config, axis_name=AXIS, resnet=dict(conv_init=haiku_init, project_first=True))
