"""SimCLR: tell the other view of an image apart from all other images of the batch (Chen et al., 2020, algorithm 1).

Official code: google-research/simclr. Followed where it differs from arXiv:2002.05709: the optimised loss is the sum of
both directions' means, twice eq. 1 (felt by the parameters that LARS does not adapt), and the projector ends in a batch
norm without offset. Both views go through one forward pass, so that batch norm cannot tell them apart. Views here are
torchvision's; the official ones are TensorFlow's.
"""

import functools
import math
from typing import Any

import chex
import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from flax import struct

from ssl_jax import models
from ssl_jax.errors import UserError
from ssl_jax.losses import nt_xent
from ssl_jax.methods.base import AXIS, Aux, Method, in_chunks
from ssl_jax.models.heads import Network, SimCLRProjector

# model_util.py and resnet.py of the official code: truncated normal of variance 1 / fan_in.
conv_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


@struct.dataclass
class SimCLRState:
  """Running batch statistics: {"encoder": ..., "projector": ...}, float32."""

  batch_stats: Any


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
    variables = {"params": params, "batch_stats": batch_stats}
    images = rearrange(views, "v b h w c -> (v b) h w c")
    z, changed = network.apply(variables, images, train=True, mutable=["batch_stats"])
    return rearrange(z, "(v b) d -> v b d", v=2), changed.get("batch_stats", {})

  def init(key, views):
    variables = network.init(key, views[0][0], train=True)
    return variables["params"], SimCLRState(variables.get("batch_stats", {}))

  def loss(params, state, views, keys, step):
    del keys, step  # No dropout, no schedule.
    encode = functools.partial(forward, params, state.batch_stats)
    z, batch_stats = in_chunks(encode, views[0], microbatch, axis_name)
    value = nt_xent(z[0], z[1], temperature=temperature, axis_name=axis_name)
    embedding = rearrange(z, "v b d -> b v d")
    return 2 * value, Aux({"loss": value}, averages=batch_stats, examples={"embedding": embedding})

  def update(params, state, aux, step):
    del params, step
    return state.replace(batch_stats=aux.averages)

  def encoder_variables(params, state):
    return {"params": params["encoder"], "batch_stats": state.batch_stats.get("encoder", {})}

  def chance(batch_size):
    return math.log(2 * batch_size - 1)

  return Method(init, loss, update, encoder_variables, separable=False, chance=chance)


def from_config(config: Any, steps: int, steps_per_epoch: int) -> Method:
  """Builds SimCLR as a recipe describes it; the steps are for methods with schedules."""
  del steps, steps_per_epoch
  sizes = [view["size"] for view in config.views]
  if len(sizes) != 2 or sizes[0] != sizes[1]:
    raise UserError(f"simclr takes two views of one size, got sizes {sizes}.")
  dtype = jnp.dtype(config.dtype)
  encoder = make_encoder(config)
  projector = SimCLRProjector(**config.method.projector, axis_name=AXIS, dtype=dtype)
  return simclr(
    encoder,
    projector,
    temperature=config.method.temperature,
    axis_name=AXIS,
    microbatch=config.microbatch,
  )


def make_encoder(config: Any) -> nn.Module:
  """The recipe's encoder with the official initialisation and shortcuts, for training and for evaluation."""
  resnet = dict(conv_init=conv_init, last_scale_init=nn.initializers.zeros, project_first=True)
  return models.make(config, axis_name=AXIS, resnet=resnet, vit={})
