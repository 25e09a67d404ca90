"""MAE: remove most patches, encode the rest, predict the pixels of the removed (He et al., 2021, arXiv:2111.06377).

Official code: facebookresearch/mae, main_pretrain.py and models_mae.py.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

from ssl_jax import random_streams
from ssl_jax.errors import UserError
from ssl_jax.losses import mae_loss, patchify
from ssl_jax.methods.base import Aux, Context, Method, Monitored
from ssl_jax.models.mae import MAEDecoder
from ssl_jax.models.vit import ViT, patch_xavier
from ssl_jax.settings import flag, number, positive, size, text, whole


@struct.dataclass
class MAEState:
  """MAE has no state between steps."""


class MAEPictures(NamedTuple):
  """What `Method.pictures` shows: [n, h, w, c] each; removed patches are filled with the mean of all images."""

  original: jax.Array
  masked: jax.Array
  reconstruction: jax.Array


def mask_from_noise(noise: jax.Array, keep: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Picks the patches that stay: those with the `keep` lowest values of the noise.

  Args:
    noise: float [b, L].
    keep: how many stay in each image.

  Returns:
    (visible int [b, keep], mask float32 [b, L] with 1 = removed, restore int [b, L]: each patch's index in the shuffled
    order, whose first `keep` are the visible ones).
  """
  shuffle = jnp.argsort(noise, axis=1)
  restore = jnp.argsort(shuffle, axis=1)
  return shuffle[:, :keep], (restore >= keep).astype(jnp.float32), restore


def mae(encoder: ViT, decoder: MAEDecoder, *, mask_ratio: float = 0.75, normalize_target: bool = True) -> Method:
  """Builds MAE.

  Args:
    encoder: a ViT; only the visible patches go through it.
    decoder: predicts the pixels of all patches.
    mask_ratio: share of the patches that is removed; int(L (1 - ratio)) stay.
    normalize_target: see `mae_loss`.
  """
  patch = encoder.patch_size

  def forward(params, images, noise):
    """Returns (predictions [b, L, P], mask [b, L], encoded tokens)."""
    grid = images.shape[1] // patch, images.shape[2] // patch
    visible, mask, restore = mask_from_noise(noise, int(noise.shape[1] * (1 - mask_ratio)))
    tokens = encoder.apply({"params": params["encoder"]}, images, keep=visible, method="tokens")
    return decoder.apply({"params": params["decoder"]}, tokens, restore, grid), mask, tokens

  def draw_noise(keys, patches):
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, random_streams.MASK), (patches,)))(keys)

  def init(key, views):
    encoder_key, decoder_key = jax.random.split(key)
    images = views[0][0]
    grid = images.shape[1] // patch, images.shape[2] // patch
    if grid[0] * grid[1] < 2:
      raise UserError(f"MAE needs more than one patch: images of {images.shape[1]} pixels, patches of {patch}.")
    encoder_params = encoder.init(encoder_key, images, train=False)["params"]
    tokens = jnp.zeros((1, 1 + grid[0] * grid[1], encoder.dim))
    restore = jnp.arange(grid[0] * grid[1])[None]
    decoder_params = decoder.init(decoder_key, tokens, restore, grid)["params"]
    return {"encoder": encoder_params, "decoder": decoder_params}, MAEState()

  def loss(params, state, views, keys, step):
    del state, step
    images = views[0][0]  # [b, h, w, c]: MAE takes one view
    target = patchify(images, patch)
    prediction, mask, tokens = forward(params, images, draw_noise(keys, target.shape[1]))
    value = mae_loss(prediction, target, mask, normalize_target=normalize_target)
    monitored = Monitored(jnp.mean(tokens[:, 1:], axis=1, keepdims=True))
    return value, Aux({"loss": value}, monitored=monitored)

  def update(params, state, aux, step):
    del params, aux, step
    return state

  def encoder_variables(params, state):
    del state
    return {"params": params["encoder"]}

  def pictures(params, state, images, keys):
    del state
    patches = patchify(images, patch)
    prediction, mask, _ = forward(params, images, draw_noise(keys, patches.shape[1]))
    if normalize_target:  # undone with the true mean and variance of each patch, which the network does not predict
      mean, var = jnp.mean(patches, axis=-1, keepdims=True), jnp.var(patches, axis=-1, keepdims=True, ddof=1)
      prediction = prediction * jnp.sqrt(var + 1e-6) + mean

    def put_into_removed(values):
      filled = jnp.where(mask[..., None] == 1, values, patches)
      rows = images.shape[1] // patch
      return rearrange(filled, "n (h w) (p q c) -> n (h p) (w q) c", h=rows, p=patch, q=patch)

    return MAEPictures(images, put_into_removed(jnp.mean(images)), put_into_removed(prediction))

  # Predicting a normalised patch's mean, 0, leaves its variance, 1; the variance of raw pixels depends on the data.
  chance = (lambda batch_size: 1.0) if normalize_target else None
  return Method(init, loss, update, encoder_variables, separable=True, chance=chance, pictures=pictures)


SETTINGS = dict(
  name=text(required=True),
  mask_ratio=number(0, 1, ends="()", required=True),
  normalize_target=flag(required=True),
  decoder=dict(dim=size(), depth=whole(), heads=whole(), mlp_ratio=positive(), recompute=flag()),
)


def from_config(settings: Any, context: Context) -> Method:
  """Builds MAE as a recipe's `method` section describes it."""
  if len(context.views) != 1:
    raise UserError(f"mae takes one view, got {len(context.views)}.")
  encoder = make_encoder(settings, context)
  if encoder.registers:
    raise UserError(f"mae takes an encoder without registers, got encoder.registers={encoder.registers}.")
  decoder = MAEDecoder(encoder.patch_size**2 * context.channels, **settings.decoder, dtype=context.dtype)
  return mae(encoder, decoder, mask_ratio=settings.mask_ratio, normalize_target=settings.normalize_target)


def make_encoder(settings: Any, context: Context) -> Any:
  """The recipe's encoder with the official initialisation, for training and for evaluation."""
  del settings
  xavier = nn.initializers.xavier_uniform()
  inits = dict(kernel_init=xavier, qkv_init=xavier, patch_init=patch_xavier)
  return context.encoder(vit=dict(positions="column_first", **inits))
