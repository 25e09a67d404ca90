"""Pure loss functions: arrays in, a scalar out; they import JAX and nothing else from this package."""

from ssl_jax.losses.contrastive import info_nce as info_nce
from ssl_jax.losses.contrastive import nt_xent as nt_xent
from ssl_jax.losses.distillation import dino_center as dino_center
from ssl_jax.losses.distillation import dino_loss as dino_loss
from ssl_jax.losses.distillation import distillation_loss as distillation_loss
from ssl_jax.losses.distillation import ibot_loss as ibot_loss
from ssl_jax.losses.distillation import sinkhorn_knopp as sinkhorn_knopp
from ssl_jax.losses.distribution import koleo_loss as koleo_loss
from ssl_jax.losses.distribution import lejepa_loss as lejepa_loss
from ssl_jax.losses.distribution import sigreg as sigreg
from ssl_jax.losses.reconstruction import mae_loss as mae_loss
from ssl_jax.losses.reconstruction import patchify as patchify
from ssl_jax.losses.reconstruction import unpatchify as unpatchify
from ssl_jax.losses.redundancy import barlow_twins_loss as barlow_twins_loss
from ssl_jax.losses.redundancy import vicreg_loss as vicreg_loss
from ssl_jax.losses.regression import byol_loss as byol_loss
from ssl_jax.losses.regression import simsiam_loss as simsiam_loss

__all__ = [
  "barlow_twins_loss",
  "byol_loss",
  "dino_center",
  "dino_loss",
  "distillation_loss",
  "ibot_loss",
  "info_nce",
  "koleo_loss",
  "lejepa_loss",
  "mae_loss",
  "nt_xent",
  "patchify",
  "sigreg",
  "simsiam_loss",
  "sinkhorn_knopp",
  "unpatchify",
  "vicreg_loss",
]
