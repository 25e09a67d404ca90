"""Self-supervised visual pre-training in JAX: pure losses, stateless models, one training loop.

What a user may import is listed here; everything else is reached by its module: `ssl_jax.convert`, `ssl_jax.optim`,
`ssl_jax.models.resnet`. Importing `ssl_jax` or `ssl_jax.losses` loads nothing that `import jax` does not load: a name
that needs more, such as flax, loads it when it is first asked for (PEP 562). A few names, such as `read_image`, need
packages that `pip install "ssl_jax[train]"` brings; without them they end in a line that says so.
"""

from typing import TYPE_CHECKING, Any

from ssl_jax import extras

if TYPE_CHECKING:  # for editors and type checkers, which do not run `__getattr__`
  from ssl_jax.augment import View as View
  from ssl_jax.augment import make_views as make_views
  from ssl_jax.data.image import read_image as read_image
  from ssl_jax.evaluation.knn import knn_predict as knn_predict
  from ssl_jax.evaluation.linear import logistic_regression as logistic_regression
  from ssl_jax.losses import barlow_twins_loss as barlow_twins_loss
  from ssl_jax.losses import byol_loss as byol_loss
  from ssl_jax.losses import dino_center as dino_center
  from ssl_jax.losses import dino_loss as dino_loss
  from ssl_jax.losses import distillation_loss as distillation_loss
  from ssl_jax.losses import ibot_loss as ibot_loss
  from ssl_jax.losses import info_nce as info_nce
  from ssl_jax.losses import koleo_loss as koleo_loss
  from ssl_jax.losses import lejepa_loss as lejepa_loss
  from ssl_jax.losses import mae_loss as mae_loss
  from ssl_jax.losses import nt_xent as nt_xent
  from ssl_jax.losses import patchify as patchify
  from ssl_jax.losses import sigreg as sigreg
  from ssl_jax.losses import simsiam_loss as simsiam_loss
  from ssl_jax.losses import sinkhorn_knopp as sinkhorn_knopp
  from ssl_jax.losses import unpatchify as unpatchify
  from ssl_jax.losses import vicreg_loss as vicreg_loss
  from ssl_jax.methods.barlow_twins import barlow_twins as barlow_twins
  from ssl_jax.methods.base import Aux as Aux
  from ssl_jax.methods.base import Method as Method
  from ssl_jax.methods.base import Momentum as Momentum
  from ssl_jax.methods.base import constant_momentum as constant_momentum
  from ssl_jax.methods.base import cosine_momentum as cosine_momentum
  from ssl_jax.methods.byol import byol as byol
  from ssl_jax.methods.dino import dino as dino
  from ssl_jax.methods.dinov2 import dinov2 as dinov2
  from ssl_jax.methods.lejepa import lejepa as lejepa
  from ssl_jax.methods.mae import mae as mae
  from ssl_jax.methods.moco import moco as moco
  from ssl_jax.methods.moco_v3 import moco_v3 as moco_v3
  from ssl_jax.methods.simclr import simclr as simclr
  from ssl_jax.methods.simsiam import simsiam as simsiam
  from ssl_jax.methods.vicreg import vicreg as vicreg
  from ssl_jax.restore import restore_encoder as restore_encoder
  from ssl_jax.weights.load import load_weights as load_weights

__version__ = "0.1.0"  # pyproject.toml reads it here

_HOMES = {  # the module of each name
  "Aux": "methods.base",
  "Method": "methods.base",
  "Momentum": "methods.base",
  "View": "augment",
  "barlow_twins": "methods.barlow_twins",
  "barlow_twins_loss": "losses",
  "byol": "methods.byol",
  "byol_loss": "losses",
  "constant_momentum": "methods.base",
  "cosine_momentum": "methods.base",
  "dino": "methods.dino",
  "dino_center": "losses",
  "dino_loss": "losses",
  "dinov2": "methods.dinov2",
  "distillation_loss": "losses",
  "ibot_loss": "losses",
  "info_nce": "losses",
  "knn_predict": "evaluation.knn",
  "load_weights": "weights.load",
  "logistic_regression": "evaluation.linear",
  "koleo_loss": "losses",
  "lejepa": "methods.lejepa",
  "lejepa_loss": "losses",
  "mae": "methods.mae",
  "mae_loss": "losses",
  "make_views": "augment",
  "moco": "methods.moco",
  "moco_v3": "methods.moco_v3",
  "nt_xent": "losses",
  "patchify": "losses",
  "read_image": "data.image",
  "restore_encoder": "restore",
  "sigreg": "losses",
  "simclr": "methods.simclr",
  "simsiam": "methods.simsiam",
  "simsiam_loss": "losses",
  "sinkhorn_knopp": "losses",
  "unpatchify": "losses",
  "vicreg": "methods.vicreg",
  "vicreg_loss": "losses",
}
_MODULES = (
  "augment",
  "convert",
  "data",
  "losses",
  "methods",
  "models",
  "optim",
  "training",
)  # without a line of their own

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
  if name in _HOMES:
    value = getattr(extras.load(_HOMES[name], f"ssl_jax.{name}", "train"), name)
  elif name in _MODULES:
    value = extras.load(name, f"ssl_jax.{name}", "train")
  else:
    raise AttributeError(f"module 'ssl_jax' has no attribute {name!r}")
  globals()[name] = value  # asked for once
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *_HOMES, *_MODULES})
