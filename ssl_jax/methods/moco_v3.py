"""MoCo v3: contrast each prediction with the momentum encoder's projection of the other view, among those of the batch.

Chen et al., 2021, arXiv:2104.02057, algorithm 1; official code: facebookresearch/moco-v3. No queue; a predictor, both
directions, batch norm over the whole batch. The official code updates the momentum encoder just before it computes the
projections; updating it at the end of the previous step, with that step's momentum, is equivalent.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from ssl_jax.losses import info_nce
from ssl_jax.methods.base import (
  Aux,
  Context,
  Method,
  Momentum,
  Monitored,
  check_two_images,
  check_two_views,
  cosine_momentum,
  in_chunks,
  of_encoder,
)
from ssl_jax.models.heads import PredictorNetwork, Projector, torch_uniform, view_by_view, without_predictor
from ssl_jax.models.vit import patch_xavier, qkv_xavier


@struct.dataclass
class MoCoV3State:
  """The momentum network (encoder and projector), and both networks' running batch statistics; float32."""

  momentum_params: Any
  batch_stats: Any
  momentum_batch_stats: Any


def moco_v3(
  encoder: nn.Module,
  projector: nn.Module,
  predictor: nn.Module,
  *,
  temperature: float,
  momentum: Momentum,
  axis_name: str | None = None,
  microbatch: int | None = None,
) -> Method:
  """Builds MoCo v3.

  Args:
    encoder, projector, predictor: modules called as `module(x, train=...)`.
    temperature: T of `info_nce`; each direction's loss is multiplied by 2 T, as in the official code.
    momentum: m, the weight of the momentum network in its own average.
    axis_name: mapped axis over which the batch is split; the keys of all devices are the negatives.
    microbatch: see `in_chunks`.
  """
  network = PredictorNetwork(encoder, projector, predictor)

  def init(key, views):
    variables = network.init(key, views[0][0], train=True)
    params, stats = variables["params"], variables.get("batch_stats", {})
    momentum_params = jax.tree.map(jnp.copy, without_predictor(params))
    return params, MoCoV3State(momentum_params, stats, without_predictor(stats))

  def loss(params, state, views, keys, step):
    del keys, step
    online = functools.partial(view_by_view, network, params, state.batch_stats)
    slow = functools.partial(view_by_view, network, state.momentum_params, state.momentum_batch_stats, method="project")
    (projection, prediction), batch_stats = in_chunks(online, views[0], microbatch, axis_name)  # [2, b, h, w, c]
    target, momentum_stats = in_chunks(slow, views[0], microbatch, axis_name)

    def direction(query, key):
      return 2 * temperature * info_nce(query, key, temperature=temperature, axis_name=axis_name)

    value = direction(prediction[0], target[1]) + direction(prediction[1], target[0])
    averages = {"batch_stats": batch_stats, "momentum_batch_stats": momentum_stats}
    return value, Aux({"loss": value}, averages, monitored=Monitored(jnp.stack(list(projection), axis=1)))

  def update(params, state, aux, step):
    rate = momentum.rate(step + 1)
    momentum_params = optax.incremental_update(without_predictor(params), state.momentum_params, rate)
    return state.replace(momentum_params=momentum_params, **aux.averages)

  def encoder_variables(params, state):
    return of_encoder(params, state.batch_stats)

  def chance(batch_size):
    return 4 * temperature * math.log(batch_size)

  return Method(init, loss, update, encoder_variables, separable=False, chance=chance)


def from_config(settings: Any, context: Context) -> Method:
  """Builds MoCo v3 as a recipe's `method` section describes it."""
  check_two_views("moco v3", context.views)
  check_two_images("moco v3", context.batch_size)
  # As released: every MLP ends in a batch norm without gain and offset, except for the ResNet's predictor.
  mlp = dict(hidden=settings.hidden, features=settings.features, kernel_init=torch_uniform)
  mlp |= dict(axis_name=context.axis_name, dtype=context.dtype)
  return moco_v3(
    make_encoder(settings, context),
    Projector(layers=3 if context.is_vit else 2, last_norm="plain", **mlp),
    Projector(last_norm="plain" if context.is_vit else None, **mlp),
    temperature=settings.temperature,
    momentum=cosine_momentum(settings.momentum, context.steps),
    axis_name=context.axis_name,
    microbatch=context.microbatch,
  )


def make_encoder(settings: Any, context: Context) -> nn.Module:
  """The recipe's encoder with the official initialisation, for training and for evaluation."""
  del settings
  xavier = nn.initializers.xavier_uniform()
  vit = dict(positions="row_first", kernel_init=xavier, qkv_init=qkv_xavier, frozen_patch_embed=True)
  vit |= dict(patch_bias=False, patch_init=patch_xavier, token_init=nn.initializers.normal(1e-6))
  return context.encoder(resnet=dict(last_scale_init=nn.initializers.zeros), vit=vit)
