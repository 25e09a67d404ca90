"""Pure loss functions: arrays in, a scalar out; they import JAX and nothing else from this package."""

from ssl_jax.losses.contrastive import info_nce as info_nce
from ssl_jax.losses.contrastive import nt_xent as nt_xent
from ssl_jax.losses.distillation import dino_center as dino_center
from ssl_jax.losses.distillation import dino_loss as dino_loss
from ssl_jax.losses.reconstruction import mae_loss as mae_loss
from ssl_jax.losses.reconstruction import patchify as patchify
from ssl_jax.losses.reconstruction import unpatchify as unpatchify
from ssl_jax.losses.regression import byol_loss as byol_loss

__all__ = [
  "byol_loss",
  "dino_center",
  "dino_loss",
  "info_nce",
  "mae_loss",
  "nt_xent",
  "patchify",
  "unpatchify",
]
