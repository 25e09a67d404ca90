"""Contrastive losses: tell the positive apart from every other example of the (global) batch."""

import math

import jax
import jax.numpy as jnp
from jax import lax

_ALL_AT_ONCE, _BLOCK = 2**24, 2**20  # similarities: 64 MiB of float32, and what a block holds beyond that


def nt_xent(
  z1: jax.Array,
  z2: jax.Array,
  *,
  temperature: float | jax.Array = 0.1,
  axis_name: str | None = None,
  block_size: int | None = None,
) -> jax.Array:
  r"""Normalised temperature-scaled cross-entropy between two views of a batch (SimCLR).

  With the 2N views :math:`z` scaled to unit norm inside, and :math:`p(i)` the other view of the image of view i:

  .. math:: L = \frac{1}{2N} \sum_i -\log
      \frac{\exp(\langle z_i, z_{p(i)} \rangle / \tau)}{\sum_{j \neq i} \exp(\langle z_i, z_j \rangle / \tau)}

  Args:
    z1: float [N, d], projections of the first views. Any norm from 1e-6 up is scaled to one; a zero vector stays zero.
    z2: float [N, d], projections of the second views: row i is the positive of row i of `z1`.
    temperature: tau > 0, a Python number or a traced scalar.
    axis_name: mapped axis over which the batch is split; the negatives are then those of the global batch. None:
      the batch that is passed, on one device or as a sharded array under `jax.jit`.
    block_size: how many rows of the [2N, 2N] similarities exist at once; the others are recomputed in the backward
      pass, so that memory is O(N d + N block_size). None: all rows while they are small, blocks beyond.

  Returns:
    float32 scalar (float64 for float64 inputs), >= 0: the mean over the 2N views of the global batch, the same on
    every device. Uniform similarities give log(2N - 1). The official code reports and optimises twice this.

  Gradients: for `jax.pmap`, `jax.vmap` and `jax.shard_map(check_vma=False)`, `lax.pmean` of the per-device gradients is
  the gradient of the returned value. Under shard_map's default `check_vma=True` JAX has summed the gradient of
  replicated parameters already: take it as it is. If you made them varying (`lax.pcast(..., to="varying")`), sum the
  per-device gradients with `lax.psum`.

  Raises:
    TypeError: an input is not floating point, or the temperature is not a number.
    ValueError: shapes differ or are not [N, d], the global batch has fewer than two images, the temperature is not
      positive and finite, or `block_size` is below one.

  Reference: Chen et al., 2020, arXiv:2002.05709, eq. 1; `add_contrastive_loss` in objective.py of
  google-research/simclr, whose negatives carry their gradient across devices as they do here.
  """
  _check_pair("z1", z1, "z2", z2)
  _check_temperature(temperature)
  _check_block_size(block_size)
  z1, z2 = _unit(z1), _unit(z2)
  n = z1.shape[0]
  image = jnp.arange(n)  # where this device's images stand in the global batch
  everyone = jnp.stack([z1, z2])  # [2, n, d]
  if axis_name is not None:
    everyone = lax.all_gather(everyone, axis_name, axis=1, tiled=True)
    image += lax.axis_index(axis_name) * n
  n_global = everyone.shape[1]
  if n_global < 2:
    raise ValueError(f"nt_xent needs a batch of at least two images for its negatives, got {n_global}.")
  candidates = everyone.reshape(2 * n_global, -1)

  def cross_entropy(view):
    z, positive, own = view
    similarity = z @ candidates.T / temperature
    # Not an input, but the index says who is oneself: a duplicate image in the batch stays a negative.
    similarity = jnp.where(jnp.arange(2 * n_global) == own, -jnp.inf, similarity)
    return jax.nn.logsumexp(similarity) - z @ positive / temperature

  anchors = jnp.concatenate([z1, z2]), jnp.concatenate([z2, z1]), jnp.concatenate([image, image + n_global])
  loss = jnp.mean(_by_rows(cross_entropy, anchors, 2 * n_global, block_size))
  return loss if axis_name is None else lax.pmean(loss, axis_name)


def info_nce(
  query: jax.Array,
  key: jax.Array,
  queue: jax.Array | None = None,
  *,
  temperature: float | jax.Array = 0.07,
  axis_name: str | None = None,
  block_size: int | None = None,
) -> jax.Array:
  r"""Cross-entropy of each query's own key against a queue of old keys, or the other keys of the batch (MoCo).

  With q and k scaled to unit norm inside, and the negatives n:

  .. math:: L = \frac{1}{N} \sum_i -\log \frac{\exp(\langle q_i, k_i \rangle / \tau)}
      {\exp(\langle q_i, k_i \rangle / \tau) + \sum_j \exp(\langle q_i, n_j \rangle / \tau)}

  Args:
    query: float [N, d]. Any norm from 1e-6 up is scaled to one; a zero vector stays zero.
    key: float [N, d], scaled likewise: row i is the positive of row i of `query`. Takes no gradient.
    queue: float [K, d], the negatives, unit rows that are used as they are, the same on every device. Takes no
      gradient. None: the negatives of a query are the other keys of the (global) batch.
    temperature: tau > 0, a Python number or a traced scalar.
    axis_name: mapped axis over which the batch is split.
    block_size: how many queries' similarities exist at once; the others are recomputed in the backward pass. None: all
      while they are small, blocks beyond.

  Returns:
    float32 scalar (float64 for float64 inputs), the mean over the global batch, the same on every device. Uniform
    similarities give log(K + 1), or log N without a queue. MoCo v3 multiplies by twice the temperature in its method.

  Gradients over a mapped axis: as for `nt_xent`.

  Raises:
    TypeError, ValueError: as for `nt_xent`; also a queue that is not [K, d] with K >= 1.

  Reference: He et al., 2020, arXiv:1911.05722, eq. 1, builder.py of facebookresearch/moco; without a queue Chen et al.,
  2021, arXiv:2104.02057, algorithm 1, builder.py of facebookresearch/moco-v3.
  """
  _check_pair("query", query, "key", key)
  _check_temperature(temperature)
  _check_block_size(block_size)
  query, key = _unit(query), lax.stop_gradient(_unit(key))
  if queue is not None:
    if not jnp.issubdtype(queue.dtype, jnp.floating):
      raise TypeError(f"queue must be floating point, got {queue.dtype}.")
    if queue.ndim != 2 or queue.shape[0] < 1 or queue.shape[1] != query.shape[1]:
      raise ValueError(f"queue must have shape [K, {query.shape[1]}], got {queue.shape}.")
    candidates = lax.stop_gradient(queue).astype(query.dtype)
  else:
    candidates = key if axis_name is None else lax.all_gather(key, axis_name, tiled=True)
    if candidates.shape[0] < 2:
      raise ValueError("info_nce without a queue needs a batch of at least two images for its negatives, got 1.")

  def cross_entropy(pair):
    q, positive = pair
    own = q @ positive / temperature
    similarity = q @ candidates.T / temperature
    if queue is not None:  # Without one the own key is among the candidates.
      similarity = jnp.concatenate([own[None], similarity])
    return jax.nn.logsumexp(similarity) - own

  loss = jnp.mean(_by_rows(cross_entropy, (query, key), candidates.shape[0], block_size))
  return loss if axis_name is None else lax.pmean(loss, axis_name)


def _by_rows(function, rows, columns, block_size):
  """Maps `function` over rows, all at once or `block_size` at a time with recomputation in the backward pass."""
  n = rows[0].shape[0]
  if block_size is None:
    block_size = n if n * columns <= _ALL_AT_ONCE else max(1, _BLOCK // columns)
  with jax.default_matmul_precision("highest"):
    if block_size >= n:
      return jax.vmap(function)(rows)
    return lax.map(jax.checkpoint(function), rows, batch_size=block_size)


def _check_block_size(block_size):
  if block_size is not None and block_size < 1:
    raise ValueError(f"block_size must be at least 1 or None, got {block_size}.")


def _check_pair(name1, x1, name2, x2):
  for name, x in ((name1, x1), (name2, x2)):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise TypeError(f"{name} must be floating point, got {x.dtype}.")
    if x.ndim != 2:
      raise ValueError(f"{name} must have shape [N, d], got {x.shape}.")
  if x1.shape != x2.shape:
    raise ValueError(f"{name1} and {name2} must have one shape, got {x1.shape} and {x2.shape}.")


def _check_temperature(temperature):
  if isinstance(temperature, jax.core.Tracer):
    return
  if temperature is None or isinstance(temperature, bool | str | complex) or jnp.ndim(temperature) != 0:
    raise TypeError(f"temperature must be a positive number, got {temperature!r}.")
  temperature = float(temperature)  # a jax.Array would be compared under the caller's trace
  if not (math.isfinite(temperature) and temperature > 0):
    raise ValueError(f"temperature must be positive and finite, got {temperature}.")


def _unit(x):
  x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  # At x = 0 value and gradient are 0: without the `where` its gradient would be 1e6 times what comes in, no float16.
  return x * jnp.where(square == 0, 0.0, lax.rsqrt(jnp.maximum(square, 1e-12)))
