"""Redundancy reduction: keep features varied and uncorrelated over the (global) batch, without negatives."""

import jax
import jax.numpy as jnp
from jax import lax

from ssl_jax.losses._common import check_pair, wide


def vicreg_loss(
  z1: jax.Array,
  z2: jax.Array,
  *,
  invariance: float | jax.Array = 25.0,
  variance: float | jax.Array = 25.0,
  covariance: float | jax.Array = 1.0,
  eps: float = 1e-4,
  axis_name: str | None = None,
) -> jax.Array:
  r"""Invariance, variance and covariance of two views of a batch (VICReg).

  With C(z) the unbiased covariance of a view's features:

  .. math:: L = \frac{\lambda}{N d} \sum_n \lVert z_n - z'_n \rVert^2
      + \sum_{Z \in \{z, z'\}} \Bigl[ \frac{\mu}{2 d} \sum_j \max(0, 1 - \sqrt{C(Z)_{jj} + \epsilon})
      + \frac{\nu}{d} \sum_{i \neq j} C(Z)_{ij}^2 \Bigr]

  The mean over d in the first term and the half in the second are the official code's; the paper's equations lack them.

  Args:
    z1: float [N, d], embeddings of the first views, not normalised.
    z2: float [N, d], embeddings of the second views: row i is of the image of row i of `z1`.
    invariance, variance, covariance: the weights lambda, mu and nu.
    eps: under the root, >= 0.
    axis_name: mapped axis over which the batch is split; means, variances and covariances are then those of the global
      batch.

  Returns:
    float32 scalar (float64 for float64 inputs), >= 0, the same on every device. Where all embeddings are one point it
    is mu (1 - sqrt(eps)).

  Gradients over a mapped axis: as for `nt_xent`.

  Raises:
    TypeError: an input is not floating point.
    ValueError: shapes differ, are not [N, d] or have an empty axis, or the global batch has fewer than two images.

  Reference: Bardes et al., 2022, arXiv:2105.04906, eq. 1 to 6; main_vicreg.py of facebookresearch/vicreg.
  """
  n = _check_batch("vicreg_loss", z1, z2, axis_name)
  z1, z2 = wide(z1), wide(z2)
  distance = _mean(jnp.square(z1 - z2), axis_name)
  spread = redundant = jnp.zeros((), z1.dtype)
  for z in (z1, z2):
    covariances = _cross(_centred(z, axis_name), _centred(z, axis_name), axis_name) * (n / (n - 1))
    deviation = jnp.sqrt(jnp.diagonal(covariances) + eps)
    spread += jnp.mean(jax.nn.relu(1 - deviation)) / 2
    redundant += _off_diagonal_squares(covariances) / z.shape[1]
  return invariance * jnp.mean(distance) + variance * spread + covariance * redundant


def barlow_twins_loss(
  z1: jax.Array,
  z2: jax.Array,
  *,
  off_diagonal: float | jax.Array = 0.0051,
  eps: float = 1e-5,
  axis_name: str | None = None,
) -> jax.Array:
  r"""Distance of the views' cross-correlation matrix from the identity (Barlow Twins).

  With :math:`\hat z` the features scaled to mean 0 and variance 1 over the batch, each view by itself:

  .. math:: C = \frac{1}{N} \hat z_1^T \hat z_2, \quad
      L = \sum_i (C_{ii} - 1)^2 + \lambda \sum_{i \neq j} C_{ij}^2

  Args:
    z1: float [N, d], embeddings of the first views, not normalised.
    z2: float [N, d], embeddings of the second views: row i is of the image of row i of `z1`.
    off_diagonal: lambda.
    eps: added to the biased variance, as in the batch norm of the official code; it must be positive where a feature
      may be constant.
    axis_name: mapped axis over which the batch is split; means, variances and correlations are then those of the global
      batch.

  Returns:
    float32 scalar (float64 for float64 inputs), >= 0, the same on every device; d where all embeddings are one point.
    The official run multiplies it by 0.024, or scales the learning rates instead.

  Gradients over a mapped axis: as for `nt_xent`.

  Raises:
    TypeError: an input is not floating point.
    ValueError: shapes differ, are not [N, d] or have an empty axis, or the global batch has fewer than two images.

  Reference: Zbontar et al., 2021, arXiv:2103.03230, eq. 1 and 2; main.py of facebookresearch/barlowtwins.
  """
  _check_batch("barlow_twins_loss", z1, z2, axis_name)

  def standardised(z):
    z = _centred(wide(z), axis_name)
    square = _mean(jnp.square(z), axis_name)
    # Where it overflows, zeros would look like features that have nothing in common.
    return z * jnp.where(square == jnp.inf, jnp.nan, lax.rsqrt(square + eps))[None]

  correlation = _cross(standardised(z1), standardised(z2), axis_name)
  on_diagonal = jnp.sum(jnp.square(jnp.diagonal(correlation) - 1))
  return on_diagonal + off_diagonal * _off_diagonal_squares(correlation)


def _check_batch(loss, z1, z2, axis_name):
  """Checks the inputs and returns the size of the global batch."""
  check_pair("z1", z1, "z2", z2)
  n = z1.shape[0] * (1 if axis_name is None else lax.axis_size(axis_name))
  if n < 2:
    raise ValueError(f"{loss} needs a batch of at least two images for its statistics, got {n}.")
  return n


def _mean(x, axis_name):
  """The mean of each column over the global batch."""
  mean = jnp.mean(x, axis=0)
  return mean if axis_name is None else lax.pmean(mean, axis_name)


def _centred(z, axis_name):
  return z - _mean(z, axis_name)[None]


def _cross(x, y, axis_name):
  """The mean of x_i y_j over the global batch, [d, d]."""
  with jax.default_matmul_precision("highest"):
    product = x.T @ y / x.shape[0]
  return product if axis_name is None else lax.pmean(product, axis_name)


def _off_diagonal_squares(matrix):
  return jnp.sum(jnp.where(jnp.eye(matrix.shape[0], dtype=bool), 0, jnp.square(matrix)))
