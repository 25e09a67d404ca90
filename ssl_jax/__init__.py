"""Self-supervised visual pre-training in JAX: pure losses, stateless models, one training loop.

The losses and methods that a user may import are listed here; everything else is reached by its module:
`ssl_jax.augment`, `ssl_jax.convert`, `ssl_jax.knn`, `ssl_jax.optim`, `ssl_jax.models.resnet`, `ssl_jax.data`.
"""

from ssl_jax.losses import nt_xent as nt_xent
from ssl_jax.methods.base import Aux as Aux
from ssl_jax.methods.base import Method as Method
from ssl_jax.methods.simclr import simclr as simclr

__all__ = ["Aux", "Method", "nt_xent", "simclr"]
