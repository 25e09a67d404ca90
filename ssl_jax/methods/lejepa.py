"""LeJEPA: views near the mean of the global ones, embeddings as a Gaussian (Balestriero and LeCun, 2025, algorithm 2).

arXiv:2511.08544; official code: rbalestr-lab/lejepa, the listing in MINIMAL.md. No negatives, no second network, no
predictor, no stop-gradient. Crops of one resolution go through one forward pass of the encoder, all of them through one
call of the projector, so that its batch norm normalises all views together.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from ssl_jax import random_streams
from ssl_jax.errors import UserError
from ssl_jax.losses import lejepa_loss
from ssl_jax.methods.base import Aux, Context, Method, Monitored, check_two_images, in_chunks, one_network
from ssl_jax.models.heads import EmbeddingProjector, train_pass
from ssl_jax.settings import number, positive, size, text, whole


def lejepa(
  encoder: nn.Module,
  projector: nn.Module,
  *,
  weight: float = 0.05,
  slices: int = 1024,
  t_max: float = 3.0,
  knots: int = 17,
  axis_name: str | None = None,
  microbatch: int | None = None,
) -> Method:
  """Builds LeJEPA. views[0] are the global crops; the local ones, if there are any, are views[1].

  Args:
    encoder, projector: modules called as `module(x, train=...)`; their batch norms take the same `axis_name`.
    weight: of SIGReg, in (0, 1); the distance of the views has the rest.
    slices: how many directions a step draws.
    t_max, knots: of `sigreg`.
    axis_name: mapped axis over which the batch is split.
    microbatch: see `in_chunks`; batch norm then normalises within a chunk.
  """

  def forward(params, batch_stats, views):
    """A tuple of [v, b, h, w, c] -> projections [V, b, d] and the new running statistics."""
    features, stats = [], batch_stats["encoder"]
    for crops in views:
      images = rearrange(crops, "v b h w c -> (v b) h w c")
      output, stats = train_pass(encoder, params["encoder"], stats, images)
      features.append(output)
    z, projector_stats = train_pass(projector, params["projector"], batch_stats["projector"], jnp.concatenate(features))
    z = rearrange(z, "(v b) d -> v b d", v=sum(crops.shape[0] for crops in views))
    return z, {"encoder": stats, "projector": projector_stats}

  def init(key, views):
    encoder_key, projector_key = jax.random.split(key)
    features, variables = encoder.init_with_output(encoder_key, views[0][0], train=True)
    head_variables = projector.init(projector_key, features, train=True)
    parts = {"encoder": variables, "projector": head_variables}
    params = {name: part["params"] for name, part in parts.items()}
    return {"params": params, "batch_stats": {name: part.get("batch_stats", {}) for name, part in parts.items()}}

  def loss(params, batch_stats, views, step):
    encode = functools.partial(forward, params, batch_stats)
    z, batch_stats = in_chunks(encode, views, microbatch, axis_name)
    global_views = views[0].shape[0]
    directions = draw_directions(step, z.shape[-1], slices)
    settings = dict(global_views=global_views, weight=weight, t_max=t_max, knots=knots, axis_name=axis_name)
    value = lejepa_loss(z, directions, **settings)
    invariance = jnp.mean(jnp.square(z - jnp.mean(z[:global_views], axis=0, keepdims=True)))
    metrics = {"loss": value, "invariance": invariance, "sigreg": (value - (1 - weight) * invariance) / weight}
    monitored = Monitored(rearrange(jax.lax.stop_gradient(z[:2]), "v b d -> b v d"))
    return value, Aux(metrics, averages=batch_stats, monitored=monitored)

  return one_network(init, loss, separable=False)


def draw_directions(step: jax.Array, dim: int, slices: int) -> jax.Array:
  """The step's slices, [dim, slices] unit columns: the same on every device and, as officially, in every run."""
  key = jax.random.fold_in(jax.random.key(random_streams.SLICES, impl="threefry2x32"), step)
  directions = jax.random.normal(key, (dim, slices))
  return directions / jnp.linalg.norm(directions, axis=0, keepdims=True)


SETTINGS = dict(
  name=text(required=True),
  weight=number(0, 1, ends="()", required=True),
  slices=size(required=True),
  t_max=positive(),
  knots=whole(2),
  embedding=size(required=True),
  hidden=size(required=True),
  features=size(required=True),
)


def from_config(settings: Any, context: Context) -> Method:
  """Builds LeJEPA as a recipe's `method` section describes it."""
  check_two_images("lejepa", context.batch_size)
  sizes = [view.size for view in context.views]
  if len(sizes) < 2 or len(set(sizes)) > 2 or sizes != sorted(sizes, key=sizes.index):
    raise UserError(f"lejepa takes two or more views, global ones of one size before local ones, got sizes {sizes}.")
  shape = dict(embedding=settings.embedding, hidden=settings.hidden, features=settings.features)
  return lejepa(
    make_encoder(settings, context),
    EmbeddingProjector(**shape, axis_name=context.axis_name, dtype=context.dtype),
    weight=settings.weight,
    slices=settings.slices,
    **{key: settings[key] for key in ("t_max", "knots") if key in settings},
    axis_name=context.axis_name,
    microbatch=context.microbatch,
  )


def make_encoder(settings: Any, context: Context) -> nn.Module:
  """The recipe's encoder with the official initialisation, timm's, for training and for evaluation."""
  del settings
  return context.encoder(resnet={}, vit=dict(token_init=nn.initializers.normal(1e-6)))
