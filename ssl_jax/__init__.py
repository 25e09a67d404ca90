"""Self-supervised visual pre-training in JAX: pure losses, stateless models, one training loop.

The losses and methods that a user may import are listed here; everything else is reached by its module:
`ssl_jax.augment`, `ssl_jax.convert`, `ssl_jax.knn`, `ssl_jax.optim`, `ssl_jax.models.resnet`, `ssl_jax.data`.
"""

from ssl_jax.losses import byol_loss as byol_loss
from ssl_jax.losses import dino_center as dino_center
from ssl_jax.losses import dino_loss as dino_loss
from ssl_jax.losses import info_nce as info_nce
from ssl_jax.losses import mae_loss as mae_loss
from ssl_jax.losses import nt_xent as nt_xent
from ssl_jax.losses import patchify as patchify
from ssl_jax.losses import unpatchify as unpatchify
from ssl_jax.methods.base import Aux as Aux
from ssl_jax.methods.base import Method as Method
from ssl_jax.methods.byol import byol as byol
from ssl_jax.methods.dino import dino as dino
from ssl_jax.methods.mae import mae as mae
from ssl_jax.methods.moco import moco as moco
from ssl_jax.methods.moco import moco_v3 as moco_v3
from ssl_jax.methods.simclr import simclr as simclr

__all__ = [
  "Aux",
  "Method",
  "byol",
  "byol_loss",
  "dino",
  "dino_center",
  "dino_loss",
  "info_nce",
  "mae",
  "mae_loss",
  "moco",
  "moco_v3",
  "nt_xent",
  "patchify",
  "simclr",
  "unpatchify",
]
