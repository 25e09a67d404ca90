"""Pure loss functions: arrays in, a scalar out; they import jax and nothing else of ours."""

from ssl_jax.losses.contrastive import nt_xent as nt_xent

__all__ = ["nt_xent"]
