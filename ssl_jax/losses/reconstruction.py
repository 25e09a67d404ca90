"""Reconstruction losses: predict the pixels of removed patches."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from ssl_jax.losses._common import check_input, wide


def mae_loss(prediction: jax.Array, target: jax.Array, mask: jax.Array, *, normalize_target: bool = True) -> jax.Array:
  r"""Mean squared error on the removed patches (MAE).

  With t the target, with `normalize_target` scaled to mean 0 and variance 1 per patch, and m the mask:

  .. math:: L = \frac{\sum_{bl} m_{bl} \frac{1}{P} \sum_p (y_{blp} - t_{blp})^2}{\sum_{bl} m_{bl}}

  Args:
    prediction: float [B, L, P], pixels of the patches.
    target: float [B, L, P], as `patchify` gives them. Takes no gradient.
    mask: [B, L], 1 = removed, included in the loss; 0 = visible, excluded.
    normalize_target: (t - mean) / sqrt(var + 1e-6) in each patch, with the unbiased variance. A constant patch
      becomes 0.

  Returns:
    float32 scalar (float64 for float64 inputs), >= 0. A mask without removed patches gives 0.

  Raises:
    TypeError: prediction or target is not floating point.
    ValueError: the shapes do not fit or have an empty axis, or a patch of one value is to be normalised.

  Reference: He et al., 2021, arXiv:2111.06377, section 3; `forward_loss` in models_mae.py of facebookresearch/mae.
  """
  for name, x in (("prediction", prediction), ("target", target)):
    check_input(name, x)
  if prediction.ndim != 3 or prediction.shape != target.shape or mask.shape != prediction.shape[:2]:
    raise ValueError(
      "prediction and target must be [B, L, P] and mask [B, L], "
      f"got {prediction.shape}, {target.shape} and {mask.shape}."
    )
  if normalize_target and target.shape[-1] < 2:
    raise ValueError(f"a patch needs two values to be normalised, got P = {target.shape[-1]}.")
  prediction, target = wide(prediction), lax.stop_gradient(wide(target))
  if normalize_target:
    mean, var = jnp.mean(target, axis=-1, keepdims=True), jnp.var(target, axis=-1, keepdims=True, ddof=1)
    target = (target - mean) / jnp.sqrt(var + 1e-6)
  error = jnp.mean(jnp.square(prediction - target), axis=-1)
  mask = mask.astype(error.dtype)
  return jnp.sum(error * mask) / jnp.maximum(jnp.sum(mask), 1)


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
  """Cuts images [B, H, W, C] into patches [B, L, p p C].

  Patches go row by row; in a patch the order is (row, column, channel), as in the official MAE.

  Raises:
    ValueError: the patch size does not divide the height and the width.
  """
  if images.ndim != 4 or patch_size < 1 or images.shape[1] % patch_size or images.shape[2] % patch_size:
    raise ValueError(f"patch_size={patch_size} does not divide images [B, H, W, C] of shape {images.shape}.")
  b, height, width, c = images.shape
  rows, columns, p = height // patch_size, width // patch_size, patch_size
  patches = jnp.swapaxes(images.reshape(b, rows, p, columns, p, c), 2, 3)  # [b, rows, columns, p, p, c]
  return patches.reshape(b, rows * columns, p * p * c)


def unpatchify(patches: jax.Array, patch_size: int) -> jax.Array:
  """The inverse of `patchify` for square images: [B, L, p p C] to [B, H, H, C].

  Raises:
    ValueError: L is not a square number, or the last axis no multiple of p p.
  """
  side = math.isqrt(patches.shape[1]) if patches.ndim == 3 else 0
  if side < 1 or side * side != patches.shape[1] or patch_size < 1 or patches.shape[2] % patch_size**2:
    raise ValueError(f"patches of shape {patches.shape} are not [B, n n, p p C] with p = {patch_size}.")
  b, p = len(patches), patch_size
  pixels = jnp.swapaxes(patches.reshape(b, side, side, p, p, -1), 2, 3)  # [b, rows, p, columns, p, c]
  return pixels.reshape(b, side * p, side * p, -1)
