"""MAE's decoder (He et al., 2021, arXiv:2111.06377): a small transformer that fills in the removed patches."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.models.vit import Block, layer_norm, sincos_positions


class MAEDecoder(nn.Module):
  """Predicts the pixels of every patch from the encoded visible ones; named as models_mae.py of facebookresearch/mae.

  Attributes:
    patch_values: values of a patch, p p C.
    dim, depth, heads, mlp_ratio: shape of the transformer.
    kernel_init, token_init: of the linear layers and of the mask token.
    recompute: see `vit.ViT`.
    dtype: of the computation.
  """

  patch_values: int
  dim: int = 512
  depth: int = 8
  heads: int = 16
  mlp_ratio: float = 4
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
  token_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  recompute: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array, restore: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Decodes.

    Args:
      tokens: float [b, 1 + visible, d], the class token first.
      restore: int [b, L], each patch's index in the shuffled order, in which the visible ones come first.
      grid: rows and columns of patches, L in all.

    Returns:
      float [b, L, patch_values].
    """
    dense = functools.partial(nn.Dense, kernel_init=self.kernel_init, dtype=self.dtype)
    x = dense(self.dim, name="decoder_embed")(tokens)
    mask_token = self.param("mask_token", self.token_init, (1, 1, self.dim)).astype(self.dtype)
    removed = jnp.broadcast_to(mask_token, (x.shape[0], restore.shape[1] + 1 - x.shape[1], self.dim))
    patches = jnp.concatenate([x[:, 1:], removed], axis=1)
    patches = jnp.take_along_axis(patches, restore[..., None], axis=1)
    x = jnp.concatenate([x[:, :1], patches], axis=1)
    x = x + jnp.asarray(sincos_positions(*grid, self.dim, row_first=False)).astype(self.dtype)
    for i in range(self.depth):
      args = (self.heads, self.mlp_ratio, self.kernel_init, self.kernel_init, self.dtype, self.recompute)
      x = Block(*args, name=f"decoder_blocks_{i}")(x)
    x = layer_norm(self.dtype, self.recompute, name="decoder_norm")(x)
    return dense(self.patch_values, name="decoder_pred")(x)[:, 1:]
