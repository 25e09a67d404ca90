"""What features tell without any label: how many directions they use, how they spread, how still they stand.

None of these is an accuracy. docs/evaluation.md says what they can and cannot tell.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

_BLOCK = 1024  # rows whose distances are computed at once


def rankme(features: ArrayLike) -> jax.Array:
  r"""RankMe, a smooth count of the directions that features use (Garrido et al., 2023, arXiv:2210.02885, equation 1).

  .. math:: \exp\Bigl(-\sum_k p_k \log p_k\Bigr), \quad p_k = \frac{\sigma_k}{\sum_j \sigma_j} + 10^{-7}

  of the singular values :math:`\sigma` of the features as they are, neither centred nor normalised.

  Args:
    features: float [N, d]. The value is at most about min(N, d): compare only figures of equally many images.

  Returns:
    A scalar of the features' precision, float32 at least: 1 where all rows are multiples of one, min(N, d) where all
    singular values are equal.

  Raises:
    TypeError: features that are not floating point.
    ValueError: features that are not [N, d] or are empty.
  """
  return _rankme(_checked(features=features))


def effective_rank(features: ArrayLike) -> jax.Array:
  r"""The participation ratio of the covariance of the unit vectors, as the monitor of training of that name.

  .. math:: \Bigl(\sum_k \lambda_k\Bigr)^2 / \sum_k \lambda_k^2

  of the eigenvalues :math:`\lambda`. Large ones count more than in RankMe, which small ones fill up.

  Args:
    features: float [N, d], of any norm.

  Returns:
    A scalar: between 1 and min(d, N - 1); 0 where all rows point one way. Errors are those of `rankme`.
  """
  return _effective_rank(_checked(features=features))


def uniformity(features: ArrayLike) -> jax.Array:
  r"""How evenly unit vectors spread over the sphere (Wang and Isola, 2020, arXiv:2005.10242, equation 5).

  .. math:: \log \frac{1}{N (N - 1)} \sum_{i \ne j} e^{-2 \lVert z_i - z_j \rVert^2}

  Args:
    features: float [N, d], N >= 2, of any norm: z are the unit vectors.

  Returns:
    A scalar: 0 where all are one point, and lower the more evenly they spread; for points spread evenly over a sphere
    of many dimensions about -4. No [N, N] is made. Errors are those of `rankme`; also for N < 2.
  """
  x = _checked(features=features)
  if x.shape[0] < 2:
    raise ValueError(f"features must have two rows at least, got {list(x.shape)}.")
  return _uniformity(x)


def alignment(first: ArrayLike, second: ArrayLike) -> jax.Array:
  r"""How far two views of an image are apart (Wang and Isola, 2020, arXiv:2005.10242, equation 4).

  .. math:: \frac{1}{N} \sum_i \lVert a_i - b_i \rVert^2

  Args:
    first, second: float [N, d], one view of each image and another, of any norm: a and b are the unit vectors.

  Returns:
    A scalar: 0 where the views agree, 2 where they are unrelated, 4 at most. Errors are those of `rankme`; also for two
    shapes.
  """
  a, b = _checked(first=first), _checked(second=second)
  if a.shape != b.shape:
    raise ValueError(f"first and second must have one shape, got {list(a.shape)} and {list(b.shape)}.")
  return _alignment(a, b)


@jax.jit
def _rankme(x):
  sigma = jnp.linalg.svd(x, compute_uv=False)
  p = sigma / jnp.maximum(jnp.sum(sigma), jnp.finfo(x.dtype).tiny) + 1e-7
  return jnp.exp(-jnp.sum(p * jnp.log(p)))


@jax.jit
def _effective_rank(x):
  z = _unit(x)
  centred = z - jnp.mean(z, axis=0, keepdims=True)
  with jax.default_matmul_precision("highest"):
    gram = centred.T @ centred if z.shape[1] < z.shape[0] else centred @ centred.T
  return jnp.square(jnp.trace(gram)) / jnp.maximum(jnp.sum(jnp.square(gram)), 1e-12)


@jax.jit
def _alignment(a, b):
  return jnp.mean(jnp.sum(jnp.square(_unit(a) - _unit(b)), axis=1))


@jax.jit
def _uniformity(x):
  n = x.shape[0]
  z, block = _unit(x), min(_BLOCK, x.shape[0])

  def add(total, start):
    # The last block is moved back to fit; rows that it repeats do not count again.
    first = jnp.minimum(start, n - block)
    rows, at = lax.dynamic_slice_in_dim(z, first, block), first + jnp.arange(block)
    gram = jnp.matmul(rows, z.T, precision=lax.Precision.HIGHEST)
    counts = (at[:, None] >= start) & (at[:, None] != jnp.arange(n)[None])
    pairs = jnp.where(counts, jnp.exp(4 * (gram - 1)), 0.0)  # |a - b|^2 = 2 - 2 <a, b>
    return total + jnp.sum(pairs), None

  total, _ = lax.scan(add, jnp.zeros((), x.dtype), jnp.arange(0, n, block))
  return jnp.log(total / (n * (n - 1.0)))


def _checked(**features):
  """The one argument, in float32 at least."""
  ((name, x),) = features.items()
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"{name} must be floating point, got {x.dtype}.")
  if x.ndim != 2 or 0 in x.shape:
    raise ValueError(f"{name} must be [N, d] and not empty, got {list(x.shape)}.")
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _unit(x):
  return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))
